"""Adapters on 4-bit experts, and that they mean the same to stock PEFT."""

from __future__ import annotations

import dataclasses
import json

import bitsandbytes.functional as bnbf
import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, OlmoeConfig

from helpers import activation_checkpointing, experts, merging, nf4, qlora
from helpers.audit import audit, router_recorders
from helpers.quantization import load_4bit, random_4bit, save_4bit
from helpers.router_losses import attach_router_losses
from helpers.tiny import tiny_config
from tests.moe_families import knows_routers, tiny

IDS = torch.arange(3, 43).view(2, 20)


def randomise(model, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n):
            p.normal_(std=0.05)
    return model


def dequantised_twin(model, folder):
    """The unquantised model with the 4-bit model's own values."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, param in twin.named_parameters():
            packed = model.get_parameter(name)
            if isinstance(packed, Params4bit):
                values = (
                    nf4.dequantize_stack(packed) if param.ndim == 3 else bnbf.dequantize_4bit(packed.data, packed.quant_state)
                )
                param.copy_(values)
    return twin


def test_adapters_sit_on_attention_experts_and_router(random_mixtral):
    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in names)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate.lora"):
        assert any(part in n for n in names), part
    assert not any("lm_head" in n for n in names)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    b = [p.grad.abs().sum() for n, p in model.named_parameters() if ".lora_B" in n]
    assert all(g > 0 for g in b), "every lora_B must get a gradient in the first step"


def test_saved_adapter_gives_the_same_logits_in_stock_peft(random_mixtral, tmp_path):
    base = load_4bit(random_mixtral, dtype="float32")
    twin = dequantised_twin(base, random_mixtral)
    ours = randomise(qlora.add_lora(base, r=4, alpha=8, dropout=0.05)).eval()
    qlora.save_lora(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0, "stock PEFT refuses dropout here"
    stock = PeftModel.from_pretrained(twin, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)
        with stock.disable_adapter(), ours.disable_adapter():
            plain = ours(IDS).logits
            torch.testing.assert_close(plain, stock(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (plain - ours(IDS).logits).abs().max() > 1e-3, "the adapter must do something"


def test_gradients_equal_stock_peft_on_dequantised_weights(random_mixtral, tmp_path):
    base = load_4bit(random_mixtral, dtype="float32")
    twin = dequantised_twin(base, random_mixtral)
    ours = randomise(qlora.add_lora(base, r=4, alpha=8, dropout=0.0)).train()
    qlora.save_lora(ours, tmp_path)
    stock = PeftModel.from_pretrained(twin, str(tmp_path), is_trainable=True).train()
    grads = []
    for model in (ours, stock):
        model(IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert set(grads[0]) == set(grads[1]) and len(grads[0]) > 10
    for name, g in grads[1].items():
        assert (grads[0][name] - g).norm() <= 2e-4 * g.norm() + 1e-9, name


def test_reload_gives_the_same_bits(random_mixtral, tmp_path):
    ours = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)).eval()
    qlora.save_lora(ours, tmp_path)
    again = qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, again(IDS).logits)
    assert not any(p.requires_grad for p in again.parameters())


def test_dropout_acts_on_experts_in_training_only(random_mixtral):
    model = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.5))
    model.train()
    with torch.no_grad():
        torch.manual_seed(0)
        one = model(IDS).logits
        assert not torch.equal(one, model(IDS).logits)
        torch.manual_seed(0)
        assert torch.equal(one, model(IDS).logits)
        model.eval()
        assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_gradient_checkpointing_changes_nothing(random_mixtral):
    grads = []
    for reentrant in (None, False, True):
        model = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.3)).train()
        if reentrant is not None:
            activation_checkpointing.enable(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for other in grads[1:]:
        for name, g in grads[0].items():
            torch.testing.assert_close(other[name], g, rtol=1e-5, atol=1e-7)


def test_a_target_that_matches_nothing_is_an_error(random_mixtral):
    model = load_4bit(random_mixtral, dtype="float32")
    config = qlora.lora_config(model, r=4)
    peft_model = qlora.add_lora(model, r=4)
    config.target_modules = {"no_such_projection"}
    with pytest.raises(RuntimeError, match="no_such_projection"):
        qlora.check_adapters(peft_model, config)
    config.target_modules = r".*\.q_proj"  # stock PEFT also takes a pattern
    qlora.check_adapters(peft_model, config)


@pytest.mark.parametrize("targets", ["mlp.experts.", ""])
def test_an_adapter_trained_by_stock_peft_loads_here(random_mixtral, tmp_path, targets):
    """`target_parameters` trained a few steps without this package's wrapper, named in full or by the ending."""
    base = load_4bit(random_mixtral, dtype="float32")
    twin = dequantised_twin(base, random_mixtral)
    torch.manual_seed(0)
    parameters = [f"{targets}{stack}" for stack in reversed(experts.STACKS)]
    stock = get_peft_model(twin, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=parameters)).train()
    optimizer = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        stock(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stock.save_pretrained(str(tmp_path))
    ours = qlora.load_lora(base, tmp_path).eval()
    assert sum(isinstance(m, qlora.ParamWrapper) for m in ours.modules()) == 4, "two stacks in each of two layers"
    with torch.no_grad():
        trained = stock.eval()(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, trained, rtol=1e-4, atol=1e-4)
        with stock.disable_adapter():
            assert (stock(IDS).logits - trained).abs().max() > 0.1, "training must have changed something"


def test_training_dropout_is_kept_beside_the_files(random_mixtral, tmp_path):
    qlora.save_lora(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.3), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    again = qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path, trainable=True)
    stacks = [m for m in again.modules() if isinstance(m, qlora.ParamWrapper) and m._param_ndim == 3]
    assert stacks and all(m.expert_dropout == {"default": 0.3} for m in stacks)
    assert again.peft_config["default"].lora_dropout == 0.3
    asleep = qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path)
    assert asleep.peft_config["default"].lora_dropout == 0.0


