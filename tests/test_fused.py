"""The Triton kernels, run by Triton's interpreter, against their formulas in float64; and when they are used.

`pip install triton` (Linux) is all they need. Without it the tests of the kernels themselves are skipped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import experts_gpu
from helpers import activation_checkpointing, budget, expert_pass, experts, fused, losses, nf4, qlora
from helpers.__main__ import main
from helpers.attention import DOCUMENTS
from helpers.nf4 import Unpacker, dequantize_stack, quantize_stack
from helpers.profiles import PROFILES
from helpers.quantization import random_4bit
from helpers.rehearsal import rehearse
from helpers.router_losses import attach_router_losses
from helpers.tiny import tiny_config
from tests.test_attention import compiler_problem

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed (pip install triton, on Linux)")
GPU = torch.cuda.is_available()
HERE = "cuda" if GPU else "cpu"
# the interpreter's tl.dot does not know bf16, which numpy lacks
KINDS = [(torch.float32, 1e-6), (torch.float16, 2e-3)] + ([(torch.bfloat16, 1.5e-2)] if GPU else [])
each_dtype = pytest.mark.parametrize("dtype, tolerance", KINDS)
SIZES = [(1, 64, 3), (37, 192, 8), (300, 320, 32)]  # rows, width, rank: less than a tile, and tiles that are not full


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(HERE, dtype)


def close(found, wanted, tolerance):
    assert found.isfinite().all()
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def empty(*shape, dtype=torch.float32):
    """What is not written is seen."""
    return torch.full(shape, float("nan"), device=HERE, dtype=dtype)


def mask(rows: int, width: int, seed: int, dropout: float, first: int = 0) -> torch.Tensor:
    """Which entries of a group's rows dropout keeps, as `thin_product` has it."""
    out = empty(rows, width)
    fused.thin_product(torch.ones(rows, 1, device=HERE), torch.ones(1, width, device=HERE), out, first, seed, dropout)
    return out.double()


# ------------------------------------------------------------------------------------------------ each kernel alone


