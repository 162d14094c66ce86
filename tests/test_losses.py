"""The fused loss against the naive one: value, gradient, memory, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import budget, losses
from helpers.budget import LiveBytes
from helpers.data import build_corpus
from helpers.profiles import PROFILES
from helpers.tokens import IGNORED, Collator
from tests.small_runs import STORIES


def case(n=300, hidden=32, words=500, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, hidden, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(words, hidden, generator=g) * 2 / hidden**0.5).to(dtype)
    return h, w, torch.randint(words, (n,), generator=g)


@pytest.mark.parametrize("chunk", [1, 7, 128, 1000, None])
def test_value_and_gradient_are_those_of_float64(chunk):
    h, w, y = case()
    (losses.linear_cross_entropy(h, w, y, chunk) / 7).backward()
    exact = h.detach().double().requires_grad_()
    reference = F.cross_entropy(exact @ w.double().T, y, reduction="sum") / 7
    reference.backward()
    assert abs(losses.linear_cross_entropy(h, w, y, chunk).item() / 7 / reference.item() - 1) < 1e-6
    assert (h.grad.double() - exact.grad).norm() < 2e-6 * exact.grad.norm()
    assert torch.allclose(losses.token_losses(h, w, y, chunk).sum().double() / 7, reference, rtol=1e-6)


def test_the_bf16_loss_is_that_of_fp32_logits():
    h, w, y = case(dtype=torch.bfloat16)
    reference = F.cross_entropy((h @ w.T).float(), y, reduction="sum").item()
    assert abs(losses.linear_cross_entropy(h, w, y).item() / reference - 1) < 1e-5


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has it from 2.13 on")
def test_torchs_own_function_still_adds_up_in_bf16():
    """The reason for not using it. Should this fail on a newer torch, it may be as good: then use it."""
    h, w, y = case(4096, 64, 2000, dtype=torch.bfloat16)
    exact = h.detach().double().requires_grad_()
    reference = F.cross_entropy(exact @ w.double().T, y, reduction="sum")
    reference.backward()

    def errors(function, **options) -> tuple[float, float]:
        h.grad = None
        loss = function(h, w, y, **options)
        loss.backward()
        return abs(loss.item() / reference.item() - 1), ((h.grad.double() - exact.grad).norm() / exact.grad.norm()).item()

    value, gradient = errors(losses.linear_cross_entropy)
    for policy in ("auto", "compact", "accurate"):
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        theirs, their_gradient = errors(F.linear_cross_entropy, reduction="sum", options=options)
        assert theirs > 1e-3 > 100 * value and gradient < 1.5 * their_gradient


def test_huge_logits_stay_finite_and_a_nan_is_not_hidden():
    h, w, y = case()
    assert torch.isfinite(losses.linear_cross_entropy(h * 1e4, w, y))
    h = h.detach().clone()
    h[5, 0] = float("nan")
    assert torch.isnan(losses.linear_cross_entropy(h, w, y))


def test_no_token_is_loss_zero_with_a_gradient():
    h, w, y = case(n=4)
    loss = losses.linear_cross_entropy(h[:0], w, y[:0])
    loss.backward()
    assert loss.item() == 0 and h.grad.abs().sum() == 0 and losses.token_losses(h[:0], w, y[:0]).shape == (0,)


def test_a_trained_head_is_refused():
    h, w, y = case()
    with pytest.raises(ValueError, match="the head is trained itself"):
        losses.linear_cross_entropy(h, w.requires_grad_(), y)


def peaks(h, w, y) -> tuple[int, int]:
    """Bytes of every tensor of loss and logits, forward and backward, that live at one time: the naive way, and ours."""
    found = []
    for function in (
        lambda: F.cross_entropy(F.linear(h, w).float(), y, reduction="sum"),
        lambda: losses.linear_cross_entropy(h, w, y),
    ):
        h.grad = None
        with LiveBytes() as live:
            function().backward()
        found.append(live.peak)
    return tuple(found)


def test_its_memory_is_below_a_tenth_of_the_naive_one():
    """2,048 tokens, a vocabulary of 8,000."""
    naive, ours = peaks(*case(2048, 16, 8000))
    assert naive >= 2 * 2048 * 8000 * 4, "naive: logits and their gradient at least"
    assert ours <= 0.1 * naive


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "tiny"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_on_every_profile_it_is_below_a_tenth(name, share):
    """On the meta device with a GPU's chunks: a micro-batch of which `share` is trained. (tiny's logits are a few megabytes.)"""
    profile = PROFILES[name]
    text = budget.config_of(profile).get_text_config()
    tokens = int(share * profile.micro_batch * profile.context)
    h = torch.zeros(tokens, text.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    w = torch.zeros(text.vocab_size, text.hidden_size, dtype=torch.bfloat16, device="meta")
    y = torch.zeros(tokens, dtype=torch.long, device="meta")
    naive, ours = peaks(h, w, y)
    assert ours <= 0.1 * naive, ours / naive


@pytest.fixture
def batch(tokenizer):
    rows = build_corpus(STORIES[:6], tokenizer, 512).rows[:2]
    return Collator(0)(rows)


def test_a_model_gives_the_loss_of_its_own_logits(random_mixtral, batch):
    model = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32)
    model.requires_grad_(False)
    layer = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    batch["input_ids"] %= model.config.vocab_size
    labels = torch.where(batch["labels"] == IGNORED, IGNORED, batch["labels"] % model.config.vocab_size)
    inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
    assert losses.plain_head(model)
    ours = losses.completion_loss(model, inputs, labels, model)
    ours.backward()
    gradient = layer.grad.clone()
    layer.grad = None
    theirs = model(**inputs, labels=labels, use_cache=False).loss * (labels[:, 1:] != IGNORED).sum()
    theirs.backward()
    assert abs(ours.item() / theirs.item() - 1) < 1e-5
    assert (gradient - layer.grad).norm() < 1e-4 * layer.grad.norm()
    assert model(**inputs, use_cache=False).logits.shape[1] == labels.shape[1], "the hook is gone"


def test_a_head_that_is_not_plain_is_recognised(random_mixtral):
    def model():
        return AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32).requires_grad_(False)

    scaled = model()
    scaled.lm_head.register_forward_hook(lambda _m, _a, out: out / 3)
    trained = model()
    trained.lm_head.weight.requires_grad_()
    biased = model()
    biased.set_output_embeddings(nn.Linear(64, biased.config.vocab_size).requires_grad_(False))
    assert losses.plain_head(model())
    assert not any(map(losses.plain_head, (scaled, trained, biased)))


def test_a_capped_head_is_not_plain_however_small_its_logits(random_mixtral):
    model = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32).requires_grad_(False)
    assert losses.plain_head(model)
    model.config.final_logit_softcapping = 30.0
    assert not losses.plain_head(model)


def test_token_losses_take_states_of_another_precision_than_the_head():
    h, w, y = case()
    found = losses.token_losses(h.detach(), w.bfloat16(), y)
    assert torch.equal(found, losses.token_losses(h.detach().bfloat16(), w.bfloat16(), y))


def test_losses_of_single_tokens_are_fp32_for_a_bf16_head():
    h, w, y = case(dtype=torch.bfloat16)
    wanted = torch.nn.functional.cross_entropy((h @ w.T).float(), y, reduction="none")
    found = losses.token_losses(h, w, y)
    assert found.dtype == torch.float32 and torch.allclose(found, wanted, rtol=1e-5)


def test_every_module_gets_its_own_mode_back(random_mixtral):
    model = AutoModelForCausalLM.from_pretrained(random_mixtral).train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    with losses.evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before and len(set(before)) == 2


def test_a_head_with_a_cap_is_not_plain(random_mixtral):
    model = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32).requires_grad_(False)
    assert losses.plain_head(model)
    hook = model.lm_head.register_forward_hook(lambda _m, _a, out: 0.5 * torch.tanh(out / 0.5))
    assert not losses.plain_head(model)
    hook.remove()
    small = model.lm_head.register_forward_hook(lambda _m, _a, out: out * 1.05)
    assert not losses.plain_head(model)
    small.remove()

    class Other(torch.nn.Linear):
        pass

    model.lm_head.__class__ = Other
    assert not losses.plain_head(model), "who knows what a subclass computes"
