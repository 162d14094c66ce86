"""The benchmarks of the experts run on tiny shapes, and count what they claim to count."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import experts, experts_gpu
from helpers import activation_checkpointing, losses
from helpers.profiles import ROOT


def cpu(*settings):
    return experts_gpu.parse(["--smoke", *settings])


def test_the_defaults_are_mixtrals_shapes():
    from transformers import MixtralConfig

    made, real = experts_gpu.shapes(experts_gpu.parse([])), MixtralConfig()
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"]
    assert all(getattr(made, n) == getattr(real, n) for n in [*names, "num_local_experts", "num_experts_per_tok"])


def test_the_flops_are_six_for_each_active_weight_and_token():
    """12.6 of the 12.9 billion active parameters are in layers. A third of the experts' is not computed again: four there."""
    o = experts_gpu.parse([])
    found = experts_gpu.flops(experts_gpu.shapes(o), 1000, 10240, 32)
    frozen = (found["attention projections"] + found["router"]) / 6 + found["experts"] / (6 * 2 / 3 + 4 / 3)
    assert frozen / 1000 / 1e9 == pytest.approx(12.62, abs=0.01)
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
    o, device = cpu("--dropout=0"), torch.device("cpu")
    step = experts_gpu.Step(experts_gpu.ours(o, 2, device, torch.float32), device, torch.float32)
    if not checkpointing:
        activation_checkpointing.disable(step.model)
    rows, row = 4, 256
    ids = torch.randint(3, 128, (rows, row), generator=torch.Generator().manual_seed(0))
    with Products() as products:
        losses.completion_loss(step.model, {"input_ids": ids}, ids, step.model.get_base_model()).backward()
    found = experts_gpu.flops(experts_gpu.shapes(o), rows * row, row, o.rank, checkpointing)
    wanted = sum(v for k, v in found.items() if k != "attention scores")  # in a kernel of its own
    assert wanted == pytest.approx(products.flops, rel=0.02)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_tiny_shapes(tmp_path):
    """Every case, from the command's own entry."""
    experts_gpu.main(["--smoke", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert tuple(found) == experts_gpu.CASES and not any("error" in case for case in found.values())
    assert [s["tokens"] for s in found["steps"]["steps"]] == [16, 32, 128]
    for entry in found["steps"]["steps"]:
        assert entry["tokens_per_second"] == pytest.approx(entry["tokens"] / entry["seconds"])
        assert entry["hours_of_the_card"] == pytest.approx(25.5e6 * entry["seconds"] / entry["tokens"] / 3600)
        work = sum(entry["tflop_parts"].values())
        assert entry["share_of_ceiling"] == pytest.approx(work / entry["seconds"] / found["ceiling"]["tflops"] / 1e12)
    assert sum(line["share"] for line in found["profile"]["top"]) <= 1.0001 and found["profile"]["top"][0]["share"] > 0.02
    for lines in found["compare"]["variants"].values():
        assert [line["tokens"] for line in lines] == [16, 32] and all(line["seconds"] > 0 for line in lines)
    assert set(found["routers"]["seconds"]) == {"with", "without"}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compared_models_train_the_same_parameters(dtype):
    o, device = cpu(), torch.device("cpu")
    trained = {}
    for name, make in experts_gpu.VARIANTS.items():
        step = experts_gpu.Step(make(o, 1, device, dtype), device, dtype)
        trainable = [p for p in step.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trainable]
        step(1, 32)
        trained[name] = sum(p.numel() for p in trainable)
        moved = sum(not torch.equal(p, b) for p, b in zip(trainable, before, strict=True))
        assert moved >= len(trainable) // 2, f"{name}: after one step every B has moved"
    h, i, e, r = o.hidden, o.intermediate, o.experts, o.rank
    keys = h // o.heads * max(1, o.heads // 4)
    wanted = r * ((h + h) + 2 * (h + keys) + (h + h) + (h + e) + e * ((h + 2 * i) + (i + h)))
    assert set(trained.values()) == {wanted}


@pytest.mark.slow
def test_what_fails_is_recorded_and_loses_nothing(tmp_path, monkeypatch, capsys):
    def broken(*_):
        yield {"half": 1}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")

    def unpackable(*_):
        raise ModuleNotFoundError("No module named 'kernels'")

    monkeypatch.setattr(experts_gpu.Bench, "profile", broken)
    monkeypatch.setitem(experts_gpu.VARIANTS, "bitsandbytes parametrisation + PEFT's product", unpackable)
    out = tmp_path / "found.json"
    experts_gpu.main(["--smoke", "--repeats=1", "--cases", "profile", "compare", "routers", "--out", str(out)])
    found = json.loads(out.read_text())["cases"]
    assert found["profile"] == {"half": 1, "error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 5 GiB"}
    first, _, last = found["compare"]["variants"].values()
    assert "seconds" in first[0] and last == [{"error": "ModuleNotFoundError: No module named 'kernels'"}]
    assert "cost" in found["routers"] and "Tried to allocate 5 GiB" in capsys.readouterr().out


def test_a_step_that_does_not_fit_leaves_its_sentence():
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")

    found = experts_gpu.measured(work, torch.device("cpu"), 3, experts_gpu.Clock(1))
    assert found == {"error": "CUDA out of memory"}


def test_the_time_limit_holds(tmp_path):
    """No time at all: nothing begins. Time that ends within a case: one measurement is made, no more."""
    out = tmp_path / "found.json"
    experts_gpu.main(["--smoke", "--minutes=0", "--out", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert tuple(cases) == experts_gpu.CASES and all("not begun" in case["error"] for case in cases.values())
    over, calls = experts_gpu.Clock(0), []
    assert len(experts_gpu.timed(lambda: calls.append(1), torch.device("cpu"), 5, over)) == 1 and len(calls) == 2
    assert len(experts_gpu.timed(lambda: None, torch.device("cpu"), 5, experts_gpu.Clock(1))) == 5


def test_a_gpu_is_warm_before_it_is_timed(monkeypatch):
    monkeypatch.setitem(experts_gpu.WARM, "cpu", 0.1)
    calls = []
    found = experts_gpu.timed(lambda: (calls.append(1), time.sleep(0.03)), torch.device("cpu"), 2)
    assert len(found) == 2 and 2 + 2 <= len(calls) <= 2 + 4, "four or fewer to fill 0.1 s, and the two that count"
    calls.clear()
    assert len(experts_gpu.timed(lambda: calls.append(1), torch.device("cpu"), 0)) == len(calls) == 1


def test_kernels_are_told_apart_by_name():
    """By names that an H200 gave."""
    found = {
        "nvjet_sm90_tst_192x208_64x4_2x1_v_badd_coopB_TNT": "products",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, float, 128, 16, 4, 4, false>": "products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1": "attention",
        "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)": "unpacking",
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>": "the rest",
        "_gate_back": "fused",
    }
    assert {name: experts_gpu.kind_of(name) for name in found} == found
    recorded = json.loads((ROOT / "benchmarks" / "results" / "experts-h200.json").read_text(encoding="utf-8"))
    kinds = {experts_gpu.kind_of(kernel["name"]) for kernel in recorded["cases"]["profile"]["top"]}
    assert kinds == {"products", "attention", "unpacking", "the rest"}


@pytest.mark.parametrize("step", range(3))
def test_the_recorded_shares_follow_from_the_recorded_times(step):
    """What the H200's file says, from its own seconds and the FLOPs of the shapes."""
    found = json.loads((ROOT / "benchmarks" / "results" / "experts-h200.json").read_text(encoding="utf-8"))
    took = found["cases"]["steps"]["steps"][step]
    shapes = experts_gpu.shapes(experts_gpu.parse([]))
    flops = sum(experts_gpu.flops(shapes, took["tokens"], took["row"], found["settings"]["rank"]).values())
    top = 1e12 * found["cases"]["ceiling"]["tflops"]
    assert took["share_of_ceiling"] == pytest.approx(flops / took["seconds"] / top)
    assert took["tokens_per_second"] == pytest.approx(took["tokens"] / took["seconds"])
    assert took["hours_of_the_card"] == pytest.approx(25.5e6 / took["tokens_per_second"] / 3600)
    parts = {row["part"]: row for row in found["cases"]["steps"]["model"]}
    assert parts["experts"]["4-bit"] == 1 and parts["experts"]["weights"] == 32 * 8 * 3 * 4096 * 14336


def test_a_missing_package_is_one_sentence():
    """Python without its site-packages."""
    script = ROOT / "benchmarks" / "experts_gpu.py"
    done = subprocess.run([sys.executable, "-S", str(script), "--smoke"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("missing here: torch") and "bitsandbytes" in done.stderr


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
    from helpers.nf4 import dequantize_stack

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