@needs_triton
@each_dtype
@pytest.mark.parametrize("double", [True, False])
def test_weights_are_unpacked_to_the_bits_of_bitsandbytes(double, dtype, tolerance):
    """Every expert, a piece of one, and several in one go; more blocks than a program takes, and not a multiple of that."""
    stack = quantize_stack(draw(3, 192, 320, dtype=dtype), double_quant=double)
    theirs, ours = (Unpacker(stack, dtype, kernels=on) for on in (False, True))
    for e in range(3):
        assert torch.equal(ours(e), theirs(e)) and ours(e).dtype == dtype
    part = [list(unpack.over([(1, slice(0, 5)), (2, slice(5, 9))])) for unpack in (ours, theirs)]
    for (_, _, [(_, mine)]), (_, _, [(_, other)]) in zip(*part, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(ours._rows(2, ours._scales(2), 7, 29), theirs(2)[7:29])


@needs_triton
def test_the_hash_is_pcg():
    """Against the same numbers in Python's integers: PCG's RXS-M-XS for 32 bits, of a linear congruential step."""

    def pcg(x):
        state = (x * 747796405 + 2891336453) % 2**32
        word = ((state >> ((state >> 28) + 4)) ^ state) * 277803737 % 2**32
        return (word >> 22) ^ word

    def kept(row, column, seed, p):
        return pcg((pcg((pcg(row) + seed) % 2**32) + pcg(column)) % 2**32) >> 8 >= round(p * 2**24)

    for seed in (0, 2**31 - 1):
        found = mask(40, 70, seed, 0.5, first=100)
        assert found.tolist() == [[kept(100 + row, column, seed, 0.5) for column in range(70)] for row in range(40)]


@needs_triton
@each_dtype
@pytest.mark.parametrize("rows, width, rank", SIZES)
def test_the_thin_product(rows, width, rank, dtype, tolerance):
    thin, a, out = draw(rows, rank, dtype=dtype), draw(rank, width, dtype=dtype), empty(rows, width, dtype=dtype)
    fused.thin_product(thin, a, out, 0, 5, 0.25)
    close(out, (thin.double() @ a.double()) * mask(rows, width, 5, 0.25), tolerance)


@needs_triton
@each_dtype
@pytest.mark.parametrize("rows, width, rank", SIZES)
def test_rows_are_taken_and_dropped(rows, width, rank, dtype, tolerance):
    x, token = draw(2 * rows, width, dtype=dtype), torch.arange(rows, device=HERE).flip(0) * 2
    plain, kept, alone = (empty(rows, width, dtype=dtype) for _ in range(3))
    fused.take(x, token, plain, kept, 9, 0.25)
    assert torch.equal(plain, x[token]) and torch.equal(kept.double(), x[token].double() * mask(rows, width, 9, 0.25))
    fused.take(x, token, None, alone, 9, 0.25)
    assert torch.equal(alone, kept)
    fused.take(x, token, alone, None, 9, 0.0)
    assert torch.equal(alone, plain)


def silu_gate(h, thin, b):
    u, v = (h + thin @ b.T).chunk(2, -1)
    return nn.functional.silu(u) * v


@needs_triton
@each_dtype
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("rows, width, rank", SIZES)
def test_the_gate(rows, width, rank, lora, dtype, tolerance):
    h, thin, b = draw(rows, 2 * width, dtype=dtype), draw(rows, rank, dtype=dtype), draw(2 * width, rank, dtype=dtype)
    gated, kept = (empty(rows, width, dtype=dtype) for _ in range(2))
    fused.gate(h, *((thin, b) if lora else (None, None)), gated, kept, 40, 7, 0.25)
    close(gated, silu_gate(h.double(), thin.double() * lora, b.double()), tolerance)
    assert torch.equal(kept.double(), gated.double() * mask(rows, width, 7, 0.25, first=40))
    again = empty(rows, width, dtype=dtype)
    fused.gate(h, *((thin, b) if lora else (None, None)), again, None, 40, 7, 0.0)
    assert torch.equal(again, gated)


@needs_triton
@each_dtype
@pytest.mark.parametrize(
    "first, second, dropout", [(True, True, 0.25), (True, True, 0.0), (False, True, 0.25), (True, False, 0.25)]
)
@pytest.mark.parametrize("rows, width, rank", SIZES)
def test_the_derivative_of_the_gate(rows, width, rank, first, second, dropout, dtype, tolerance):
    """Against autograd in float64. The adapters of the two projections have different ranks."""
    h, g = draw(rows, 2 * width, dtype=dtype), draw(rows, width, dtype=dtype)
    thin1, b = draw(rows, rank, dtype=dtype), draw(2 * width, rank, dtype=dtype)
    thin2, a2 = draw(rows, rank + 1, dtype=dtype), draw(rank + 1, width, dtype=dtype)
    gh, kept, partial = empty(rows, 2 * width, dtype=dtype), empty(rows, width, dtype=dtype), fused.partials(g).fill_(torch.nan)
    one, two = (thin1, b) if first else (None, None), (thin2, a2) if second else (None, None)
    fused.gate_back(h, *one, g, *two, gh, kept if second else None, partial, 3, 11, dropout)
    left = mask(rows, width, 11, dropout, first=3)
    through = h.double().requires_grad_()
    gated = silu_gate(through, thin1.double() * first, b.double())
    ga = g.double() + (thin2.double() @ a2.double()) * left * second
    (wanted,) = torch.autograd.grad(gated, through, ga)
    close(gh, wanted, tolerance)
    assert partial.dtype == torch.float32
    products = ga * gated.detach()
    assert (partial.sum(1).double() - products.sum(1)).abs().max() <= tolerance * products.abs().sum(1).max()
    if second:
        close(kept, gated.detach() * left, tolerance)


@needs_triton
@each_dtype
@pytest.mark.parametrize("tokens, width, k", [(1, 64, 1), (33, 192, 2), (100, 320, 8)])
def test_rows_are_summed_by_token(tokens, width, k, dtype, tolerance):
    rows, weight = draw(tokens * k, width, dtype=dtype), draw(tokens, k, dtype=torch.float32).abs()
    place = torch.randperm(tokens * k, generator=torch.Generator().manual_seed(0)).to(HERE)
    out = empty(tokens, width, dtype=dtype)
    fused.by_token(rows, place, weight, out)
    close(out, (rows[place].double().view(tokens, k, width) * weight.double()[..., None]).sum(1), tolerance)


@needs_triton
def test_what_dropout_keeps_looks_like_chance():
    """The share, and no likeness between rows, columns, seeds or neighbours: correlations of 2^18 entries are below 1 %."""
    p, shape = 0.05, (512, 512)
    one = 1 - mask(*shape, 1, p)  # what is dropped
    assert abs(one.mean().item() - p) < 5 * (p * (1 - p) / one.numel()) ** 0.5
    assert (one.mean(0) - p).abs().max() < 0.06 and (one.mean(1) - p).abs().max() < 0.06, "six standard deviations"

    def likeness(a, b):
        a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
        return abs((a @ b / (a.norm() * b.norm())).item())

    others = [1 - mask(*shape, seed, p) for seed in (0, 2, 3, 2**31 - 1)]  # a projection's seed is the other's and one
    assert all(likeness(one, other) < 0.01 for other in others)
    shifted = [(one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[1:, 1:], one[:-1, :-1]), (one, one.T)]
    assert all(likeness(a, b) < 0.01 for a, b in shifted)
    assert torch.equal(mask(100, 64, 1, p, first=30), 1 - one[30:130, :64]), "a span of a group is a part of its mask"
    assert mask(8, 64, 1, 0.0).all()


# ------------------------------------------------------------------------------------------------- the whole layer


def layer(dtype=torch.float32, rank=8, dropout=0.0, lora=True):
    """An expert layer, and its adapters' factors."""
    config = tiny_config(256, hidden=128, layers=1, intermediate=192)
    model = random_4bit(config, dtype, seed=0)
    model = qlora.add_lora(model, r=rank, alpha=16, dropout=dropout, router=False, experts=lora).to(HERE).train()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.05)
    factors = [p for name, p in model.named_parameters() if p.requires_grad and "experts" in name]
    return model, model.get_base_model().model.layers[0].mlp.experts, factors


