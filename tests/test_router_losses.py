"""Router losses against references that are not ours: float64 closed forms, transformers, and autograd on recorded logits."""

from __future__ import annotations

import copy
import gc
import math
import os
import socket
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, MixtralForCausalLM, OlmoeConfig, Qwen3MoeConfig, TrainerCallback
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from helpers import activation_checkpointing
from helpers.audit import router_modules
from helpers.router_losses import (
    _Routing,
    _weights,
    attach_router_losses,
    changed_share,
    load_balancing_loss,
    router_z_loss,
    routing,
)
from helpers.tiny import tiny_config
from tests import test_router_losses as rl

TOP_K = 2
Z, B = 0.1, 0.05  # coefficients large enough to be seen beside the token loss


# --------------------------------------------------------------------------------------------------- the two formulas


def logits(seed: int, tokens: int, experts: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * scale


def z_by_hand(x: torch.Tensor) -> float:
    """(1/T) Σ_t (log Σ_e exp x_te)², in Python floats."""
    return sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in x.double().tolist()) / len(x)


def balance_by_hand(x: torch.Tensor, k: int) -> float:
    """E/k · Σ_e f_e P_e, with f_e the tokens that chose e, per token, in Python floats."""
    rows, experts = x.double().tolist(), x.shape[1]
    f, p = [0.0] * experts, [0.0] * experts
    for row in rows:
        for e in sorted(range(experts), key=lambda e: -row[e])[:k]:
            f[e] += 1 / len(rows)
        total = sum(math.exp(v) for v in row)
        for e, v in enumerate(row):
            p[e] += math.exp(v) / total / len(rows)
    return experts / k * sum(a * b for a, b in zip(f, p, strict=True))


shapes = st.tuples(st.integers(0, 999), st.integers(1, 12), st.integers(2, 16), st.floats(0.1, 20))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 3))
def test_values_are_the_closed_forms(shape, layers):
    seed, tokens, experts, scale = shape
    x = [logits(seed + i, tokens, experts, scale) for i in range(layers)]
    k = min(TOP_K, experts)
    assert router_z_loss(x).item() == pytest.approx(sum(map(z_by_hand, x)) / layers, rel=2e-5, abs=1e-6)
    assert load_balancing_loss(x, k).item() == pytest.approx(sum(balance_by_hand(v, k) for v in x) / layers, rel=2e-5)


@settings(max_examples=20, deadline=None)
@given(shapes)
def test_z_loss_is_that_of_transformers_switch(shape):
    x = logits(*shape)
    torch.testing.assert_close(router_z_loss(x), router_z_loss_func(x.unsqueeze(0)))


def test_balancing_loss_is_that_of_transformers_over_top_k_for_one_layer():
    x = logits(0, 64, 8)
    mask = (torch.arange(64) < 50).long()[None]
    for m in (None, mask):
        theirs = load_balancing_loss_func((x,), 8, TOP_K, m)
        torch.testing.assert_close(load_balancing_loss(x, TOP_K, m) * TOP_K, theirs)


def test_imbalances_of_layers_do_not_cancel():
    """transformers pools the layers: one that uses experts 0-3 only and one that uses 4-7 only look balanced together."""
    half = torch.cat([torch.zeros(8, 4), torch.full((8, 4), -30.0)], 1)
    half[torch.arange(8), torch.arange(8) % 4] += 1e-3  # ties broken evenly
    half[torch.arange(8), (torch.arange(8) + 1) % 4] += 5e-4
    x = (half, half.flip(1))
    assert load_balancing_loss_func(x, 8, TOP_K).item() == pytest.approx(TOP_K, rel=1e-3)  # "balanced"
    assert load_balancing_loss(x, TOP_K).item() == pytest.approx(2.0, rel=1e-3)  # half of the experts idle in each layer


def test_balance_is_one_and_collapse_is_experts_over_k():
    even = torch.zeros(8, 8)
    for t in range(8):  # each expert is chosen by k tokens, and the mean softmax is flat
        even[t, t], even[t, (t + 1) % 8] = 5.0, 4.0
    assert load_balancing_loss(even, TOP_K).item() == pytest.approx(1.0, rel=1e-5)
    collapsed = torch.zeros(8, 8)
    collapsed[:, :TOP_K] = 50.0
    assert load_balancing_loss(collapsed, TOP_K).item() == pytest.approx(8 / TOP_K, rel=1e-5)
    assert router_z_loss(torch.zeros(5, 8)).item() == pytest.approx(math.log(8) ** 2)


@settings(max_examples=20, deadline=None)
@given(shapes)
def test_z_gradient_is_the_closed_form(shape):
    x = logits(*shape).requires_grad_()
    (grad,) = torch.autograd.grad(router_z_loss(x), x)
    wide = x.detach().double()
    expected = 2 * torch.logsumexp(wide, -1, keepdim=True) * wide.softmax(-1) / len(x)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_balancing_gradient_is_the_finite_difference():
    x = logits(3, 6, 4, 1.0)
    (grad,) = torch.autograd.grad(load_balancing_loss(x.requires_grad_(), TOP_K), x)
    for t, e in ((0, 0), (2, 3), (5, 1)):
        steps = []
        for sign in (1, -1):
            moved = x.detach().double().clone()
            moved[t, e] += sign * 1e-5
            steps.append(balance_by_hand(moved, TOP_K))
        assert grad[t, e].item() == pytest.approx((steps[0] - steps[1]) / 2e-5, abs=1e-5)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_stay_finite(size):
    x = (logits(1, 7, 8) + size).requires_grad_()
    z = router_z_loss(x)
    assert z.item() == pytest.approx(size**2, rel=1e-2)
    loss = z + load_balancing_loss(x, TOP_K)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_logits_in_bf16_are_computed_in_fp32():
    x = logits(2, 9, 8).bfloat16()
    assert router_z_loss(x).dtype == torch.float32
    assert router_z_loss(x).item() == pytest.approx(z_by_hand(x.float()), rel=1e-5)