def test_each_part_can_be_left_out(random_mixtral):
    parts = {"attention": "self_attn", "experts": ".experts.", "router": ".gate."}
    for left_out in parts:
        model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, **{left_out: False})
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert {part: any(word in n for n in names) for part, word in parts.items()} == {p: p != left_out for p in parts}


def test_two_active_adapters_add_up(random_mixtral, tmp_path):
    """Against stock PEFT, which forms the sum of both products."""
    base = load_4bit(random_mixtral, dtype="float32")
    twin = dequantised_twin(base, random_mixtral)
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        kwargs = {"r": 4 + 2 * seed, "alpha": 8, "dropout": 0.0, "attention": False, "router": False}
        qlora.save_lora(randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), **kwargs), seed), folder)
    models = [qlora.load_lora(base, folders[0]), PeftModel.from_pretrained(twin, str(folders[0]))]
    with torch.no_grad():
        for model in models:
            model.eval().load_adapter(str(folders[1]), "two")
            model.base_model.set_adapter(["default", "two"])
        ours, stock = (model(IDS).logits for model in models)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        models[0].base_model.set_adapter(["default"])
        assert (models[0](IDS).logits - ours).abs().max() > 1e-2


def test_a_second_adapter_may_adapt_experts_that_the_first_did_not(random_mixtral, tmp_path):
    full = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)).eval()
    qlora.save_lora(full, tmp_path)
    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, experts=False, router=False)
    model.load_adapter(str(tmp_path), "two")
    model.set_adapter("two")
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, full(IDS).logits)
    with pytest.raises(ValueError, match="has adapters already"):
        qlora.load_lora(model, tmp_path)