def inputs(dtype, tokens=150, seed=2):
    """Routed so that expert 5 has no token and expert 0 has most."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 128, generator=g).to(HERE, dtype).requires_grad_()
    index = torch.stack([torch.tensor([0, [1, 2, 3, 4, 6, 7][t % 6]]) for t in range(tokens)]).to(HERE)
    return x, index, torch.rand(tokens, 2, generator=g).to(HERE, dtype).requires_grad_()


def passed(module, factors, x, index, weight):
    """What comes out, and the gradients."""
    for t in (x, weight, *factors):
        t.grad = None
    torch.manual_seed(3)
    out = module(x, index, weight)
    out.float().square().sum().backward()
    return [t.detach().double() for t in (out, x.grad, weight.grad, *(f.grad for f in factors))]


@pytest.fixture
def on_this_machine(monkeypatch):
    """fp32, too, to see more than rounding."""
    monkeypatch.setattr(fused, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(fused, "DTYPES", (*fused.DTYPES, torch.float32))
    monkeypatch.setitem(nf4.FUSED, HERE, 0)  # a GPU would leave few rows to bitsandbytes' product


@needs_triton
@each_dtype
@pytest.mark.parametrize("rank, lora, grouped", [(8, True, False), (3, True, True), (8, False, False)])
def test_a_layer_is_that_of_torchs_kernels(rank, lora, grouped, dtype, tolerance, on_this_machine, monkeypatch):
    monkeypatch.setitem(expert_pass.GROUP, HERE, 2**26 if grouped else 0)
    model, module, factors = layer(dtype, rank, lora=lora)
    given, calls, gate = inputs(dtype), [], fused.gate
    wanted = passed(module, factors, *given)
    assert fused.fuse(model, compiled=False) == 1
    monkeypatch.setattr(fused, "gate", lambda *args: (calls.append(1), gate(*args)))
    found = passed(module, factors, *given)
    assert calls, "the kernels were used"
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 3 * tolerance)


@needs_triton
@each_dtype
def test_without_a_gradient_few_experts_are_computed_from_their_own_factors(dtype, tolerance, on_this_machine):
    """Then the factors are not laid out anew for all experts, but taken as PEFT keeps them: in fp32, and scattered."""
    model, module, _ = layer(dtype)
    x, index, weight = inputs(dtype)
    index[:, 1] = 3  # two experts of eight
    with torch.no_grad():
        wanted = module(x, index, weight)
        fused.fuse(model, compiled=False)
        found = module(x, index, weight)
    close(found, wanted.double(), 3 * tolerance)


@needs_triton
def test_a_second_backward_pass_gives_the_same(on_this_machine):
    """Also of tensors that were moved away meanwhile, where torch cannot notice that one was changed in place."""
    model, module, factors = layer(dropout=0.25)
    fused.fuse(model, compiled=False)
    x, index, weight = inputs(torch.float32)
    for away in (False, True):
        with torch.autograd.graph.save_on_cpu() if away else contextlib.nullcontext():
            loss = module(x, index, weight).square().sum()
        first, second = (torch.autograd.grad(loss, (x, weight, *factors), retain_graph=True) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@needs_triton
@pytest.mark.parametrize("before", [True, False])
def test_a_backward_pass_goes_as_its_forward_pass_went(before, on_this_machine):
    """Whatever is switched in between: the masks are others, and what was kept is."""
    model, module, factors = layer(dropout=0.25)
    fused.fuse(model, compiled=False)
    stacks, found = next(m for m in model.modules() if experts.is_experts(m)), []
    x, index, weight = inputs(torch.float32)
    for after in (before, not before):
        stacks.fused_kernels = before
        torch.manual_seed(3)
        loss = module(x, index, weight).square().sum()
        stacks.fused_kernels = after
        found.append(torch.autograd.grad(loss, (x, weight, *factors)))
    for a, b in zip(*found, strict=True):
        close(a, b.double(), 1e-6)


@needs_triton
def test_no_token_and_one_expert_a_token(on_this_machine):
    """Routing weights of the best expert are a column of all, with gaps between them."""
    model, module, _ = layer()
    x, index, weight = inputs(torch.float32)
    given = [(x[:0], index[:0], weight[:0]), (x, index[:, :1], weight[:, :1])]
    with torch.no_grad():
        wanted = [module(*each) for each in given]
        fused.fuse(model, compiled=False)
        found = [module(*each) for each in given]
    assert found[0].shape == (0, 128)
    close(found[1], wanted[1].double(), 1e-6)


@needs_triton
def test_a_tensor_with_gaps_is_refused():
    """It would be read as if it had none."""
    with pytest.raises(ValueError, match=r"tensors of the shapes \[\(4, 64\)\] are not contiguous"):
        fused.thin_product(draw(8, 4), draw(64, 4).T, empty(8, 64), 0, 0, 0.0)


@needs_triton
@pytest.mark.parametrize("grouped", [False, True])
def test_dropout_in_a_layer_is_the_same_forward_and_backward(grouped, on_this_machine, monkeypatch):
    """Against autograd in float64 with the masks that the kernels draw: one for each group of experts and projection."""
    monkeypatch.setitem(expert_pass.GROUP, HERE, 2**26 if grouped else 0)
    p, (model, module, factors) = 0.25, layer(dropout=0.25)
    fused.fuse(model, compiled=False)
    x, index, weight = inputs(torch.float32)
    stacks, lora = next(m for m in model.modules() if experts.is_experts(m)), {}
    stacks.register_forward_pre_hook(lambda module, _: lora.update(module.__dict__["lora_factors"]))
    found = passed(module, factors, x, index, weight)
    torch.manual_seed(3)
    seed = int(torch.randint(2**31, ()))
    up, down = (dequantize_stack(getattr(stacks, name)).double() for name in experts.STACKS)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    (a1, b1), (a2, b2) = ([f.detach().double().requires_grad_() for f in (lora[n].A, lora[n].B)] for n in experts.STACKS)
    scale, out = 16 / 8 / (1 - p), torch.zeros_like(leaves[0])
    used = [e for e in range(8) if (index == e).any()]
    first = 0
    for number, e in enumerate(used):
        token, slot = (index == e).nonzero(as_tuple=True)
        group, start = (0, first) if grouped else (number, 0)
        keep = [mask(len(token), width, seed + 2 * group + j, p, start) for j, width in enumerate((128, 192))]
        first += len(token)
        rows = leaves[0][token]
        u, v = (rows @ up[e].T + scale * (rows * keep[0]) @ a1[e].T @ b1[e].T).chunk(2, -1)
        gated = nn.functional.silu(u) * v
        y = gated @ down[e].T + scale * (gated * keep[1]) @ a2[e].T @ b2[e].T
        out = out.index_add(0, token, y * leaves[1][token, slot].unsqueeze(1))
    out.square().sum().backward()
    wanted = {"out": out.detach(), "x": leaves[0].grad, "weight": leaves[1].grad}
    for name, (a, b) in zip(("up", "down"), ((a1, b1), (a2, b2)), strict=True):  # as PEFT lays its factors out
        wanted |= {f"{name} A": a.grad.flatten(0, 1), f"{name} B": b.grad.permute(1, 2, 0).flatten(1)}
    rest = list(found)
    for name, tensor in wanted.items():
        match = next(i for i, t in enumerate(rest) if t.shape == tensor.shape)
        close(rest.pop(match), tensor, 1e-5)
        assert tensor.norm() > 0, name
    assert not rest


# ------------------------------------------------------------------------------------------------------ when, and if not


def test_they_are_an_option(monkeypatch):
    """Neither on by itself, nor on a CPU."""
    model, module, factors = layer()
    monkeypatch.setattr(fused, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(fused, "gate", lambda *_: pytest.fail("not asked for"))
    passed(module, factors, *inputs(torch.float32))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"run on a CUDA GPU, and this model is on cpu: train without them"):
        fused.fuse(model.cpu())


def test_what_they_do_not_know_is_refused(monkeypatch):
    """Ranks whose factors would not fit, fp32, and experts that are not computed by ours."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(fused, "check", lambda: None)
    with pytest.raises(ValueError, match=r"ranks up to 64, not 65: train without them"):
        fused.fuse(layer(torch.bfloat16, rank=65)[0])
    with pytest.raises(ValueError, match=r"compute in bfloat16 or float16, and this model in torch.float32"):
        fused.fuse(layer()[0])
    model, *_ = layer(torch.bfloat16, rank=64)
    assert fused.fuse(model, compiled=False) == 1
    model.get_base_model().set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match="compute 4-bit experts with a SiLU gate, and this model has none"):
        fused.fuse(model)
    model.get_base_model().set_experts_implementation(experts.NAME)
    assert fused.fuse(model, compiled=False) == 1


