"""The profile of a step: its parts add up to it, with and without gradient checkpointing, and its bytes are those held."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers import activation_checkpointing, step_profile, training
from helpers.data import build_corpus
from helpers.tokens import Collator
from tests import small_runs
from tests.small_runs import STORIES, small_profile


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_runs.make_base(tmp_path_factory.mktemp("base"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def batch(base, tokenizer):
    return Collator(0)(build_corpus(STORIES, tokenizer, 512).rows[:1])


def prepared(base, checkpointing: bool | None):
    """None: no checkpointing; else whether it is the reentrant kind."""
    model = training.prepare_model(small_profile(base, gradient_checkpointing=checkpointing is not None))
    if checkpointing is not None:
        activation_checkpointing.enable(model, use_reentrant=checkpointing)
    return model


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
def test_each_moment_counts_for_one_part(base, batch, checkpointing, monkeypatch):
    """With a clock that goes on by one each time it is asked: all of its ticks between the phases' borders are in the table."""
    model, ticks = prepared(base, checkpointing), itertools.count()
    monkeypatch.setattr(step_profile._Clock, "now", staticmethod(lambda: next(ticks)))
    calls = {"attention": [], "experts": [], "router": []}
    for module, part in step_profile._parts(model).items():
        module.register_forward_pre_hook(lambda *_, part=part: calls[part].append(torch._C._current_graph_task_id() != -1))
    clock = step_profile._Clock(model)
    step_profile._step(model.train(), batch, clock)
    clock.remove()
    seconds = clock.seconds
    asked = next(ticks)
    assert sum(sum(p.values()) for p in seconds.values()) == asked - 1 - 3, "all but the begin, and what is between two phases"
    for part, again in calls.items():
        assert again.count(False) == 3 and again.count(True) == (0 if checkpointing is None else 3)
        # From pre-hook to hook it is one tick, but for what is inside: nothing. Recomputed, it is none of the forward pass.
        assert seconds[part]["forward"] == 3, part
        assert seconds[part]["backward"] >= again.count(True) + 3, part
    assert seconds[step_profile.REST]["forward"] > 0 and seconds[step_profile.REST]["backward"] > 0


def test_the_time_of_a_recomputed_part_is_its_own_backward(base, batch):
    """Slow attention: its second forward pass is neither of the forward pass nor of the experts, whose backward it begins in."""
    model = prepared(base, False)
    slow = [m for m, part in step_profile._parts(model).items() if part == "attention"]

    def wait(*_):
        end = step_profile._Clock.now() + 0.2
        while step_profile._Clock.now() < end:
            pass

    clock = step_profile._Clock(model)
    for module in slow:  # behind the clock's own hook
        module.register_forward_pre_hook(wait)
    step_profile._step(model.train(), batch, clock)
    seconds = clock.seconds
    assert all(seconds["attention"][kind] >= 0.6 for kind in ("forward", "backward"))
    others = [seconds[part][kind] for part in seconds if part != "attention" for kind in ("forward", "backward")]
    assert max(others) < 0.6


def test_frozen_weights_have_their_scales(base, batch):
    """Against the tensors that a checkpoint would hold: packed weights, block scales, their second-level scales, code books."""
    model = prepared(base, None)
    held = {}
    for name, tensor in model.state_dict().items():
        if "lora_" not in name and "quant_state" not in name:  # that one is text
            held[tensor.data_ptr()] = tensor.nbytes
    packed = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    found = step_profile.profile_step(model, batch, repeats=1)["mib"]
    assert found["frozen weights"] * 2**20 == pytest.approx(sum(held.values()), rel=2e-3) and sum(held.values()) > 1.01 * packed
    assert found["adapters"] * 2**20 == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_a_head_that_is_more_than_a_product_is_refused(base):
    model = training.prepare_model(small_profile(base))
    model.get_output_embeddings().register_forward_hook(lambda _module, _given, out: out / 3)
    with pytest.raises(ValueError, match="head is more than a product"):
        step_profile.profile_step(model, {})