def test_every_adapter_has_its_own_dropout(random_mixtral, tmp_path):
    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.3)
    stacks = [m for m in model.modules() if isinstance(m, qlora.ParamWrapper) and m._param_ndim == 3]

    def second(dropout):
        model.add_adapter("two", dataclasses.replace(model.peft_config["default"], lora_dropout=dropout))
        return {m.expert_dropout["two"] for m in stacks}

    assert second(0.2) == {0.2}
    model.delete_adapter("two")
    assert second(0.0) == {0.0}, "an adapter of the same name is a new one"
    assert {m.expert_dropout["default"] for m in stacks} == {0.3}
    for active in ("default", "two"):
        model.set_adapter(active)
        qlora.save_lora(model, tmp_path / active)
        for place, dropout in ((".", 0.3), ("two", 0.0)):
            kept = json.loads((tmp_path / active / place / qlora.DROPOUT_FILE).read_text())
            assert kept == {"lora_dropout": dropout}, "beside the files of the adapter that it belongs to"


# --------------------------------------------------------------------------------------------------------- the router


def one_router(config, dtype, b):
    """(an adapted router, the place of its logits, A, B, the scaling), with every entry of B ±b."""
    model = qlora.add_lora(random_4bit(config, dtype), r=32, alpha=16, dropout=0.0, attention=False, experts=False)
    (wrapper,) = (m for m in model.modules() if isinstance(m, qlora.ParamWrapper))
    ((_, place),) = router_recorders(model)
    a, factor = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    torch.manual_seed(0)
    with torch.no_grad():
        factor.copy_(torch.randn_like(factor).sign() * b)
    return wrapper, place, a, factor, wrapper.scaling["default"]


ROUTERS = {
    "mixtral": tiny_config(256, hidden=256, layers=1, intermediate=64),
    "olmoe": OlmoeConfig(
        vocab_size=256, hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("b", [1e-4, 50e-4])
def test_little_that_a_router_has_learned_is_not_rounded_away(kind, dtype, autocast, b):
    """A dozen steps move B by 1e-4 each. Beside W, in bf16, 98 % of that would be lost."""
    wrapper, place, a, factor, scaling = one_router(ROUTERS[kind], dtype, b)
    weight = wrapper.get_param().detach().double()
    x = torch.randn(128, 256).to(getattr(torch, dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = wrapper(x)
    logits = out[place]
    assert logits.dtype == torch.float32 and len(out) == 3 and not out[2].is_floating_point()
    wanted = x.double() @ (scaling * factor.double() @ a.double()).T
    change = logits.double() - x.double() @ weight.T
    assert (change - wanted).norm() < 0.05 * wanted.norm()
    assert torch.equal(out[2], logits.topk(2, -1).indices)


def test_a_router_in_float64_stays_there_and_one_in_fp32_has_stock_pefts_bits(random_mixtral):
    plain = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32)
    model = randomise(qlora.add_lora(plain, r=4, alpha=8, dropout=0.0, attention=False, experts=False)).eval()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=["mlp.gate.weight"])
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32), config).eval()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours = model(IDS, output_router_logits=True)
        theirs = stock(IDS, output_router_logits=True)
        assert all(torch.equal(*pair) for pair in zip(ours.router_logits, theirs.router_logits, strict=True))
        plain.set_experts_implementation("eager")  # the usual one knows no float64
        exact = model.double()(IDS, output_router_logits=True)
    for logits, near in zip(exact.router_logits, ours.router_logits, strict=True):
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits.float(), near, rtol=1e-4, atol=1e-5)