# fmt: off
FLAXFORMER = torch.tensor([  # jax.random.uniform(jax.random.PRNGKey(0), (2, 6, 4), minval=-5, maxval=5), of the generator of
    -4.2124424, 3.891939, -3.6481273, 1.8849981, 0.32625437, 2.918651, 0.84758997, -4.556842,  # 2023: in jax 0.10 with
    -3.32062, 4.6977115, -0.15439987, 0.44086337, 3.4467149, 4.3436565, -4.7224274, -4.264637,  # jax_threefry_partitionable
    -2.224406, -2.5318158, -1.3832569, 1.1891162, -2.320062, -0.44705987, 4.289819, -0.0066268444,  # switched off
    0.99470854, -0.6992364, 0.25503993, 4.2952085, 3.5937333, -3.2408535, -4.298278, 4.426601,
    0.7669008, 2.6588762, 2.4505413, 4.6051874, 0.23330331, -3.0845237, 0.6262374, -2.9865491,
    0.7595146, -2.1099675, -4.155346, -2.8326452, 2.3771453, 1.004138, -3.1781673, 0.7581556,
]).view(12, 4)
# fmt: on


def test_flaxformers_published_value():
    """google/flaxformer, architectures/moe/routing_test.py, test_router_z_loss: 13.786719 (TPU; jax on a CPU says 13.786717)."""
    assert router_z_loss(FLAXFORMER).item() == pytest.approx(13.786719, abs=4e-6)
    assert z_by_hand(FLAXFORMER) == pytest.approx(13.786719, abs=1e-6)


