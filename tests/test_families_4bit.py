"""Every family whose experts transformers dispatches: computed here like its own code would, or refused with the reason.

The list is not ours: `moe_families` finds the experts classes and language models in the installed library.
"""

from __future__ import annotations

import warnings
from functools import partial

import bitsandbytes.functional as bnbf
import pytest
import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from torch.func import functional_call
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.activations import ACT2FN

from helpers import experts, nf4, qlora
from helpers.audit import audit
from helpers.quantization import load_4bit, random_4bit
from tests.moe_families import COMPOSITES, causal_lms, dispatched, experts_module, knows_routers, tiny

# Which families have a recordable router, and how their classes look, differs from version to version.
pytestmark = knows_routers
IDS = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
CLASSES = {c.__name__: c for classes in dispatched().values() for c in classes}
REFUSED = {
    "AriaExperts": "stored transposed",
    "GptOssExperts": "stored transposed",
    "OpenAIPrivacyFilterExperts": "stored transposed",
    "NemotronHExperts": "no gate projection",
    "MuseSparkExperts": "end in a norm",
}
REFUSED_MODELS = {"aria_text": "stored transposed", "gpt_oss": "stored transposed", "nemotron_h": "no gate projection"}
MODELS = [kind for kind in causal_lms() if kind not in COMPOSITES]
E, H, I, R = 4, 64, 64, 3  # noqa: E741


# ------------------------------------------------------------------------------------------- the maths, class by class


def setup(experts_class: type, dtype: torch.dtype, index: torch.Tensor, activation: str = "silu"):
    """(run, its inputs) three times: ours on NF4, the class's own forward on W + B·A in float64, and that in `dtype`."""
    torch.manual_seed(0)
    module = experts_module(experts_class, activation)
    plain = experts_module(experts_class, activation).double()
    weights = {}
    for name in experts.STACKS:
        packed = nf4.quantize_stack(getattr(module, name))
        packed.quant_state.dtype = dtype
        weights[name] = nf4.dequantize_stack(packed).double()
        setattr(module, name, packed)
    module.to(dtype)
    module.config._experts_implementation, plain.config._experts_implementation = experts.NAME, "eager"
    own = experts_module(experts_class, activation).to(dtype)
    up, down = (weights[name].shape[1] for name in experts.STACKS)
    shapes = {"x": (len(index), H), "weight": index.shape, "A1": (E, R, H), "B1": (E, up, R), "A2": (E, R, I), "B2": (E, down, R)}
    g = torch.Generator().manual_seed(1)
    inputs = {k: (torch.randn(s, generator=g) * (1.0 if k == "x" else 0.3)).to(dtype).requires_grad_() for k, s in shapes.items()}
    doubles = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}

    def ours(x, weight, A1, B1, A2, B2):
        module.lora_factors = dict(zip(experts.STACKS, (experts.Factors(A1, B1), experts.Factors(A2, B2)), strict=True))
        return module(x, index, weight)

    def stock(model, x, weight, A1, B1, A2, B2):
        w1, w2 = (weights[name].to(x.dtype) for name in experts.STACKS)
        return functional_call(model, {"gate_up_proj": w1 + B1 @ A1, "down_proj": w2 + B2 @ A2}, (x, index, weight))

    same = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    return (ours, inputs), (partial(stock, plain), doubles), (partial(stock, own), same)


def results(run, inputs) -> dict[str, torch.Tensor]:
    """The output, and the gradient of every input from one and the same gradient of the output."""
    out = run(**inputs)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16()  # the same numbers in every dtype
    grads = torch.autograd.grad(out, list(inputs.values()), up.to(out.dtype))
    return {"out": out.detach(), **dict(zip(inputs, grads, strict=True))}


# Allowed are four roundings on the way to a result, in units of the dtype's roundoff u = eps / 2, and more where sums cancel,
# which a family's own code in the same dtype feels as well: three times its deviation. In fp32 the sums themselves (up to
# 128 terms, several after one another) are rounded, in bf16 and fp16 they are formed in fp32: 32 u against 4 u.
ROUNDINGS = {torch.float32: 32, torch.bfloat16: 4, torch.float16: 4}


def check(experts_class: type, dtype: torch.dtype, route: str, activation: str = "silu") -> None:
    ours, exact, own = (results(*pair) for pair in setup(experts_class, dtype, ROUTES[route], activation))
    for name, wanted in exact.items():
        off, usual = ((r[name].double() - wanted).norm() / wanted.norm() for r in (ours, own))
        assert off <= max(ROUNDINGS[dtype] * torch.finfo(dtype).eps / 2, 3 * usual), (dtype, name, off, usual)


ROUTES = {
    "one expert idle": torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0]]),
    "all tokens to one": torch.full((5, 1), 2),
    "one token": torch.tensor([[3, 1]]),
    "every expert every token": torch.arange(4).repeat(5, 1),
}


@pytest.mark.parametrize("name", [n for n in CLASSES if n not in REFUSED])
def test_forward_and_gradients_are_those_of_the_familys_own_code_in_float64(name):
    for dtype in ROUNDINGS:
        check(CLASSES[name], dtype, "one expert idle")


def family_activations() -> set[str]:
    """Names of activations that configurations of these families have by default."""
    found = set()
    for kind in causal_lms():
        config = CONFIG_MAPPING[kind]().get_text_config()
        found |= {
            v for k in ("hidden_act", "hidden_activation", "mlp_hidden_act") if isinstance(v := getattr(config, k, None), str)
        }
    return found