def test_a_router_adapted_in_bf16_is_stock_pefts_to_the_rounding(random_mixtral, tmp_path):
    """Router by router, as one that is nearly undecided may send a token elsewhere."""
    ours = qlora.add_lora(load_4bit(random_mixtral, dtype="bfloat16"), r=4, attention=False, experts=False)
    qlora.save_lora(randomise(ours), tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.bfloat16), str(tmp_path))
    x = torch.randn(64, 64).bfloat16()
    for layer in range(2):
        a, b = (m.get_base_model().model.layers[layer].mlp.gate for m in (ours.eval(), stock.eval()))
        with torch.no_grad():
            logits = a(x)[0], b(x)[0]
            assert (logits[0] - logits[1]).norm() < 2 * 2**-8 * logits[0].norm()
            assert (logits[0] - b.get_base_layer()(x)[0]).norm() > 0.1 * logits[0].norm(), "the adapter does something"


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_router_losses_reach_the_adapter_of_a_router_in_bf16(random_mixtral, reentrant):
    """Under the Trainer's autocast, with the gradient of fp32."""
    grads = []
    for dtype in ("float32", "bfloat16"):
        model = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype=dtype), r=4, dropout=0.0), 3).train()
        if reentrant is not None:
            activation_checkpointing.enable(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
        handle = attach_router_losses(model, z_coef=1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = 0 * model(IDS, use_cache=False).logits.float().sum()
        loss.backward()
        handle.verify()
        grads.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if ".layers.0.mlp.gate.lora_" in n]))
    assert grads[0].norm() > 0 and (grads[1] - grads[0]).norm() < 0.1 * grads[0].norm()


# ---------------------------------------------------------------------------------------------------------- merging


def test_peft_itself_refuses_to_merge_into_packed_weights(random_mixtral):
    model = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.0))
    wanted = merging.merge(model, "float32").state_dict()
    for way in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"merging\.merge"):
            way()
    found = merging.merge(model, "float32").state_dict()  # nothing was merged before it refused
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def with_config(folder, dtype="float32", **kwargs):
    model = load_4bit(folder, dtype=dtype)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **kwargs)
    return randomise(qlora.QLoraModel(model, qlora._use_our_layers(config, model))).eval()


def test_what_merging_would_lose_is_refused(random_mixtral):
    embedded = with_config(random_mixtral, target_modules=["embed_tokens", "q_proj"])
    tokens = with_config(random_mixtral, target_modules=["q_proj"], trainable_token_indices=[5])
    disabled, none_active = trained(random_mixtral), trained(random_mixtral)
    none_active.base_model.set_adapter([])
    merged = trained_plain(random_mixtral)
    merged.merge_adapter()
    for model, why in (
        (embedded, "embed_tokens.*not on Embedding"),
        (tokens, "TrainableTokensWrapper cannot be merged"),
        (none_active, "no active adapter"),
        (merged, "merged .* already: load the model again"),
    ):
        with pytest.raises(ValueError, match=why):
            merging.merge(model)
        with pytest.raises(ValueError, match=why):
            merging.merge_4bit(model)
    with disabled.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        merging.merge(disabled)
    assert merging.merge(disabled) is not None, "and enabled again it merges"


def trained_plain(folder):
    return randomise(qlora.add_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), r=4, dropout=0.0))


def test_modules_that_were_trained_whole_are_merged(tmp_path):
    torch.manual_seed(0)
    for tied in (False, True):
        config = tiny_config(256, hidden=64, layers=1, intermediate=64)
        config.tie_word_embeddings = tied
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(tied))
        model = with_config(tmp_path / str(tied), target_modules=["q_proj"], modules_to_save=["lm_head"])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "modules_to_save" in name:
                    p.mul_(3)
            wanted = model(IDS).logits
        if tied:
            with pytest.raises(ValueError, match="one tensor in the plain model"):
                merging.merge(model)
            continue
        with torch.no_grad():
            torch.testing.assert_close(merging.merge(model, "float32")(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
            head = model.get_base_model().lm_head.modules_to_save["default"].weight
            assert torch.equal(merging.merge_4bit(model)[0].lm_head.weight, head)


def test_a_run_in_bf16_is_merged_from_exact_values_and_rounded_once(random_mixtral):
    ours = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="bfloat16"), r=4, alpha=8))
    exact, rounded = (dict(merging.merge(ours, dtype).named_parameters()) for dtype in ("float32", "bfloat16"))
    checked = 0
    for name, module in ours.named_modules():
        if isinstance(module, LoraLayer) and isinstance(getattr(module, "weight", None), Params4bit):
            packed = module.weight
            scales = nf4.block_scales(packed.quant_state)  # NF4 by hand: a code's value times its block's scale
            codes = torch.stack([packed.data.flatten() >> 4, packed.data.flatten() & 15], 1).flatten().long()
            base = (packed.quant_state.code[codes].view(-1, 64) * scales.unsqueeze(1)).view(packed.quant_state.shape)
            a, b = (f["default"].weight.detach() for f in (module.lora_A, module.lora_B))
            wanted = base.double() + module.scaling["default"] * b.double() @ a.double()
            name = name.removeprefix("base_model.model.") + ".weight"
            torch.testing.assert_close(exact[name].double(), wanted, rtol=1e-5, atol=1e-7)
            assert torch.equal(rounded[name], exact[name].bfloat16())
            checked += 1
    assert checked == 2 * 4