def test_what_a_coefficient_of_one_is_elsewhere():
    """The table in the module's docstring: the same total loss, with OLMoE's, Megatron's and transformers' formulas."""
    layers, k = [logits(i, 40, 8) for i in range(3)], 2
    squares = [torch.logsumexp(x, -1).square() for x in layers]
    olmoe = sum(v.sum() for v in squares) / (len(layers) * 40 * k)
    megatron = sum(v.mean() for v in squares)
    assert k * olmoe.item() == pytest.approx(router_z_loss(layers).item(), rel=1e-5)
    assert megatron.item() / len(layers) == pytest.approx(router_z_loss(layers).item(), rel=1e-5)
    pooled = load_balancing_loss_func((layers[0],), 8, k)
    assert pooled.item() / k == pytest.approx(load_balancing_loss(layers[0], k).item(), rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_pooled_form_is_transformers(masked):
    layers = [logits(i, 40, 8) for i in range(3)]
    mask = (torch.arange(40) % 5 > 0).long().view(4, 10) if masked else None
    theirs = load_balancing_loss_func(tuple(layers), 8, TOP_K, mask).item()
    assert load_balancing_loss(layers, TOP_K, mask, pooled=True).item() == pytest.approx(theirs, rel=1e-5)
    one = load_balancing_loss(layers[0], TOP_K, mask)
    assert load_balancing_loss(layers[0], TOP_K, mask, pooled=True).item() == pytest.approx(TOP_K * one.item(), rel=1e-6)
    assert theirs < TOP_K * load_balancing_loss(layers, TOP_K, mask).item(), "pooling hides what single layers do"


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 99))
def test_the_written_out_gradient_is_autograds(shape, seed):
    """The attached losses do not use autograd: their gradient and values against the two functions'."""
    _, tokens, experts, scale = shape
    x = logits(seed, tokens, experts, scale).requires_grad_()
    k, mask = min(TOP_K, experts), torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) > 0.3
    (expected,) = torch.autograd.grad(Z * router_z_loss(x, mask) + B * load_balancing_loss(x, k, mask), x)
    routed = _Routing(x, x.topk(k).indices, _weights(mask, x)[0])
    torch.testing.assert_close(routed.gradient(Z, B), expected, rtol=1e-4, atol=1e-6)
    (balance, z, *_), _ = routed.statistics()
    assert z.item() == pytest.approx(router_z_loss(x, mask).item(), rel=1e-4, abs=1e-5)
    assert balance.item() == pytest.approx(load_balancing_loss(x, k, mask).item(), rel=1e-4, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
def test_padding_counts_as_if_it_were_not_there(seed, kept):
    """What Megatron-LM's own test of its masked z-loss asks for, value and gradient; here for the balancing loss too."""
    mask = torch.tensor(kept)
    x = logits(seed, len(kept), 8)
    results = []
    for values, m in ((x.clone(), mask.long()), (x[mask].clone(), None)):
        values.requires_grad_()
        loss = router_z_loss(values, m) + load_balancing_loss(values, TOP_K, m)
        (grad,) = torch.autograd.grad(loss, values)
        results.append((loss, grad))
    (padded, padded_grad), (plain, plain_grad) = results
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(padded_grad[mask], plain_grad)
    assert not padded_grad[~mask].any()


def test_a_batch_of_padding_alone_is_zero_and_not_nan():
    x = logits(0, 4, 8).requires_grad_()
    loss = router_z_loss(x, torch.zeros(2, 2)) + load_balancing_loss(x, TOP_K, torch.zeros(2, 2))
    loss.backward()
    assert loss.item() == 0.0 and not x.grad.any()


def test_reductions_and_refusals():
    x = [logits(i, 5, 8) for i in range(3)]
    torch.testing.assert_close(router_z_loss(x, reduction="sum"), 3 * router_z_loss(x))
    torch.testing.assert_close(load_balancing_loss(x, TOP_K, reduction="sum"), 3 * load_balancing_loss(x, TOP_K))
    with pytest.raises(ValueError, match="output_router_logits"):
        router_z_loss([])
    with pytest.raises(ValueError, match="4 tokens"):
        router_z_loss(x[0], torch.ones(4))


# ----------------------------------------------------------------------------------------------- attached to a model

IDS = torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, 8:] = 0
MASK[2, 3:] = 0
MASK[5, 6:] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def small(kind: str = "mixtral", **kwargs) -> nn.Module:
    """A random model with two layers of 8 experts, fp32, in train mode; its router logits made large enough to matter."""
    torch.manual_seed(0)
    if kind == "mixtral":
        config = tiny_config(128, hidden=64, layers=2, intermediate=64, tie_word_embeddings=False, **kwargs)
        model = MixtralForCausalLM(config)
    else:
        made = {"qwen3": Qwen3MoeConfig, "olmoe": OlmoeConfig}[kind]
        shared = dict(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        moe = dict(num_key_value_heads=2, num_experts=8, num_experts_per_tok=TOP_K, pad_token_id=0, eos_token_id=2)
        extra = dict(moe_intermediate_size=64, head_dim=32) if kind == "qwen3" else {}
        model = AutoModelForCausalLM.from_config(made(**shared, **moe, **extra))
    with torch.no_grad():
        for router in router_modules(model):
            router.weight.mul_(20)
    return model.train()


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    return small()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def reference(model: nn.Module, mask: torch.Tensor | None = MASK, reduction: str = "mean", z=Z, b=B, **batch):
    """(gradients, z, balance) of token loss + losses of the recorded logits: plain autograd, nothing attached."""
    out = model(**{**BATCH, **batch}, output_router_logits=True, use_cache=False)
    ce = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), LABELS[:, 1:].flatten(), ignore_index=-100)
    zs, bs = [], []
    keep = slice(None) if mask is None else mask.reshape(-1).bool()
    for x in out.router_logits:
        x = x[keep].float()
        zs.append(torch.logsumexp(x, -1).square().mean())
        bs.append(load_balancing_loss_func((x,), x.shape[1], TOP_K) / TOP_K)
    layers = 1 if reduction == "sum" else len(zs)
    return gradients(model, ce + (z * sum(zs) + b * sum(bs)) / layers), sum(zs).item() / len(zs), sum(bs).item() / len(bs)


def attached(model: nn.Module, z=Z, b=B, reduction="mean", **batch):
    """(gradients, metrics) of the model's own loss with the losses attached."""
    handle = attach_router_losses(model, z, b, reduction)
    try:
        grads = gradients(model, model(**{**BATCH, **batch}, use_cache=False).loss)
        handle.verify()
        return grads, handle.metrics
    finally:
        handle.remove()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
def test_gradients_and_metrics_with_any_checkpointing(checkpointing):
    """Under reentrant checkpointing a loss on recorded logits is reported but has no gradient; ours has, and is logged once."""
    model = small()
    expected, z, balance = reference(model)
    if checkpointing is not None:
        activation_checkpointing.enable(model, use_reentrant=checkpointing)
        model.enable_input_require_grads()
    handle = attach_router_losses(model, Z, B)
    found = gradients(model, model(**BATCH, use_cache=False).loss)
    handle.verify()
    assert_same(found, expected)
    assert handle.metrics["router/z"] == pytest.approx(z, rel=1e-4)
    assert handle.metrics["router/balance"] == pytest.approx(balance, rel=1e-4)
    assert handle.layer_metrics()["tokens"].tolist() == [MASK.sum()] * 2  # not again in the recomputation
    assert handle.injected == 2


def test_the_losses_matter_in_these_tests(mixtral):
    """Or else the comparisons above would prove nothing."""
    with_losses, _, _ = reference(mixtral)
    without, _, _ = reference(mixtral, z=0.0, b=0.0)
    name = "model.layers.0.mlp.gate.weight"
    assert (with_losses[name] - without[name]).norm() > without[name].norm()


def test_recorded_logits_have_no_gradient_under_reentrant_checkpointing():
    """The trap itself. If this fails, transformers has mended it, and the notebook's text must change."""
    model = small()
    activation_checkpointing.enable(model, use_reentrant=True)
    model.enable_input_require_grads()
    out = model(**BATCH, output_router_logits=True, use_cache=False)
    assert not any(x.requires_grad for x in out.router_logits)


