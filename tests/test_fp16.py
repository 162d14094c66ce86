"""The t4 profile's arithmetic (fp16, gradient scaler, checkpointing), which a CPU can do too, against the same step in fp32."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from helpers import activation_checkpointing, losses, training
from helpers.data import build_corpus
from helpers.profiles import PROFILES
from helpers.router_losses import attach_router_losses
from helpers.trainer import SKIPS, NumberedCollator, _Guard
from tests.small_runs import STORIES

TINY = dataclasses.replace(PROFILES["tiny"], lora_router=True, gradient_checkpointing=True)
WINDOW = PROFILES["t4"].tokens_per_step  # what router losses are divided by: small gradients are the first that fp16 loses


@pytest.fixture(scope="module")
def batch(tokenizer):
    return NumberedCollator(0)(build_corpus(STORIES, tokenizer, 512).numbered()[:2])


def gradients(batch, dtype: str, cross_entropy: float, router: float, scale: float = 65536.0):
    """What one micro-batch adds to the gradient of every adapter, unscaled, before the optimizer sees it."""
    model = training.prepare_model(dataclasses.replace(TINY, dtype=dtype)).train()
    activation_checkpointing.enable(model)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # at 0, nothing would reach A
            torch.nn.init.normal_(p, std=0.01, generator=generator)
    half = dtype == "float16"
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}, "a gradient scaler refuses gradients in fp16"
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=half)
    handle = attach_router_losses(model, router, router)
    handle.valid, handle.window_tokens, handle.loss_scale = batch["valid"], WINDOW, scaler.get_scale()
    inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
    with torch.autocast("cpu", torch.float16, enabled=half):
        loss = losses.completion_loss(model, inputs, batch["labels"], model) * cross_entropy / WINDOW
    scaler.scale(loss).backward()
    handle.verify()
    optimizer = torch.optim.AdamW(trained.values())
    if half:
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale, "no overflow: the step was made"
    return torch.cat([p.grad.flatten() for p in trained.values()])


@pytest.mark.parametrize("cross_entropy, router", [(1.0, 0.0), (1.0, 1e-3), (0.0, 1e-3)], ids=["loss", "both", "router losses"])
def test_a_step_in_fp16_has_the_gradient_of_fp32(batch, cross_entropy, router):
    exact, half = (gradients(batch, dtype, cross_entropy, router) for dtype in ("float32", "float16"))
    assert exact.norm() > 0 and (half - exact).norm() < 0.01 * exact.norm()


def test_without_the_scale_fp16_loses_the_router_losses(batch):
    """They are the smallest gradients of the recipe: what the handle's `loss_scale` is for."""
    exact, half = (gradients(batch, dtype, 0.0, 1e-3, scale=1.0) for dtype in ("float32", "float16"))
    assert (half - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("fp16", [True, False])
def test_steps_are_skipped_for_a_while_and_not_for_ever(fp16):
    """The scaler's first steps often overflow; a run that skips every step would end without having learned anything."""
    row = {"stories": ["a story"]}
    trainer = SimpleNamespace(window=[(torch.tensor(1.0), torch.tensor([0]))], train_dataset=[row])
    trainer.router_losses = SimpleNamespace(verify=lambda: None)
    model = torch.nn.Linear(2, 1)
    guard = _Guard(trainer)

    def steps(number, gradient):
        for _ in range(number):
            model.weight.grad = torch.full((1, 2), gradient)
            guard.on_pre_optimizer_step(
                SimpleNamespace(fp16=fp16, world_size=1), SimpleNamespace(global_step=6), None, model=model
            )

    if fp16:
        steps(SKIPS - 1, float("inf"))
        steps(1, 1.0)
        steps(SKIPS - 1, float("nan"))
    with pytest.raises(FloatingPointError, match=r"a gradient is not finite at step 7.*row 0 \(a story\)") as caught:
        steps(1, float("inf"))
    assert ("for the 20th time in a row" in str(caught.value)) == fp16
