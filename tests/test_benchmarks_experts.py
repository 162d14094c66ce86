"""The benchmarks of the experts run on tiny shapes, and count what they claim to count."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import experts, experts_gpu
from helpers import losses

TINY = ["--hidden=64", "--intermediate=64", "--layers=2", "--heads=4", "--vocabulary=128", "--rank=4", "--row=16"]
TINY += ["--repeats=2", "--ceiling-size=64", "--device=cpu", "--dtype=float32", "--tokens", "16", "32"]


def test_the_defaults_are_mixtrals_shapes():
    from transformers import MixtralConfig

    made, real = experts_gpu.shapes(experts_gpu.parse([])), MixtralConfig()
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"]
    assert all(getattr(made, n) == getattr(real, n) for n in [*names, "num_local_experts", "num_experts_per_tok"])


def test_the_flops_are_six_for_each_active_weight_and_token():
    """12.6 of the 12.9 billion active parameters are in layers, so about 77 GFLOP a token without attention scores."""
    o = experts_gpu.parse([])
    found = experts_gpu.flops(experts_gpu.shapes(o), 1000, 10240, 32)
    frozen = sum(found[n] for n in ("attention projections", "experts", "router")) / 1000 / 6
    assert frozen / 1e9 == pytest.approx(12.62, abs=0.01)
    assert 0.01 < found["adapters"] / sum(found.values()) < 0.02


class Products(TorchDispatchMode):
    """FLOPs of the matrix products that are really run. torch's own counter leaves out those in place."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name == "gemm_4bit":  # bitsandbytes' linear layer
            self.flops += 2 * args[0].numel() * out.shape[-1]
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_flops_are_those_that_are_run(checkpointing):
    o = experts_gpu.parse([*TINY[:-3], "--dropout=0"])
    step = experts_gpu.Step(o, torch.device("cpu"), torch.float32)
    if not checkpointing:
        step.model.gradient_checkpointing_disable()
    rows, row = 4, 256
    ids = torch.randint(3, 128, (rows, row), generator=torch.Generator().manual_seed(0))
    with Products() as products:
        losses.completion_loss(step.model, {"input_ids": ids}, ids, step.model.get_base_model()).backward()
    found = experts_gpu.flops(experts_gpu.shapes(o), rows * row, row, o.rank, checkpointing)
    wanted = sum(v for k, v in found.items() if k != "attention scores")  # in a kernel of its own
    assert wanted == pytest.approx(products.flops, rel=0.02)


def test_the_gpu_benchmark_runs_on_tiny_shapes(tmp_path):
    experts_gpu.main([*TINY, "--compare", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [s["tokens"] for s in found["steps"]] == [16, 32] and set(found["one_layer"]) == {"16", "32"}
    for entry in found["steps"]:
        assert entry["tokens_per_second"] == pytest.approx(entry["tokens"] / entry["seconds"])
        work = sum(entry["tflop_parts"].values())
        assert entry["share_of_ceiling"] == pytest.approx(work / entry["seconds"] / found["ceiling_tflops"] / 1e12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA GPU here"):
        experts_gpu.main([])


def test_the_layer_benchmark_measures_every_variant():
    o = experts.parse(["--hidden=64", "--intermediate=128", "--tokens=32", "--rank=4", "--repeats=2"])
    found = experts.measure(o)
    first = next(iter(found.values()))
    assert first["ours_takes"] == first["ours_needs"] == 1.0
    assert "floor" in found and len(found) == 6
    dense = 4 * 8 * 3 * 64 * 128 / 2**20
    assert found["stock eager + PEFT target_parameters"]["weight_mib"] > dense
    assert first["weight_mib"] < 0.5 * dense, "NF4 and the factors"


def test_all_variants_compute_the_same_layer():
    """With one set of weights and factors: otherwise their times would not compare."""
    o = experts.parse(["--hidden=64", "--intermediate=128", "--tokens=32", "--rank=4"])
    torch.manual_seed(0)
    ours, stock, param = experts.Ours(o), experts.stock(o, "eager"), experts.parametrised(o, "grouped_mm")
    x, (scores, index) = torch.randn(32, 64), torch.rand(32, 8).softmax(-1).topk(2)
    from helpers.experts import dequantize_stack

    with torch.no_grad():
        a1, b1, a2, b2 = ours.lora
        base = stock.get_base_layer() if hasattr(stock, "get_base_layer") else stock
        while hasattr(base, "base_layer"):
            base = base.base_layer
        for name in experts.STACKS:
            getattr(base, name).copy_(dequantize_stack(getattr(ours.layer, name)))
            holder = param.parametrizations[name]
            packed = getattr(ours.layer, name)
            holder.original.copy_(packed.data)
            holder[0].quant_state = packed.quant_state
        for holder, (a, b) in zip((param.parametrizations[n] for n in experts.STACKS), ((a1, b1), (a2, b2)), strict=True):
            holder[1].a.copy_(a)
            holder[1].b.copy_(b)
        wrapper = stock
        while hasattr(wrapper, "base_layer"):
            a, b = (a1, b1) if wrapper.parameter_name == "gate_up_proj" else (a2, b2)
            wrapper.lora_A["default"].weight.copy_(a.reshape(-1, a.shape[-1]))
            wrapper.lora_B["default"].weight.copy_(b.permute(1, 2, 0).reshape(b.shape[1], -1))
            wrapper = wrapper.base_layer
        outs = [m(x, index, scores) for m in (ours, stock, param)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-5)


def test_the_other_python_is_asked_and_its_end_is_an_error(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json\nprint('some warning')\n"
        "for answer in ({'weights': 7, 'versions': {}}, {'answer': [0.5, 0.25]}):\n"
        "    input()\n    print(json.dumps(answer), flush=True)\n"
    )
    monkeypatch.setattr(experts, "__file__", str(worker))
    other = experts.Elsewhere(sys.executable, experts.parse([]))
    assert other.weights == 7 and other.step() == [0.5, 0.25]
    with pytest.raises(RuntimeError, match="other Python ended"):
        other.step()