@pytest.mark.parametrize("activation", sorted(family_activations() | {"silu", "gelu", "gelu_pytorch_tanh", "relu2", "sigmoid"}))
@pytest.mark.parametrize("route", ROUTES)
def test_every_activation_and_every_route(activation, route):
    assert activation in ACT2FN
    for dtype in ROUNDINGS:
        check(CLASSES["MixtralExperts"], dtype, route, activation)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_with_the_reason(name):
    assert REFUSED[name] in experts.unsupported(experts_module(CLASSES[name]))


# --------------------------------------------------------------------------------------------- whole models


def dequantised(model, folder):
    """Stock transformers' model with the values that the 4-bit model has."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, param in twin.named_parameters():
            packed = model.get_parameter(name)
            if isinstance(packed, Params4bit):
                stack = packed.quant_state.shape == param.shape and param.ndim == 3
                param.copy_(nf4.dequantize_stack(packed) if stack else bnbf.dequantize_4bit(packed.data, packed.quant_state))
            else:
                assert torch.equal(packed, param), name
    return twin


@pytest.mark.parametrize("kind", [k for k in MODELS if k not in REFUSED_MODELS])
def test_a_checkpoint_loads_and_computes_what_its_dequantised_stock_model_does(kind, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny(kind)).save_pretrained(tmp_path)  # the family's own layout, mostly per expert
    model = load_4bit(tmp_path, dtype="float32").eval()
    report = audit(model)
    assert report.parts["experts"].four_bit == report.parts["experts"].weights - loose_vectors(model)
    assert report.parts["router"].four_bit == 0
    with torch.no_grad():
        logits = [m(input_ids=IDS, use_cache=False).logits for m in (model, dequantised(model, tmp_path))]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def loose_vectors(model) -> int:
    """Weights of experts modules beside the two stacks (a scale an expert and the like)."""
    modules = [m for m in model.modules() if experts.is_experts(m)]
    return sum(p.numel() for m in modules for n, p in m.named_parameters() if n not in experts.STACKS)


@pytest.mark.parametrize("kind", REFUSED_MODELS)
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(kind, tmp_path):
    AutoModelForCausalLM.from_config(tiny(kind)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED_MODELS[kind]):
        load_4bit(tmp_path, dtype="float32")


def test_nothing_was_left_out():
    """Every experts class of the library is computed or refused; every language model is tested or holds one that is."""
    assert {c for c in CLASSES if c in REFUSED} == set(REFUSED) and len(CLASSES) - len(REFUSED) >= 50
    text = {type(CONFIG_MAPPING[kind]().get_text_config()).model_type for kind in COMPOSITES}
    assert text <= set(MODELS), "a composite's language model is no type of its own"


# What these adapters feed is decided by an argmax, or needs more tokens than the test has.
WITHOUT_GRADIENT = {"deepseek_v4": "compressor"}


@pytest.mark.parametrize("kind", [k for k in MODELS if k not in REFUSED_MODELS])
def test_adapters_train_in_every_family(kind):
    model = random_4bit(tiny(kind), "float32", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that PEFT cannot adapt, see the test below
        if kind == "afmoe":
            with pytest.raises(ValueError, match="router"):
                qlora.add_lora(model, r=4)
        peft_model = qlora.add_lora(model, r=4, router=kind != "afmoe").train()
    peft_model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    dead = [n for n, p in peft_model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in dead if WITHOUT_GRADIENT.get(kind, "nothing") not in n]
    grads = {n: p.grad for n, p in peft_model.named_parameters() if ".experts." in n and ".lora_B" in n}
    assert grads and all(g.abs().sum() > 0 for g in grads.values())


def test_layers_that_peft_would_take_for_experts_are_left_out_with_a_warning():
    """PEFT translates `gate_proj` of a DeepSeek-like model into the expert stack and doubles its rank, in silence."""
    with pytest.warns(UserWarning, match="gate_proj"):
        model = qlora.add_lora(random_4bit(tiny("deepseek_v3"), "float32"), r=4)
    assert not model.peft_config["default"].rank_pattern
    stacks = [m for m in model.modules() if isinstance(m, qlora.ParamWrapper) and m._param_ndim == 3]
    assert stacks and all(m.r["default"] == 4 for m in stacks)


def test_a_linear_router_is_adapted_or_left_out_as_asked():
    for wanted in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = qlora.add_lora(random_4bit(tiny("hunyuan_v1_moe"), "float32"), r=4, router=wanted)
        assert any(".gate.wg.lora_A" in n for n, _ in model.named_parameters()) is wanted
    only = qlora.add_lora(random_4bit(tiny("hunyuan_v1_moe"), "float32"), r=4, attention=False, experts=False)
    assert {n.split(".lora_")[0].rpartition(".")[2] for n, p in only.named_parameters() if p.requires_grad} == {"wg"}


def test_an_indexers_input_is_not_cast_to_bytes(tmp_path):
    """dots3's indexer computes `x.to(self.weights_proj.weight.dtype)`: of a packed weight that is uint8."""
    AutoModelForCausalLM.from_config(tiny("dots3_note_text")).save_pretrained(tmp_path)
    model = load_4bit(tmp_path, dtype="float32")
    weights = [m.weights_proj for n, m in model.named_modules() if n.endswith(".indexer")]
    assert weights and all(type(m) is nn.Linear for m in weights)