def test_experts_with_another_gate_are_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral", hidden_act="gelu", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation(experts.NAME)
    with pytest.raises(ValueError, match="4-bit experts with a SiLU gate, and this model has none"):
        fused.fuse(model)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_what_is_missing_is_said(monkeypatch):
    assert fused.problem() == "there is no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    found = fused._problem_of.__wrapped__(0)
    assert found == ("they need a GPU from Ampere on" if TRITON else "Triton is not installed")


def test_a_run_that_asks_for_them_without_a_gpu_is_refused_in_one_sentence(tmp_path, capsys):
    if GPU:
        pytest.skip("there is a GPU")
    command = ["train", "--profile", "tiny", "--fused-kernels", "--max-steps", "1", "--output", str(tmp_path / "run")]
    assert main(command) != 0
    assert capsys.readouterr().err == "error: the fused kernels cannot be used here: there is no CUDA GPU; train without them\n"
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- by counting


def test_the_rehearsal_counts_them():
    """Less memory, fewer kernels and bytes; and the same products, but that what A makes of its input is kept."""
    profile, layers = PROFILES["a100-80"], 2
    config = budget.config_of(profile)
    config = type(config)(**{**config.to_diff_dict(), "num_hidden_layers": layers})
    before, after = (rehearse(profile, config=config, fused_kernels=on) for on in (False, True))
    assert after.activations < before.activations and after.kernels.total() < 0.85 * before.kernels.total()
    moved = [sum(times * kernel.bytes for kernel, times in r.kernels.items()) for r in (before, after)]
    assert moved[1] < 0.8 * moved[0]
    assert after.least_seconds("A100-80") < before.least_seconds("A100-80")
    tokens, k, r, h, i = before.rows * before.tokens, 2, profile.lora_r, config.hidden_size, config.intermediate_size
    spared = layers * 2 * tokens * k * (r * h + i)  # and the sums of products by row are no products any more
    assert before.flops - after.flops == spared


