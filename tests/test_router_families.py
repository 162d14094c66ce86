"""The router losses on every causal language model of the installed transformers that routes tokens.

Which models those are is asked of the library: a class counts if its modeling file declares `router_logits` to be
recordable. A family that appears with a newer transformers is tested at once, and fails here if its smallest model cannot be
built from SHARED, or if the losses do not fit it: then it needs an entry in SMALL or in REFUSED.
"""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from helpers.router_losses import attach_router_losses, changed_share, load_balancing_loss, router_z_loss, routing
from tests.moe_families import knows_routers

# Which families have a recordable router, and how their classes look, differs from version to version.
pytestmark = knows_routers
Z, B = 0.1, 0.05

SHARED = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_local_experts=8,
    num_experts=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
ONE_GROUP = dict(first_k_dense_replace=1, n_group=1, topk_group=1)
LATENT = dict(
    **ONE_GROUP, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8
)
SPARSE = dict(**LATENT, index_n_heads=2, index_head_dim=16, index_topk=8)
GEMMA = dict(enable_moe_block=True, top_k_experts=2, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8)
SMALL = {  # what a family's smallest routed model needs beside SHARED
    "AXK1ForCausalLM": LATENT,
    "AXK2ForCausalLM": LATENT,
    "BailingHybridForCausalLM": {**ONE_GROUP, "first_k_dense_replace": 0},
    "BeamForCausalLM": dict(**ONE_GROUP, mlp_layer_types=["sparse", "sparse"]),
    "DbrxForCausalLM": dict(
        d_model=32,
        n_heads=4,
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=16, moe_num_experts=8, moe_top_k=2),
    ),
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "DeepseekV32ForCausalLM": SPARSE,
    "DeepseekV4ForCausalLM": dict(mlp_layer_types=["hash_moe", "moe"]),  # the hash router is not learned, nor recorded
    "DogeForCausalLM": dict(is_moe=True, num_experts=16),
    "Dots1ForCausalLM": dict(**ONE_GROUP, n_shared_experts=1),
    "Dots3NoteForCausalLM": LATENT,
    "FlintForCausalLM": dict(mlp_only_layers=[]),
    "Gemma4ForCausalLM": GEMMA,
    "Gemma4ForConditionalGeneration": dict(text_config={**SHARED, **GEMMA}, vision_config=None, audio_config=None),
    "Glm4MoeLiteForCausalLM": LATENT,
    "GlmMoeDsaForCausalLM": SPARSE,
    "GraniteMoeHybridForCausalLM": dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, layer_types=["mamba", "attention"]),
    "HYV4ForCausalLM": SPARSE,
    "KimiLinearForCausalLM": dict(**LATENT, linear_head_dim=8, linear_num_heads=2),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "full_attention"], num_dense_layers=0),
    "LongcatFlashForCausalLM": LATENT,
    "ZayaForCausalLM": dict(num_experts_per_tok=1),
}
REFUSED = {"DogeForCausalLM": "not \\(tokens, experts\\)"}  # product keys: two rows of logits a token, mixed across tokens
NOT_BUILT: dict[str, str] = {}  # class → why no tiny random model of it can be built (none today)


def declares_router_logits(cls: type) -> bool:
    recorded = getattr(cls, "_can_record_outputs", None)
    return isinstance(recorded, dict) and "router_logits" in recorded


def causal_models() -> dict[str, tuple[type, bool]]:
    """Name → (class, does its modeling file declare router logits?) of all causal language models of the library."""
    found = {}
    for _, classes in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for cls in classes if isinstance(classes, tuple) else (classes,):
            own = [c for _, c in inspect.getmembers(importlib.import_module(cls.__module__), inspect.isclass)]
            found[cls.__name__] = cls, any(declares_router_logits(c) for c in own if c.__module__ == cls.__module__)
    return found


CAUSAL = causal_models()
FAMILIES = sorted(name for name, (_, routed) in CAUSAL.items() if routed)
SERVED = [name for name in FAMILIES if name not in REFUSED and name not in NOT_BUILT]


def build(name: str) -> PreTrainedModel:
    """A random model with a few thousand weights, in train mode; the same one each time, its logits large enough to matter."""
    cls = CAUSAL[name][0]
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SHARED, **SMALL.get(name, {})})).train()
    with torch.no_grad():
        for router in recorders(model)[0]:
            for p in (p for p in router.parameters() if p.ndim == 2):
                p.normal_(std=0.5)
    torch.manual_seed(1)  # for the noise of a forward pass
    return model


def recorders(model: nn.Module) -> tuple[list[nn.Module], int]:
    """The routers, and where their logits stand in what they return: read from the library, not with the helper's code."""
    declared = next(m for m in model.modules() if declares_router_logits(type(m)))._can_record_outputs["router_logits"]
    spec = declared[-1] if isinstance(declared, list) else declared  # JetMoE: its attention, then the routers themselves
    return [m for m in model.modules() if isinstance(m, spec.target_class)], spec.index


IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
KEEP = MASK.flatten().bool()
BATCH = dict(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100), use_cache=False)