def trained(folder, **kwargs):
    return randomise(qlora.add_lora(load_4bit(folder, dtype="float32"), r=4, alpha=8, dropout=0.05, **kwargs)).eval()


def test_merged_in_fp32_it_is_the_same_model(random_mixtral, tmp_path):
    ours = trained(random_mixtral)
    plain = merging.merge(ours, "float32")
    assert type(plain).__name__ == "MixtralForCausalLM" and not hasattr(plain.config, "quantization_config")
    assert not any(isinstance(p, Params4bit) or ".lora_" in n for n, p in plain.named_parameters())
    with torch.no_grad():
        wanted = ours(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        plain.save_pretrained(tmp_path)  # an ordinary checkpoint, read by stock transformers
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_merged_weights_equal_stock_pefts_merge(random_mixtral, tmp_path):
    ours = trained(random_mixtral)
    qlora.save_lora(ours, tmp_path)
    plain = merging.merge(ours, "float32")
    twin = dequantised_twin(load_4bit(random_mixtral, dtype="float32"), random_mixtral)
    stock = PeftModel.from_pretrained(twin, str(tmp_path)).merge_and_unload()
    for name, param in stock.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), param, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_merging_rounds_every_weight_once(random_mixtral, dtype, bits):
    """By at most half a unit in the last place: 2⁻⁸ in bf16 (8 significant bits), 2⁻¹¹ in fp16 (11). The logits follow."""
    ours = trained(random_mixtral)
    exact, merged = merging.merge(ours, "float32"), merging.merge(ours, dtype)
    for name, param in merged.named_parameters():
        assert param.dtype == dtype
        wanted = exact.get_parameter(name)
        assert ((param.float() - wanted).abs() <= 2.0**-bits * wanted.abs() * 1.001 + 2.0**-25).all(), name
    with torch.no_grad():
        logits, unmerged = merged.float()(IDS).logits, ours(IDS).logits
    # of a token at a time: where a router is nearly undecided, rounding can tip it, and that token goes another way
    off = (logits - unmerged).norm(dim=-1) / unmerged.norm(dim=-1)
    assert off.median() < 2.0**-bits * 2 and (off < 0.05).float().mean() > 0.75


def test_merged_into_4_bit_it_is_rounded_again_and_says_how_much(random_mixtral, tmp_path):
    ours = trained(random_mixtral)
    exact = merging.merge(ours, "float32")
    with torch.no_grad():
        wanted = ours(IDS).logits
        with ours.disable_adapter():
            untouched = ours(IDS).logits
    base, rows = merging.merge_4bit(ours)
    assert audit(base).ok and not any(".lora_" in n for n, _ in base.named_parameters())
    assert {r["parameter"].rpartition(".")[2] for r in rows} == {"weight", *experts.STACKS} and len(rows) == 2 * 7
    for row in rows:  # the report, from the weights themselves
        now, should = base.get_parameter(row["parameter"]), exact.get_parameter(row["parameter"])
        if not isinstance(now, Params4bit):
            assert torch.equal(now, should) and row["error"] < 1e-5
            continue
        values = nf4.dequantize_stack(now) if should.ndim == 3 else bnbf.dequantize_4bit(now.data, now.quant_state)
        codes, _ = bnbf.quantize_4bit(should.contiguous(), blocksize=64, quant_type="nf4")
        assert torch.equal(codes, now.data), "the codes are bitsandbytes' of the exact sum"
        assert 0 < (values - should).norm() / should.norm() < 0.12, "NF4 is off by a tenth"
        assert row["error"] * row["change"] == pytest.approx(((values - should).norm() / should.norm()).item(), rel=0.25)
        assert row["kept"] > 0.5
    with torch.no_grad():
        logits = base(IDS).logits
        assert (logits - wanted).norm() < (untouched - wanted).norm(), "most of so large an adapter survives"
        save_4bit(base, tmp_path)
        assert torch.equal(load_4bit(tmp_path, dtype="float32").eval()(IDS).logits, logits)