def test_sum_reduction(mixtral):
    expected, _, _ = reference(mixtral, reduction="sum")
    assert_same(attached(mixtral, reduction="sum")[0], expected)


def test_valid_replaces_the_attention_mask(mixtral):
    """Packed batches have no attention mask; `valid` says what is padding."""
    batch = {**BATCH, "attention_mask": None}
    expected, z, _ = reference(mixtral, attention_mask=None)
    handle = attach_router_losses(mixtral, Z, B)
    handle.valid = MASK.bool()
    found = gradients(mixtral, mixtral(**batch, use_cache=False).loss)
    handle.remove()
    assert_same(found, expected)
    assert handle.metrics["router/z"] == pytest.approx(z, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_accumulation_gives_the_gradient_of_one_big_batch(mixtral, steps):
    """With the window's token count the z-loss is exact, although micro-batches hold different numbers of tokens."""
    big, _, _ = reference(mixtral, z=Z, b=0.0)
    token_loss_only, _, _ = reference(mixtral, z=0.0, b=0.0)
    handle = attach_router_losses(mixtral, Z)
    handle.window_tokens = int(MASK.sum())
    mixtral.zero_grad(set_to_none=True)
    for ids, mask in zip(IDS.chunk(steps), MASK.chunk(steps), strict=True):
        # a token loss of 0: what remains is the router's part of the gradient
        (mixtral(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum() * 0).backward()
    handle.remove()
    found = {n: p.grad for n, p in mixtral.named_parameters()}
    expected = {n: big[n] - token_loss_only[n] for n in big}
    assert_same(found, expected)
    assert handle.metrics["router/z"] == pytest.approx(reference(mixtral)[1], rel=1e-4)


def test_accumulation_without_token_counts_divides_by_the_steps(mixtral):
    once = attached(mixtral)[0]
    handle = attach_router_losses(mixtral, Z, B)
    handle.accumulation = 2
    mixtral.zero_grad(set_to_none=True)
    for _ in range(2):
        (mixtral(**BATCH, use_cache=False).loss / 2).backward()
    handle.remove()
    assert_same({n: p.grad for n, p in mixtral.named_parameters()}, once)


def test_loss_scale_of_a_gradient_scaler(mixtral):
    once = attached(mixtral)[0]
    handle = attach_router_losses(mixtral, Z, B)
    handle.loss_scale = 1024.0
    grads = gradients(mixtral, mixtral(**BATCH, use_cache=False).loss * 1024.0)
    handle.remove()
    assert_same({n: g / 1024.0 for n, g in grads.items()}, once)


def test_outputs_are_untouched_and_nothing_stays_behind(mixtral):
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in mixtral.modules())  # noqa: E731
    before, n = mixtral(**BATCH, use_cache=False), hooks()
    handle = attach_router_losses(mixtral, Z, B)
    during = mixtral(**BATCH, use_cache=False)
    assert hooks() > n
    mixtral.eval()
    handle.reset()
    assert torch.equal(mixtral(**BATCH, use_cache=False).logits, before.logits)
    assert handle.metrics == {} and handle.layer_metrics() == {}
    mixtral.train()
    handle.remove()
    assert hooks() == n
    assert torch.equal(during.logits, before.logits) and torch.equal(during.loss, before.loss)


def test_verify_finds_losses_that_do_nothing():
    model = small()
    handle = attach_router_losses(model, Z)
    with pytest.raises(RuntimeError, match="train mode"):
        handle.verify()  # nothing has run
    model.eval()
    model(**BATCH, use_cache=False).loss.backward()
    with pytest.raises(RuntimeError, match="2 of 2 routers never reported"):
        handle.verify()
    model.train()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("lm_head"))
    model(**BATCH, use_cache=False).loss.backward()
    with pytest.raises(RuntimeError, match="no gradient"):
        handle.verify()
    handle.remove()
    attach_router_losses(model, z_coef=0.0).verify()  # switched off is not an error


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("trained", ["lm_head", "model.norm", "nothing"])
def test_a_gradient_that_ends_in_a_frozen_model_is_found(trained, checkpointing):
    """enable_input_require_grads() lets the gradient flow through a model in which it reaches no weight."""
    model = small()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trained))
    if checkpointing is not None:
        activation_checkpointing.enable(model, use_reentrant=checkpointing)
    model.enable_input_require_grads()
    handle = attach_router_losses(model, Z)
    model(**BATCH, use_cache=False).loss.backward()
    assert handle.injected == 2
    with pytest.raises(RuntimeError, match="no gradient"):
        handle.verify()


def test_reentrant_checkpointing_without_input_gradients_is_found():
    """The trap of LoRA under reentrant checkpointing: torch only warns, and nothing is trained."""
    model = small()
    model.model.embed_tokens.requires_grad_(False)
    activation_checkpointing.enable(model, use_reentrant=True)
    model.disable_input_require_grads()  # newer transformers switch them on by themselves, other trainers' wrappers do not
    handle = attach_router_losses(model, Z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**BATCH, use_cache=False).loss.backward()
    with pytest.raises(RuntimeError, match="enable_input_require_grads"):
        handle.verify()