def plain(name: str):
    """(outputs, raw logits and choices by layer, gradients) of token loss + losses of the recorded logits: plain autograd."""
    model = build(name)
    routers, place = recorders(model)
    logits, chosen = {}, {}

    def record(router, _args, output):
        parts = output if isinstance(output, tuple) else (output,)
        i = routers.index(router)
        logits.setdefault(i, parts[place])
        k = getattr(router, "top_k", 2)
        indices = [p for p in parts if isinstance(p, torch.Tensor) and p.ndim == 2 and p.dtype == torch.int64]
        chosen[i] = indices[0] if indices else logits[i].topk(k).indices
        if name == "ZayaForCausalLM":
            chosen[i] = torch.where(parts[1] == 0, logits[i].shape[1] - 1, chosen[i])

    for i, router in enumerate(routers):
        router.register_forward_hook(record)
        if name.startswith("Gemma4"):  # records probabilities
            router.proj.register_forward_hook(lambda _m, _a, output, i=i: logits.update({i: output}))
    out = model(**BATCH)
    x = [logits[i][KEEP].float() for i in range(len(routers))]
    picked = [chosen[i][KEEP] for i in range(len(routers))]
    z = [torch.logsumexp(v, -1).square().mean() for v in x]
    f = [torch.bincount(c.flatten(), minlength=v.shape[1]) / len(v) for v, c in zip(x, picked, strict=True)]
    b = [v.shape[1] / c.shape[1] * (v.softmax(-1).mean(0) * u).sum() for v, c, u in zip(x, picked, f, strict=True)]
    (out.loss + (Z * sum(z) + B * sum(b)) / len(z)).backward()
    return out, x, picked, z, b, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_most_of_the_library_is_served():
    """Guards the search itself: a rename in transformers must not leave an empty list of tests."""
    known = {"MixtralForCausalLM", "OlmoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"}
    assert known <= set(SERVED) and len(SERVED) >= 40


def test_no_model_routes_without_recording():
    """Else it would be refused as 'not a routed model', which were not true."""
    silent = {}
    for name, (cls, routed) in CAUSAL.items():
        module = importlib.import_module(cls.__module__)
        own = [n for n, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == cls.__module__]
        names = [n for n in own if re.search("Router|Experts|TopK|Topk", n)]
        if names and not routed:
            silent[name] = names
    assert not silent


@pytest.mark.parametrize("name", SERVED)
def test_losses_and_gradients_are_those_of_the_raw_logits(name):
    """By layer, with padding dropped, to fp32 rounding; and the model's own outputs are bit for bit what they were."""
    out, x, picked, z, b, expected = plain(name)
    assert all((v < 0).any() for v in x), "raw logits, not probabilities or scores"
    model = build(name)
    handle = attach_router_losses(model, Z, B)
    assert handle.routers == recorders(model)[0]
    ours = model(**BATCH)
    ours.loss.backward()
    handle.verify()
    layers = handle.layer_metrics()
    torch.testing.assert_close(layers["z"], torch.stack(z).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layers["balance"], torch.stack(b).detach(), rtol=1e-4, atol=1e-5)
    assert layers["tokens"].tolist() == [MASK.sum()] * len(z)
    torch.testing.assert_close(router_z_loss(x).item(), handle.metrics["router/z"], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.logits, out.logits) and torch.equal(ours.loss, out.loss)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for n, g in expected.items():
        assert (found[n] - g).norm() <= 1e-4 * g.norm() + 1e-6, n
    handle.remove()
    if all(torch.equal(c.sort(-1).values, v.topk(c.shape[1]).indices.sort(-1).values) for c, v in zip(picked, x, strict=True)):
        balance = [load_balancing_loss(v, c.shape[1]).item() for v, c in zip(x, picked, strict=True)]
        assert layers["balance"].tolist() == pytest.approx(balance, rel=1e-4)


NOISY = {"PhimoeForCausalLM"}  # draws the experts at random in train mode


@pytest.mark.parametrize("name", [n for n in SERVED if n not in NOISY])
def test_padding_is_found_where_it_stands(name):
    """Each row alone and without padding gives the same first layer: so tokens and mask are in the same order."""
    model = build(name)
    handle = attach_router_losses(model, 0.0)
    model(**BATCH)
    together = handle.layer_metrics()
    handle.reset()
    for row, length in enumerate(MASK.sum(1).tolist()):
        model(input_ids=IDS[row : row + 1, :length], attention_mask=MASK[row : row + 1, :length], use_cache=False)
    alone = handle.layer_metrics()
    for key in ("tokens", "z", "entropy", "max", "load"):
        torch.testing.assert_close(alone[key][0], together[key][0], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", SERVED)
def test_routing_snapshots(name):
    """Sorted choices of the valid tokens; unchanged if nothing changed; the model stays as it was."""
    model = build(name)
    before = routing(model, BATCH)
    assert model.training and before.shape[:2] == (len(recorders(model)[0]), MASK.sum())
    assert changed_share(before, routing(model, BATCH)).tolist() == [0.0] * len(before)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_served_is_refused_with_the_reason(name):
    model = build(name)
    attach_router_losses(model)
    with pytest.raises(ValueError, match=REFUSED[name]):
        model(**BATCH)


def test_encoder_decoder_models_are_refused():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = dict(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, num_experts=4, num_sparse_encoder_layers=1
    )
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes))
    with pytest.raises(ValueError, match="padding masks differ"):
        attach_router_losses(model)
