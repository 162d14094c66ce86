"""A step on the meta device, against a real step on the CPU, and against what the budget calculates."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import activation_checkpointing, budget, expert_pass, nf4, qlora
from helpers.__main__ import main
from helpers.audit import audit
from helpers.profiles import PROFILES
from helpers.quantization import random_4bit
from helpers.rehearsal import SPEEDS, _Kernels, rehearse
from helpers.router_losses import attach_router_losses
from helpers.tiny import tiny_config


def fewer_layers(profile, layers):
    config = budget.config_of(profile)
    return type(config)(**{**config.to_diff_dict(), "num_hidden_layers": layers})


@pytest.mark.parametrize("name, layers", [("t4", 1), ("l4", 1), ("a100-40", 3), ("a100-80", 3)])
def test_the_budget_is_what_the_real_code_needs_at_the_real_shapes(name, layers):
    """Within a tenth, and never below: it must not promise what does not fit."""
    profile = PROFILES[name]
    config = fewer_layers(profile, layers)
    found = rehearse(profile, config=config)
    model = budget.describe(config, profile.dtype, r=profile.lora_r)
    guess = budget.estimate(model, found.rows, found.tokens, True, profile.lora_dropout)
    assert 1.0 <= guess.peak / found.peak < 1.1
    assert found.weights == model.weights + 4 * model.adapters and found.gradients == 12 * model.adapters
    assert 0.95 < (guess.parts["kept"] + guess.parts["layer"]) / found.activations < 1.15, "weights alone must not carry it"


class LargestInMemory(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes in real memory."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        real = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_meta]
        self.bytes = max(self.bytes, *real, 0)
        return out


def test_it_takes_no_memory():
    """Adapters neither: PEFT would draw them on the CPU, which for Mixtral takes a gigabyte."""
    with LargestInMemory() as largest:
        rehearse(PROFILES["a100-80"], 1, 512, fewer_layers(PROFILES["a100-80"], 1))
    assert 0 < largest.bytes < 100_000, "code books and the like"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_counts_what_a_real_step_on_a_cpu_takes(checkpointing):
    """The same model with numbers in it, with experts unpacked and grouped as on a GPU; what differs is the attention."""
    config = tiny_config(2048, 256, 4, 448)
    changes = {"dtype": "float32", "lora_dropout": 0.05, "gradient_checkpointing": checkpointing, "lora_router": True}
    profile = dataclasses.replace(PROFILES["tiny"], **changes)
    rows, tokens = 2, 512
    torch.manual_seed(0)
    model = qlora.add_lora(random_4bit(config, "float32"), profile.lora_r, profile.lora_alpha, 0.05).train()
    attach_router_losses(model, 1e-3, 1e-3)
    if checkpointing:
        activation_checkpointing.enable(model)
        model.enable_input_require_grads()
    ids = torch.randint(3, 2048, (rows, tokens))

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    as_on_a_gpu = patch.dict(nf4.PIECE, {"cpu": 2**40}), patch.dict(expert_pass.GROUP, {"cpu": expert_pass.GROUP["cuda"]})
    with as_on_a_gpu[0], as_on_a_gpu[1]:
        step()
        with budget.LiveBytes() as live:
            step()
    logits = rows * tokens * 2048 * 4
    found = rehearse(profile, rows, tokens, config)
    assert found.weights == sum(part.bytes for part in audit(model).parts.values())
    # the model's own loss holds whole logits, after which nothing else is alive: they must not decide the comparison
    assert live.peak > 3 * logits and 0.85 < found.activations / live.peak < 1.15


@pytest.mark.parametrize("name, layers, document", [("l4", 1, 4096), ("a100-80", 2, 10240)])
def test_the_work_is_that_of_the_shapes(name, layers, document):
    """FLOPs against a closed form; and no GPU is faster than its products alone, or than its memory."""
    profile = PROFILES[name]
    config = fewer_layers(profile, layers)
    found = rehearse(profile, config=config)
    h, i, k, e = config.hidden_size, config.intermediate_size, config.num_experts_per_tok, experts_of(config)
    heads, r = config.num_attention_heads, profile.lora_r
    kv, q = config.num_key_value_heads * (h // heads), h
    attention, router = 2 * h * q + 2 * h * kv, h * e
    attention_lora = r * (2 * (h + q) + 2 * (h + kv)) + r * (h + e)
    up, down, up_lora, down_lora = k * 2 * h * i, k * h * i, k * r * (h + 2 * i), k * r * (i + h)
    # forward, again for the backward pass (down not), the gradient of the input; adapters have one of their weights, too
    frozen = 6 * (attention + router + up) + 4 * down
    lora = 8 * (attention_lora + up_lora) + 6 * down_lora
    scores = 2 * document * q * (1 + 1 + 2.5)  # half of the pairs; backward has five products instead of two
    head = 4 * h * config.vocab_size
    wanted = found.rows * found.tokens * (layers * (frozen + lora + scores) + head)
    assert found.flops == pytest.approx(wanted, rel=0.01)
    for gpu, (multiplied, moved) in SPEEDS.items():
        bytes_moved = sum(times * kernel.bytes for kernel, times in found.kernels.items())
        assert max(found.flops / multiplied, bytes_moved / moved) <= found.least_seconds(gpu)
        assert found.least_seconds(gpu) <= found.flops / multiplied + bytes_moved / moved
        shares = found.shares(gpu)
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    # which product is which
    kinds = {kind: sum(t * k.flops for k, t in found.kernels.items() if k.kind == kind) for kind in shares}
    # a router's factors are multiplied out, so it has a gradient as large as itself; with few experts it is as thin as a factor
    thin_router, wide_router = (8 * router, 0) if e <= r else (0, 8 * router)
    # the experts' backward pass makes what A makes of its input once more
    thin = lora - 8 * r * (h + e) + 2 * k * r * (h + i) + thin_router
    per_token = {"attention": layers * scores, "thin products": layers * thin}
    per_token["matrix products"] = layers * (frozen - 6 * router + wide_router) + head
    for kind, flops in per_token.items():
        assert kinds[kind] == pytest.approx(found.rows * found.tokens * flops, rel=1e-3), kind


def experts_of(config):
    return getattr(config, "num_local_experts", None) or config.num_experts


def test_what_a_kernel_moves():
    """Against counting by hand, on 16-bit tensors of 1000 x 64, beside adapters of rank 32."""
    x, index = torch.empty(1000, 64, dtype=torch.bfloat16, device="meta"), torch.empty(10, dtype=torch.long, device="meta")
    factor = torch.empty(64, 32, dtype=torch.bfloat16, device="meta")
    thin = torch.empty(1000, 32, dtype=torch.bfloat16, device="meta")
    cases = [
        (lambda: x + x, ("the rest", 0, 3 * 128_000 - 128_000)),  # the same tensor twice is read once
        (lambda: x.mul_(2), ("the rest", 0, 2 * 128_000)),
        (lambda: x @ x.T, ("matrix products", 2 * 1000 * 1000 * 64, 128_000 * 2 + 2 * 1_000_000)),
        (lambda: x @ factor, ("thin products", 2 * 1000 * 64 * 32, 128_000 + 4096 + 64_000)),
        (lambda: torch.mm(x, factor, out=thin), ("thin products", 2 * 1000 * 64 * 32, 128_000 + 4096 + 64_000)),
        (lambda: thin.addmm_(x, factor, beta=0), ("thin products", 2 * 1000 * 64 * 32, 128_000 + 4096 + 64_000)),
        (lambda: thin.addmm_(x, factor), ("thin products", 2 * 1000 * 64 * 32, 128_000 + 4096 + 2 * 64_000)),
        (lambda: x.unsqueeze(1) @ x.unsqueeze(2), ("the rest", 2 * 64_000, 2 * 128_000 + 2000)),  # sums of products by row
        (lambda: x[index], ("the rest", 0, 2 * 10 * 128)),  # of a table, what is taken out
        (lambda: torch.zeros_like(x), ("the rest", 0, 128_000)),
        (lambda: x.expand(7, 1000, 64).sum(), ("the rest", 0, 128_000 + 2)),  # what is repeated is there once
        (lambda: x.view(64, 1000), None),
        (lambda: torch.empty_like(x), None),
    ]
    for work, wanted in cases:
        with _Kernels(32) as kernels:
            work()
        assert dict(kernels.found) == ({wanted: 1} if wanted else {})


def test_more_rows_take_more_and_nothing_is_left_behind():
    profile, config = PROFILES["a100-80"], fewer_layers(PROFILES["a100-80"], 1)
    one, two, again = (rehearse(profile, rows, 1024, config) for rows in (1, 2, 1))
    assert two.activations > 1.3 * one.activations and two.weights == one.weights and again == one
    assert not torch.is_autocast_enabled("cuda")


def test_what_does_not_fit_together_fails():
    profile, config = PROFILES["a100-80"], fewer_layers(PROFILES["a100-80"], 1)

    def transposed(self, e):
        return self.weight.new_empty(self.columns, self.rows, dtype=self.dtype)

    with patch.object(nf4.Unpacker, "__call__", transposed), pytest.raises(RuntimeError, match=r"reduction dim|shapes"):
        rehearse(profile, 1, 512, config)


def test_the_command_counts_and_compares(capsys):
    assert main(["budget", "--profile", "tiny", "--rehearse", "--context", "256"]) == 0
    shown = capsys.readouterr().out
    assert "rehearsed, 1 x 256 tokens: 0.0" in shown and "estimated: 0.0" in shown
    assert "at least" not in shown, "of fp32 the data sheets say nothing"