def test_merging_into_a_stack_that_is_not_packed_takes_every_expert(random_mixtral):
    plain = randomise(qlora.add_lora(AutoModelForCausalLM.from_pretrained(random_mixtral), r=4, alpha=8)).eval()
    with torch.no_grad():
        wanted = plain(IDS).logits
        base, rows = merging.merge_4bit(plain)
        torch.testing.assert_close(base(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(rows) == 2 * 7 and all(row["error"] < 1e-4 for row in rows)


def test_norms_are_those_of_the_adapter_that_is_active(random_mixtral, tmp_path):
    model = trained(random_mixtral)
    qlora.save_lora(model, tmp_path)
    norms = qlora.adapter_norms(model)
    model.load_adapter(str(tmp_path), "other")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".other." in name:
                p.zero_()
    assert qlora.adapter_norms(model) == norms
    model.set_adapter("other")
    assert set(qlora.adapter_norms(model).values()) == {0.0}


def test_an_adapter_file_with_missing_tensors_is_warned_of(random_mixtral, tmp_path):
    from safetensors.torch import load_file, save_file

    qlora.save_lora(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = load_file(file)
    gone = next(k for k in kept if "lora_B" in k and "q_proj" in k)
    save_file({k: v for k, v in kept.items() if k != gone}, file)
    with pytest.warns(UserWarning, match="no values for 1 tensors"):
        qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path)


def two(random_mixtral, tmp_path, one=0.3, other=0.3):
    from peft import LoraConfig

    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=one)
    qlora.save_lora(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=other), tmp_path)
    more = LoraConfig.from_pretrained(str(tmp_path))
    more.lora_dropout = other
    model.add_adapter("second", more)
    model.base_model.set_adapter(["default", "second"])
    return model


def test_two_adapters_with_different_dropout_do_not_train_together(random_mixtral, tmp_path):
    model = two(random_mixtral, tmp_path, 0.3, 0.1)
    ids = torch.arange(3, 23).view(1, 20)
    with pytest.raises(ValueError, match="different dropout"):
        model.train()(ids)
    model.eval()(ids)


def test_two_adapters_keep_their_dropout(random_mixtral, tmp_path):
    model = two(random_mixtral, tmp_path)
    seen = []
    for m in model.modules():
        if experts.is_experts(m):
            m.register_forward_pre_hook(lambda m, _a: seen.append({n: f.dropout for n, f in m.lora_factors.items()}))
    model.train()(torch.arange(3, 23).view(1, 20))
    assert seen and all(s == {"gate_up_proj": 0.3, "down_proj": 0.3} for s in seen)


def test_the_norms_are_root_mean_squares(random_mixtral):
    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".lora_" in n:
                p.fill_(0.5)
    assert set(qlora.adapter_norms(model).values()) == {0.5}


def test_a_second_add_lora_is_refused(random_mixtral):
    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)
    with pytest.raises(ValueError, match="has adapters already"):
        qlora.add_lora(model.get_base_model(), r=4)