def test_the_budget_command_can_count_them(capsys):
    assert main(["budget", "--profile", "tiny", "--fused-kernels"]) != 0
    assert "--fused-kernels goes with --rehearse" in capsys.readouterr().err


@needs_triton
@pytest.mark.slow
def test_the_benchmark_takes_turns(on_this_machine, tmp_path, monkeypatch):
    """Its case on tiny shapes: three ways at each size, the largest first, and afterwards nothing is left switched on."""
    used, gate = [], fused.gate
    monkeypatch.setattr(fused, "gate", lambda *args: (used.append(1), gate(*args)))
    out = tmp_path / "found.json"
    settings = ["--smoke", "--repeats=1", "--layers=1", "--experts=2", "--tokens", "8", "16", "--device", HERE]
    settings += ["--out", str(out), "--cases", "ceiling", "kernels", "routers"]
    found = experts_gpu.main(settings)["cases"]
    assert not any("error" in case for case in found.values()), found
    for name, ways in (("steps", ["torch", "fused"]), ("compiled", ["fused", "fused, rest compiled"])):
        entries = found["kernels"][name]
        assert [(s["kernels"], s["tokens"]) for s in entries] == [(way, n) for n in (16, 8) for way in ways]
        assert all(s["share_of_ceiling"] > 0 and s["seconds"] > 0 for s in entries)
    assert found["kernels"]["profile"]["tokens"] == 16 and found["kernels"]["profile"]["top"]
    before = len(used)
    experts_gpu.main(["--smoke", "--repeats=1", "--cases", "routers", "--out", str(out)])
    assert before > 0 and len(used) == before