def test_who_never_calls_verify_is_warned_in_the_second_pass():
    model = small()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("lm_head"))
    handle = attach_router_losses(model, Z)
    gradients(model, model(**BATCH, use_cache=False).loss)
    with pytest.warns(RuntimeWarning, match="no gradient"):
        gradients(model, model(**BATCH, use_cache=False).loss)
    handle.remove()
    model.requires_grad_(True)
    handle = attach_router_losses(model, Z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            gradients(model, model(**BATCH, use_cache=False).loss)


def test_the_handle_says_its_coefficients_with_their_reduction(mixtral):
    handle = attach_router_losses(mixtral, 1e-3, 0.02, "sum")
    assert str(handle) == (
        "loss + 0.001 × z-loss + 0.02 × balancing loss (1.0 at balance): mean over valid tokens, sum over 2 layers"
    )
    handle.remove()


def test_passes_without_gradient_neither_count_nor_disturb():
    """Sampling, evaluation or a reference model's pass between a checkpointed forward pass and its backward pass."""
    model = small()
    expected, z, _ = reference(model)
    activation_checkpointing.enable(model, use_reentrant=True)
    model.enable_input_require_grads()
    handle = attach_router_losses(model, Z, B)
    loss = model(**BATCH, use_cache=False).loss
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK.flip(0), use_cache=False)
    model.eval()
    model(input_ids=IDS[:3], use_cache=False)
    model.train()
    assert_same(gradients(model, loss), expected)
    assert handle.metrics["router/z"] == pytest.approx(z, rel=1e-4)


SHORT = {"input_ids": IDS[:, :7], "attention_mask": MASK[:, :7]}
TWO_PASSES = {
    "masks": [BATCH, {**BATCH, "attention_mask": MASK.flip(0)}],
    "valid": [{"input_ids": IDS, "valid": MASK}, {"input_ids": IDS.flip(1), "valid": MASK.flip(0)}],
    "lengths": [{"input_ids": IDS}, {"input_ids": IDS[:, :7]}],
    "lengths and masks": [BATCH, SHORT],
}


def one_after_the_other(model: nn.Module, batches: list[dict]) -> dict[str, torch.Tensor]:
    """Gradients of the router losses alone over several passes, each with its own backward pass, by plain autograd."""
    total = 0
    for batch in batches:
        mask = batch.get("valid", batch.get("attention_mask"))
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
        logits = model(**inputs, output_router_logits=True, use_cache=False).router_logits
        keep = slice(None) if mask is None else mask.reshape(-1).bool()
        for x in logits:
            x = x[keep].float()
            balance = load_balancing_loss_func((x,), x.shape[1], TOP_K) / TOP_K
            total = total + (Z * torch.logsumexp(x, -1).square().mean() + B * balance) / len(logits)
    return gradients(model, total)


def together(model: nn.Module, batches: list[dict]) -> torch.Tensor:
    """0, with several passes in its graph; `valid` is set as a trainer does it."""
    handle = attach_router_losses(model, Z, B)
    total = 0
    for batch in batches:
        handle.valid = batch.get("valid")
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
        total = total + model(**inputs, use_cache=False).logits.sum() * 0
    return total


@pytest.mark.filterwarnings("ignore:.*if no backward pass has run yet")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TWO_PASSES)
def test_several_passes_before_one_backward_keep_their_own_tokens(kind, checkpointing):
    """Preference training does so. Layers are recomputed when all passes have run, and the last one's mask is the wrong one."""
    model = small()
    expected = one_after_the_other(model, TWO_PASSES[kind])
    if checkpointing:
        activation_checkpointing.enable(model)
        model.enable_input_require_grads()
    found = gradients(model, together(model, TWO_PASSES[kind]))
    assert_same({n: found[n] for n in expected}, expected)
    assert expected["model.layers.0.mlp.gate.weight"].norm() > 0.1


@pytest.mark.filterwarnings("ignore:.*if no backward pass has run yet")
@pytest.mark.parametrize("kind", TWO_PASSES)
def test_reentrant_checkpointing_of_several_passes_is_refused(kind):
    """There the whole graph of a layer is made again in backward, and nothing says in which pass it was."""
    model = small()
    expected = one_after_the_other(model, TWO_PASSES[kind][:1])
    activation_checkpointing.enable(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=r"several forward passes before one backward.*use_reentrant=False"):
        together(model, TWO_PASSES[kind]).backward()
    with pytest.warns(RuntimeWarning, match="replaced"):
        once = together(model, TWO_PASSES[kind][:1])
    found = gradients(model, once)
    assert_same({n: found[n] for n in expected}, expected)


@pytest.mark.parametrize("train", [True, False])
def test_a_pass_that_ctrl_c_cut_off_leaves_nothing_behind(train):
    """KeyboardInterrupt skips forward hooks. In generation, the losses would stay switched off for good."""
    model = small()
    expected, z, _ = reference(model)
    handle = attach_router_losses(model, Z, B)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.set_grad_enabled(train):
        model.train(train)(input_ids=IDS[:, :5], attention_mask=MASK[:, :5], use_cache=False)
    hook.remove()
    handle.reset()
    assert_same(gradients(model, model.train()(**BATCH, use_cache=False).loss), expected)
    assert handle.metrics["router/z"] == pytest.approx(z, rel=1e-4)