def test_merging_keeps_generation_settings_and_quantisation(random_mixtral):
    base = load_4bit(random_mixtral, dtype="float32", double_quant=False)
    base.generation_config.max_new_tokens = 17
    model = qlora.add_lora(base, r=4)
    assert merging.merge(model, "float32").generation_config.max_new_tokens == 17
    merged, _ = merging.merge_4bit(model)
    packed = [p for p in merged.parameters() if isinstance(p, experts.Params4bit)]
    assert packed and not any(p.quant_state.nested for p in packed)


def test_two_adapters_of_a_router_add_up(random_mixtral, tmp_path):
    parts = {"r": 4, "alpha": 8, "dropout": 0.0, "attention": False, "experts": False}
    qlora.save_lora(randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), **parts), 7), tmp_path)
    model = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), **parts), 8).eval()
    model.load_adapter(str(tmp_path), "two")
    with torch.no_grad():
        one = model(IDS).logits
        model.base_model.set_adapter(["default", "two"])
        both = model(IDS).logits
        assert (both - one).abs().max() > 1e-2
        torch.testing.assert_close(both, merging.merge(model, "float32")(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_parameter_that_is_not_there_is_an_error(random_mixtral):
    model = load_4bit(random_mixtral, dtype="float32")
    config = qlora.lora_config(model, r=4)
    peft_model = qlora.add_lora(model, r=4)
    config.target_parameters = ["mlp.experts.no_such_stack"]
    with pytest.raises(RuntimeError, match="no_such_stack"):
        qlora.check_adapters(peft_model, config)


def test_an_adapter_of_another_model_is_refused(random_mixtral, tmp_path):
    qlora.save_lora(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = [*config["target_modules"], "no_such_projection"]
    file.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="no_such_projection"):
        qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path)


@knows_routers
@pytest.mark.parametrize("kind, left_out", [("laguna", 3), ("jamba", 1)])
def test_no_adapter_is_trained_that_stock_peft_would_lose(tmp_path, kind, left_out):
    """Laguna: PEFT renames shared experts' adapters when it loads them. Jamba: the plain model reads dt_proj's weight itself."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny(kind)).save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=f"{left_out} linear layers get no adapter, as stock PEFT would lose it"):
        model = qlora.add_lora(load_4bit(tmp_path / "base", dtype="float32"), r=3, dropout=0.0).eval()
    with torch.no_grad():
        for p in (p for n, p in model.named_parameters() if ".lora_B" in n):
            p.normal_(std=0.05)
    qlora.save_lora(model, tmp_path / "adapter")
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "base")).eval()
    merged = merging.merge(model, "float32")  # the 4-bit weights, so that only the adapter is compared
    base = qlora.add_lora(load_4bit(tmp_path / "base", dtype="float32"), r=3, dropout=0.0).eval()
    plain.load_state_dict(merging.merge(base, "float32").state_dict())
    stock = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    again = qlora.load_lora(load_4bit(tmp_path / "base", dtype="float32"), tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        for other in (stock, again, merged):
            torch.testing.assert_close(other(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_base_or_kind_or_a_damaged_one_is_refused(random_mixtral, tmp_path):
    qlora.save_lora(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=2), tmp_path / "good")
    file, config = (tmp_path / "good" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(file)

    def load():
        return qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path / "good")

    load()
    deeper = {key.replace(".layers.0.", ".layers.9."): value.clone() for key, value in tensors.items() if ".layers.0." in key}
    save_file(tensors | deeper, file)
    with pytest.raises(RuntimeError, match=r"have no place in this model, as .*layers\.9.*another base's adapter"):
        load()
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"adapter_model\.safetensors is cut off or damaged"):
        load()
    file.unlink()
    with pytest.raises(OSError, match=r"holds no adapter_model\.safetensors: an adapter needs both"):
        load()
    save_file(tensors, file)
    facts = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}), encoding="utf-8")
    with pytest.raises(ValueError, match="adapter of the kind IA3; only LoRA"):
        load()
    config.write_text(json.dumps(facts), encoding="utf-8")
    load()
    with pytest.raises(OSError, match=r"there is no folder .*nowhere"):
        qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path / "nowhere")