@needs_triton
def test_a_way_that_fails_takes_no_other_with_it(on_this_machine, tmp_path, monkeypatch):
    """Compilers are the riskiest part of a measurement, and come last."""
    real = experts_gpu.Bench.switch

    def switch(stacks, on, stance):
        if stance == "default":
            raise RuntimeError("no compiler")
        real(stacks, on, stance)

    monkeypatch.setattr(experts_gpu.Bench, "switch", staticmethod(switch))
    settings = ["--smoke", "--repeats=1", "--layers=1", "--experts=2", "--tokens", "8", "16", "--device", HERE]
    settings += ["--out", str(tmp_path / "found.json"), "--cases", "kernels"]
    found = experts_gpu.main(settings)["cases"]["kernels"]
    assert [s["kernels"] for s in found["steps"]] == ["torch", "fused"] * 2 and all("seconds" in s for s in found["steps"])
    assert [s["error"] for s in found["compiled"]] == ["RuntimeError: no compiler"] * 2 and "error" not in found


# --------------------------------------------------------------------------------------------------------- compilers


@pytest.mark.slow
def test_compiled_norms_and_attention_change_nothing():
    """Loss and gradients of packed rows, of two shapes, with router losses and recomputation, and the loss without training."""
    need_compiler()
    config, found = tiny_config(256, hidden=64, layers=2, intermediate=64), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = random_4bit(config, "float32", seed=0)
        model.set_attn_implementation(DOCUMENTS)
        model = qlora.add_lora(model, r=4, alpha=16, dropout=0.0).to(HERE).train()
        activation_checkpointing.enable(model)
        model.enable_input_require_grads()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
        if compiled:
            names = [name.rpartition("model.")[2] for name in fused.compile_around_experts(model)]
            own = ("self_attn", "input_layernorm", "post_attention_layernorm")
            assert names == [f"layers.{i}.{part}" for i in range(2) for part in own] + ["norm"]
        handle, numbers = attach_router_losses(model, 1e-3, 1e-3), []
        for rows, row, documents in ((1, 48, 2), (2, 80, 3)):
            ids = torch.randint(3, 256, (rows, row), generator=torch.Generator().manual_seed(row)).to(HERE)
            positions = (torch.arange(row, device=HERE) % -(-row // documents)).expand(rows, row)
            handle.valid, handle.window_tokens = torch.ones_like(ids, dtype=torch.bool), ids.numel()
            inputs = {"input_ids": ids, "position_ids": positions}
            loss = losses.completion_loss(model, inputs, ids, model.get_base_model()) / ids.numel()
            loss.backward()
            numbers += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
            model.zero_grad()
        handle.remove()
        with losses.evaluation_mode(model):
            numbers.append(losses.completion_loss(model, inputs, ids, model.get_base_model()))
        found.append(numbers)
    for a, b in zip(*found, strict=True):
        assert a.norm() > 0 and (a - b).norm() < 1e-5 * a.norm()


def need_compiler():
    if problem := compiler_problem():
        pytest.skip(f"torch.compile does not work here: {problem}")


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from helpers import expert_kernels as kernels

capability, out = int(sys.argv[1]), sys.argv[2]
KINDS = {"codes": "*i32", "scales": "*fp32", "table": "*fp32", "token": "*i64", "place": "*i64", "partial": "*fp32"}
KINDS |= dict.fromkeys(kernels.VARYING, "i32")
RANK = dict.fromkeys(("r", "R", "r1", "R1", "r2", "R2"), int(sys.argv[3]))
FIXED = {"WIDTH": 14336, "PLAIN": True, "DROP": True, "LORA": True, "LORA1": True, "LORA2": True, "K": 2, **RANK}
FIXED |= {"N": kernels.ROWS, "W": kernels.COLUMNS, "STEPS": kernels.STEPS}
for name in ("_unpack", "_take", "_gate", "_gate_back", "_thin_product", "_by_token"):
    kernel = getattr(kernels, name)
    constant = {n: FIXED[n] for n in kernel.arg_names if n in FIXED} | ({"N": kernels.BLOCKS} if name == "_unpack" else {})
    signature = {n: "constexpr" if n in constant else KINDS.get(n, "*bf16") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constant.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})
    open(f"{out}/{name}.ptx", "w").write(made.asm["ptx"])
    open(f"{out}/{name}.cubin", "wb").write(made.asm["cubin"])
    open(f"{out}/{name}.shared", "w").write(str(made.metadata.shared))
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability, rank, shared", [(80, 32, 166_912), (90, 32, 232_448), (89, fused.MOST_RANK, 101_376)])
def test_the_compiler_makes_code_for_an_a100_and_an_h100_and_an_l4(capability, rank, shared, tmp_path):
    """Without a GPU: as far as machine code. Wide loads, products on tensor cores, all values in registers.

    `shared`: bytes of memory on the chip that a program can have there; the largest rank must fit into the least.
    """
    import triton

    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability), str(tmp_path), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    kernels = sorted(tmp_path.glob("*.cubin"))
    assert len(kernels) == 6
    for code in kernels:
        report = subprocess.run([str(reader), "-res-usage", str(code)], capture_output=True, text=True, check=True).stdout
        assert int(code.with_suffix(".shared").read_text()) <= shared
        if rank > 32:
            continue
        assert re.search(r"\bSTACK:0\b", report) and re.search(r"\bLOCAL:0\b", report), f"{code.name} spills: {report}"
        assert int(re.search(r"\bREG:(\d+)", report)[1]) <= 168, "three programs of four warps fit at once"
        text = code.with_suffix(".ptx").read_text()
        wide = code.stem != "_unpack"  # where a thread reads one word of codes, and writes its eight weights
        assert re.search(r"st\.global.*v4", text) and (re.search(r"ld\.global.*v4", text) or not wide)
        assert ("mma" in text) == (code.stem in ("_gate", "_gate_back", "_thin_product"))