def test_attaching_again_replaces_what_was_attached():
    """As when a notebook's cell is run twice, on the model or on what is wrapped around it; the losses count once."""
    model = small()
    expected, z, _ = reference(model)
    attach_router_losses(model, 5.0, 5.0)
    with pytest.warns(RuntimeWarning, match="had router losses already .*5 × z-loss.*replaced"):
        handle = attach_router_losses(model.model, Z, B)
    assert_same(gradients(model, model(**BATCH, use_cache=False).loss), expected)
    assert handle.metrics["router/z"] == pytest.approx(z, rel=1e-4) and handle.injected == 2
    copied = copy.deepcopy(model)
    with pytest.warns(RuntimeWarning, match="replaced"):
        handle = attach_router_losses(copied, Z, B)
    assert_same(gradients(copied, copied(**BATCH, use_cache=False).loss), expected)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_router_losses(copied, Z, B)  # taken off by hand before: nothing to warn of


def test_an_attached_model_is_not_kept_alive():
    model = small()
    attach_router_losses(model, Z)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_copies_of_a_router_are_not_taken_for_it(mixtral):
    """nn.DataParallel runs shallow copies, in threads; a deep copy of the model has its own handle."""
    handle = attach_router_losses(mixtral, Z)
    router = router_modules(mixtral)[0]
    with pytest.raises(RuntimeError, match="is a copy"):
        copy.copy(router)(torch.zeros(3, 64))
    copied = copy.deepcopy(mixtral)
    copied(**BATCH, use_cache=False).loss.backward()
    assert handle.metrics == {} and handle.injected == 0
    handle.remove()


@pytest.mark.parametrize("train", [False, True])
def test_generation_is_untouched(mixtral, train):
    wanted = mixtral.eval().generate(IDS[1:3, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    handle = attach_router_losses(mixtral.train(train), Z, B)
    found = mixtral.generate(IDS[1:3, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    mixtral.train()
    handle.remove()
    assert torch.equal(found, wanted) and handle.metrics == {} and handle.injected == 0


# ------------------------------------------------------------------------------------- precision, compilers, trainers


def test_autocast_to_bf16(mixtral):
    """Losses in fp32 of the bf16 logits; gradients to the rounding of a bf16 backward pass."""
    with torch.autocast("cpu", torch.bfloat16):
        out = mixtral(**BATCH, output_router_logits=True, use_cache=False)
        assert out.router_logits[0].dtype == torch.bfloat16
        x = [v[MASK.flatten().bool()] for v in out.router_logits]
        balance = sum(load_balancing_loss(v, TOP_K) for v in x) / len(x)
        expected = gradients(mixtral, out.loss + Z * router_z_loss(x) + B * balance)
        handle = attach_router_losses(mixtral, Z, B)
        loss = mixtral(**BATCH, use_cache=False).loss
    found = gradients(mixtral, loss)
    handle.remove()
    assert handle.metrics["router/z"] == pytest.approx(router_z_loss(x).item(), rel=1e-5)
    assert handle.metrics["router/balance"] == pytest.approx(balance.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert (found[name] - g).norm() <= 0.02 * g.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_torch_compile(backend):
    """Code that was compiled before attaching has no hooks in it, and torch does not check: attaching throws it away."""
    model = small()
    expected, without = reference(model)[0], reference(model, z=0.0, b=0.0)[0]
    model.compile(backend=backend)

    def step():
        return gradients(model, model(**BATCH, use_cache=False).loss)

    assert_same(step(), without)
    handle = attach_router_losses(model, Z, B)
    assert_same(step(), expected)
    handle.verify()
    assert_same(step(), expected)
    assert handle.layer_metrics()["tokens"].tolist() == [2 * MASK.sum()] * 2
    handle.remove()
    assert_same(step(), without)
    assert handle.injected == 4


class Catch(TrainerCallback):
    """The gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")  # TRL's own
@pytest.mark.parametrize("accumulation", [1, 8])
def test_under_trls_sft_trainer(accumulation, tmp_path, tokenizer):
    """TRL goes around the model's forward. Its step with the losses, minus its step without, is the losses' gradient."""
    pytest.importorskip("trl", reason="TRL is not installed: it wants newer packages than constraints-oldest.txt")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def one_step(z: float, b: float) -> dict[str, torch.Tensor]:
        model, catch = small(), Catch()
        handle = attach_router_losses(model, z, b)
        handle.accumulation = accumulation
        args = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            router_aux_loss_coef=0.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
        )
        rows = Dataset.from_list([{"input_ids": row} for row in IDS.tolist()])
        trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[catch])
        trainer.train()
        handle.verify()
        return catch.gradients

    model = small()
    losses = []
    for ids in IDS.chunk(accumulation):
        x = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
        losses.append(Z * router_z_loss(x) + B * load_balancing_loss(x, TOP_K))
    expected = gradients(model, sum(losses) / accumulation)
    found, without = one_step(Z, B), one_step(0.0, 0.0)
    assert_same({n: found[n] - without[n] for n in expected}, expected)


def course_step(folder: str, processes: int) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step of CourseTrainer over eight rows of different lengths, as one process sees them."""
    from transformers import TrainingArguments

    from helpers.tokens import Collator
    from helpers.training import CourseTrainer

    lengths = [12, 5, 9, 3, 12, 7, 4, 10]
    rows = [
        {"input_ids": ids[:n], "labels": ids[:n], "position_ids": list(range(n))}
        for ids, n in zip(IDS.tolist(), lengths, strict=True)
    ]
    model, catch = small(), Catch()
    handle = attach_router_losses(model, Z)
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = CourseTrainer(
        model=model, args=args, train_dataset=rows, data_collator=Collator(0), callbacks=[catch], router_losses=handle
    )
    trainer.train()
    handle.verify()
    return catch.gradients


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    """accelerate with gloo on CPU: tokens are counted over all processes, and DistributedDataParallel's mean is undone."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_router_losses", str(tmp_path)]
    workers = [
        subprocess.Popen(
            command,
            env={**env, "RANK": rank, "LOCAL_RANK": rank},
            cwd=Path(__file__).resolve().parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        one = course_step(str(tmp_path / "one"), 1)
        outputs = [w.communicate(timeout=240)[0] for w in workers]
    finally:
        for w in workers:
            w.kill()
    assert [w.returncode for w in workers] == [0, 0], "\n".join(outputs)
    for rank in "01":
        assert_same(torch.load(tmp_path / f"{rank}.pt"), one)


# ------------------------------------------------------------------------------------------ has the routing changed since?


def test_the_share_of_changed_tokens_is_a_count(mixtral):
    """Against recorded logits and Python sets, after a step that really moves routers."""
    model = small()
    recorded, snapshots = [], []
    for _ in range(2):
        with torch.no_grad():
            x = model.eval()(**BATCH, output_router_logits=True, use_cache=False).router_logits
        model.train()
        recorded.append([[set(t.topk(TOP_K).indices.tolist()) for t in v[MASK.flatten().bool()]] for v in x])
        snapshots.append(routing(model, BATCH))
        with torch.no_grad():
            for router in router_modules(model):
                router.weight.add_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    counted = [sum(a != b for a, b in zip(*layer, strict=True)) / len(layer[0]) for layer in zip(*recorded, strict=True)]
    assert changed_share(*snapshots).tolist() == pytest.approx(counted)
    assert 0.05 < counted[0] < 0.95 and model.training
    assert not changed_share(snapshots[0], snapshots[0].clone()).any()


def test_snapshots_take_packed_batches_and_leave_no_trace(mixtral):
    batch = {"input_ids": IDS, "labels": LABELS, "valid": MASK.bool()}
    handle = attach_router_losses(mixtral, Z)
    hooks = [len(m._forward_hooks) for m in mixtral.modules()]
    snapshot = routing(mixtral, batch)
    assert snapshot.shape == (2, MASK.sum(), TOP_K) and handle.metrics == {} and mixtral.training
    assert [len(m._forward_hooks) for m in mixtral.modules()] == hooks
    handle.remove()


def test_a_snapshot_leaves_bitsandbytes_layers_in_train_mode(random_mixtral):
    """In eval mode, on a CPU with AVX512-BF16, they repack their weights in place, and can be trained no more."""
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.bfloat16, quantization_config=quantised).train()
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    before, seen = [m.weight.clone() for m in layers], []
    for module in (*layers, model.model):
        module.register_forward_hook(lambda m, *_: seen.append((type(m).__name__, m.training)))
    routing(model, {"input_ids": IDS})
    assert seen == [("Linear4bit", True)] * len(layers) + [("MixtralModel", False)] and len(layers) == 8
    assert all(torch.equal(a, m.weight) and m.training for a, m in zip(before, layers, strict=True))


def test_frozen_router_still_trains_what_lies_before_it():
    model = small()
    for router in router_modules(model):
        router.requires_grad_(False)
    expected, _, _ = reference(model)
    found, _ = attached(model)
    assert_same(found, expected)
    assert not any(".gate." in n for n in found)


def test_metrics_are_those_of_the_recorded_logits(mixtral):
    out = mixtral(**BATCH, output_router_logits=True, use_cache=False)
    x = torch.stack([v[MASK.reshape(-1).bool()] for v in out.router_logits]).detach().double()  # (L, T, E)
    handle = attach_router_losses(mixtral, Z)
    for _ in range(2):  # averaging over two equal passes changes nothing
        mixtral(**BATCH, use_cache=False).loss.backward()
    layers = handle.layer_metrics()
    handle.remove()
    p = x.softmax(-1)
    expected = {
        "z": x.logsumexp(-1).square().mean(1),
        "logsumexp": x.logsumexp(-1).mean(1),
        "entropy": -(p * p.log()).sum(-1).mean(1),
        "logsumexp_std": x.logsumexp(-1).std(1, correction=0),
        "tokens": torch.full((2,), 2 * int(MASK.sum())),
        "mean": x.mean((1, 2)),
        "spread": x.std(-1).mean(1),
        "max": x.amax((1, 2)),
        "min": x.amin((1, 2)),
        "load": torch.stack(
            [torch.bincount(v.topk(TOP_K).indices.flatten(), minlength=8) / v.shape[0] / TOP_K for v in x]
        ).double(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(layers[name].double(), value.double(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(layers["load"].sum(1), torch.ones(2))


@pytest.mark.parametrize("kind", ["qwen3", "olmoe"])
def test_other_routed_models(kind):
    model = small(kind)
    expected, z, _ = reference(model)
    found, metrics = attached(model)
    assert_same(found, expected)
    assert metrics["router/z"] == pytest.approx(z, rel=1e-4)


def test_models_without_routers_are_refused():
    with pytest.raises(ValueError, match="no router logits"):
        attach_router_losses(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------------- PEFT


def adapted(router: str, checkpointing: bool | None = None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    more = {"target_parameters": ["mlp.gate.weight"]} if router == "lora" else {"modules_to_save": ["mlp.gate"]}
    model = get_peft_model(small(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **more))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.05)
    if checkpointing is not None:
        activation_checkpointing.enable(model, use_reentrant=checkpointing)
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("router", ["lora", "saved module"])
def test_under_peft(router, checkpointing):
    """A saved module is a copy of the router beside the frozen original, which never runs and must not count as a layer."""
    expected, z, _ = reference(adapted(router))
    found, metrics = attached(adapted(router, checkpointing))
    assert any("gate" in n for n in expected)
    assert_same(found, expected)
    assert metrics["router/z"] == pytest.approx(z, rel=1e-4)


if __name__ == "__main__":  # one of the processes of test_two_processes_give_the_gradient_of_one
    torch.set_num_threads(1)
    torch.save(course_step(sys.argv[1] + "/two", 2), f"{sys.argv[1]}/{os.environ['RANK']}.pt")


def test_a_reduction_that_does_not_exist_is_refused_and_not_taken_for_another(mixtral):
    x = [logits(0, 6, 8)] * 3
    calls = lambda r: router_z_loss(x, reduction=r), lambda r: load_balancing_loss(x, 2, reduction=r)
    for call in (*calls, lambda r: attach_router_losses(mixtral, reduction=r)):
        with pytest.raises(ValueError, match="reduction='men': use one of mean, sum"):
            call("men")


def test_statistics_of_a_single_expert_and_of_padding_alone_are_numbers(mixtral):
    from helpers.router_losses import _Routing

    one = _Routing(torch.randn(5, 1), torch.zeros(5, 1, dtype=torch.long), torch.full((5,), 0.2))
    assert all(t.isfinite().all() for t in one.statistics())
    handle = attach_router_losses(mixtral.train())
    handle.valid = torch.zeros_like(IDS)
    mixtral(input_ids=IDS, use_cache=False)
    assert handle.metrics and all(math.isfinite(v) for v in handle.metrics.values())
    handle.remove()


def test_a_mask_given_by_place_counts_too():
    model = small().model  # without a head: nobody passes the mask on by name
    handle = attach_router_losses(model, Z)
    model(IDS, MASK, use_cache=False).last_hidden_state.sum().backward()
    handle.remove()
    assert handle.layer_metrics()["tokens"].tolist() == [MASK.sum()] * 2


def test_extremes_are_those_of_all_passes_layers_and_real_tokens():
    model = small()
    handle = attach_router_losses(model, Z)
    seen = []
    for k, mask in enumerate((MASK, MASK.flip(0), MASK)):
        ids = IDS.roll(k, 1)
        out = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
        seen.append(torch.stack([x[mask.flatten().bool()] for x in out.router_logits]))
        (out.logits.sum() * 0).backward()
    handle.remove()
    found = handle.layer_metrics()
    highs, lows = (torch.stack([getattr(x, f)((1, 2)) for x in seen]) for f in ("amax", "amin"))
    torch.testing.assert_close(found["max"], highs.amax(0))
    torch.testing.assert_close(found["min"], lows.amin(0))
    assert handle.metrics["router/max"] == pytest.approx(highs.max().item()), "over all layers"
    assert handle.metrics["router/min"] == pytest.approx(lows.min().item())


def test_padding_does_not_count_as_an_extreme():
    model = small()
    handle = attach_router_losses(model, Z)
    one = torch.zeros_like(MASK)
    one[3, 0] = 1  # a single real token: its own extremes, whatever the others' are
    out = model(input_ids=IDS, attention_mask=one, output_router_logits=True, use_cache=False)
    handle.remove()
    x = torch.stack([v[one.flatten().bool()] for v in out.router_logits])
    torch.testing.assert_close(handle.layer_metrics()["max"], x.amax((1, 2)))
    torch.testing.assert_close(handle.layer_metrics()["min"], x.amin((1, 2)))


def test_steps_with_reentrant_checkpointing_follow_each_other():
    model = small()
    batches = [BATCH, {**BATCH, "attention_mask": MASK.flip(0)}]
    expected = [reference(model, mask=b["attention_mask"], **b)[0] for b in batches]
    activation_checkpointing.enable(model, use_reentrant=True)
    model.enable_input_require_grads()
    handle = attach_router_losses(model, Z, B)
    for batch, wanted in zip(batches, expected, strict=True):
        assert_same(gradients(model, model(**batch, use_cache=False).loss), wanted)
    handle.remove()


def test_a_failed_pass_leaves_nothing_running():
    model = small()
    handle = attach_router_losses(model, Z, B)
    with pytest.raises(ValueError):
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("x")))
        model(**BATCH, use_cache=False)
    hook.remove()
    assert handle._running == [] and handle._pass is None


def test_a_mask_of_four_dimensions_says_nothing_of_padding():
    model = rl.small()
    handle = attach_router_losses(model, 0.1)
    causal = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1).expand(8, 1, 12, 12)
    model(input_ids=rl.IDS, attention_mask=causal, use_cache=False).logits.sum().backward()
    handle.remove()
    assert handle.layer_metrics()["tokens"].tolist() == [96, 96]
