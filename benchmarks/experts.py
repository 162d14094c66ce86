"""Time and memory of one expert layer with LoRA: ours in NF4 against what else can be had.

    python benchmarks/experts.py [--tokens 2048 ...] [--old-python OTHER/bin/python] [--out benchmarks/results/experts-cpu.json]

All variants take turns in one process. Reported are medians of a forward and backward pass with their quartiles (of processor
time with one thread, else of the wall clock), what ours takes in units of each other variant (the median over rounds, so that
other work on the machine disturbs both alike), and the peak of live tensor bytes of one such pass, weights included. `floor`
is the same matrix products alone, on weights that are already unpacked.

transformers 4 kept every expert as linear layers, which bitsandbytes could pack. With the Python of an environment that holds
transformers 4.57, bitsandbytes and PEFT, that variant runs in a process of its own, which this one wakes up when it has its
turn:  pip install "transformers==4.57.6" "huggingface-hub<1" "peft==0.18.1" bitsandbytes torch
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers.budget import LiveBytes

SETTINGS = {"hidden": 1024, "intermediate": 3584, "experts": 8, "top_k": 2, "tokens": 2048, "rank": 8, "repeats": 7, "seed": 0}
OLD = "transformers 4.57: bitsandbytes layers + PEFT"
STACKS = ("gate_up_proj", "down_proj")


def config(o: argparse.Namespace, implementation: str | None = None):
    from transformers import MixtralConfig

    made = MixtralConfig(
        hidden_size=o.hidden, intermediate_size=o.intermediate, num_local_experts=o.experts, num_experts_per_tok=o.top_k
    )
    if implementation:
        made._experts_implementation = implementation
    return made


def layer(o: argparse.Namespace, implementation: str) -> nn.Module:
    """Mixtral's experts with random fp32 weights."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    made = MixtralExperts(config(o, implementation)).requires_grad_(False)
    for name in STACKS:
        nn.init.normal_(getattr(made, name), std=0.02)
    return made


def factors(o: argparse.Namespace) -> nn.ParameterList:
    shapes = [(o.experts, o.rank, o.hidden), (o.experts, 2 * o.intermediate, o.rank)]
    shapes += [(o.experts, o.rank, o.intermediate), (o.experts, o.hidden, o.rank)]
    return nn.ParameterList(torch.randn(s) * 0.02 for s in shapes)


class Ours(nn.Module):
    """NF4 stacks, factors applied in turn."""

    def __init__(self, o):
        from helpers import experts, nf4

        super().__init__()
        self.layer = layer(o, experts.NAME)
        for name in STACKS:
            setattr(self.layer, name, nf4.quantize_stack(getattr(self.layer, name)))
        self.lora, self.kind = factors(o), experts.Factors

    def forward(self, *inputs):
        a1, b1, a2, b2 = self.lora
        self.layer.lora_factors = {"gate_up_proj": self.kind(a1, b1), "down_proj": self.kind(a2, b2)}
        return self.layer(*inputs)


def stock(o: argparse.Namespace, implementation: str) -> nn.Module:
    """Unquantised stacks behind PEFT's own parameter wrapper (`target_parameters`), which forms W + B·A."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.ModuleDict({"experts": layer(o, implementation)})
    settings = LoraConfig(r=o.rank, lora_alpha=o.rank, target_parameters=[f"experts.{s}" for s in STACKS])
    return inject_adapter_in_model(settings, holder)["experts"]


class _PlusProduct(nn.Module):
    """W + B·A, the product that PEFT forms for a parameter."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.einsum("eor,eri->eoi", self.b, self.a)


def parametrised(o: argparse.Namespace, implementation: str) -> nn.Module:
    """bitsandbytes' own 4-bit parameters, with PEFT's product as a second parametrisation.

    PEFT's wrapper itself does not survive on them: the first step leaves one adapter without gradient, the second raises.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    made, lora = layer(o, implementation), factors(o)
    for k, name in enumerate(STACKS):
        replace_parameter_4bit(made, name, compress_statistics=True, quant_type="nf4", blocksize=64)
        nn.utils.parametrize.register_parametrization(made, name, _PlusProduct(*lora[2 * k : 2 * k + 2]), unsafe=True)
    return made


class Floor(nn.Module):
    """The matrix products alone: forward, and backward for the inputs, with as many rows per expert as on average."""

    def __init__(self, o):
        super().__init__()
        h, i, e = o.hidden, o.intermediate, o.experts
        self.w1, self.w2 = torch.randn(e, 2 * i, h) * 0.02, torch.randn(e, h, i) * 0.02
        self.rows, self.e = o.tokens * o.top_k // e, e
        self.x, self.a, self.g1, self.g2 = (torch.randn(self.rows, n) for n in (h, i, 2 * i, h))

    def run(self):
        for e in range(self.e):
            self.x @ self.w1[e].T
            self.a @ self.w2[e].T
            self.g2 @ self.w2[e]
            self.g1 @ self.w1[e]


class OldBlock(nn.Module):
    """transformers 4's MoE block: three `Linear4bit` an expert, each with a LoRA of its own. It routes by itself."""

    def __init__(self, o):
        import bitsandbytes as bnb
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        super().__init__()
        block = MixtralSparseMoeBlock(config(o)).requires_grad_(False)
        for expert in block.experts:
            for name in ("w1", "w2", "w3"):
                old = getattr(expert, name)
                weight = bnb.nn.Params4bit(torch.randn_like(old.weight) * 0.02, requires_grad=False, quant_type="nf4")
                new = bnb.nn.Linear4bit(
                    old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                new.weight = weight
                setattr(expert, name, new.to("cpu"))  # packs
        settings = LoraConfig(r=o.rank, lora_alpha=o.rank, target_modules=["w1", "w2", "w3"])
        self.block = inject_adapter_in_model(settings, block)

    def forward(self, x, index, scores):
        return self.block(x.unsqueeze(0))[0]


def weight_bytes(module: nn.Module) -> int:
    """Parameters, with the quantisation scales of the packed ones."""
    total = 0
    for p in module.parameters():
        state = getattr(p, "quant_state", None)
        total += p.numel() * p.element_size() + (_state_bytes(state) if state is not None else 0)
    return total + sum(_state_bytes(m.quant_state) for m in module.modules() if type(m).__name__ == "Bnb4bitParametrization")


def _state_bytes(state) -> int:
    return state.absmax.numel() * state.absmax.element_size() + (4 * state.state2.absmax.numel() if state.nested else 0)


class Here:
    """A variant in this process."""

    def __init__(self, module: nn.Module, o: argparse.Namespace):
        torch.manual_seed(o.seed)
        self.module, self.weights = module, weight_bytes(module)
        self.x = torch.randn(o.tokens, o.hidden, requires_grad=True)
        self.scores, self.index = torch.rand(o.tokens, o.experts).softmax(-1).topk(o.top_k)

    def step(self) -> tuple[float, float]:
        """(seconds by the wall clock, seconds of this process on all its processors)."""
        started, busy = time.perf_counter(), time.process_time()
        if isinstance(self.module, Floor):
            self.module.run()
        else:
            self.module(self.x, self.index, self.scores).sum().backward()
        took = time.perf_counter() - started, time.process_time() - busy
        for p in (*self.module.parameters(), self.x):
            p.grad = None
        return took

    def peak(self) -> int:
        gc.collect()
        with LiveBytes() as live:
            self.step()
        return live.peak


class Elsewhere:
    """A variant in the process of another Python: this very file as its worker, one line asked and one answered."""

    def __init__(self, python: str, o: argparse.Namespace):
        settings = [f"--{name.replace('_', '-')}={getattr(o, name)}" for name in SETTINGS]
        command = [python, __file__, "--worker", *settings, f"--threads={torch.get_num_threads()}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hello = self._ask("hello")
        self.weights, self.versions = hello["weights"], hello["versions"]

    def _ask(self, what: str):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the other Python ended ({self.process.wait()}): its message is above")

    def step(self) -> tuple[float, float]:
        return self._ask("step")["answer"]

    def peak(self) -> int:
        return self._ask("peak")["answer"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def work(o: argparse.Namespace) -> None:
    import bitsandbytes
    import peft
    import transformers

    found = Here(OldBlock(o), o)
    names = (torch, transformers, peft, bitsandbytes)
    hello = {"weights": found.weights, "versions": {m.__name__: m.__version__ for m in names}}
    for line in sys.stdin:
        asked = line.strip()
        print(json.dumps(hello if asked == "hello" else {"answer": getattr(found, asked)()}), flush=True)


def measure(o: argparse.Namespace) -> dict[str, dict]:
    """Name → seconds (median, quartiles), ratio of time, weights and peak in MiB, ratio of memory."""
    torch.manual_seed(o.seed)
    variants = {
        "nf4 (ours)": Here(Ours(o), o),
        "stock eager + PEFT target_parameters": Here(stock(o, "eager"), o),
        "stock grouped_mm + PEFT target_parameters": Here(stock(o, "grouped_mm"), o),
        "bitsandbytes parametrisation + PEFT's product, eager": Here(parametrised(o, "eager"), o),
        "bitsandbytes parametrisation + PEFT's product, grouped_mm": Here(parametrised(o, "grouped_mm"), o),
        "floor": Here(Floor(o), o),
    }
    if o.old_python:
        variants[OLD] = Elsewhere(o.old_python, o)
    wall: dict[str, list[float]] = {name: [] for name in variants}
    busy: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(o.repeats + 1):
        for name, variant in variants.items():
            took = variant.step()
            if repeat:  # the first round warms up
                wall[name].append(took[0])
                busy[name].append(took[1])
    results = {}
    # One thread's processor time is its time on a quiet machine; several threads wait for each other, so only the wall tells.
    clock = busy if o.threads == 1 else wall
    ours = clock[next(iter(variants))]
    for name, variant in variants.items():
        low, median, high = statistics.quantiles(clock[name], n=4)
        results[name] = {"median_seconds": median, "quartiles": [low, high], "fastest": min(clock[name])}
        results[name]["median_wall_seconds"] = statistics.median(wall[name])
        ratios = statistics.quantiles([a / b for a, b in zip(ours, clock[name], strict=True)], n=4)
        results[name] |= {"ours_takes": ratios[1], "ours_takes_quartiles": [ratios[0], ratios[2]]}
        if name != "floor":
            results[name] |= {"weight_mib": variant.weights / 2**20, "peak_live_mib": (variant.weights + variant.peak()) / 2**20}
    ours = next(iter(results.values()))
    for entry in results.values():
        if "peak_live_mib" in entry:
            entry["ours_needs"] = ours["peak_live_mib"] / entry["peak_live_mib"]
    if o.old_python:
        results[OLD]["versions"] = variants[OLD].versions
        variants[OLD].close()
    return results


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--old-python", help="Python of an environment with transformers 4.57")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(args)


def main() -> None:
    o = parse()
    torch.set_num_threads(o.threads)
    if o.worker:
        work(o)
        return
    from helpers.environment import hardware, versions
    from helpers.files import write_json

    results = measure(o)
    for name, entry in results.items():
        print(f"{name:<58}{entry['median_seconds']:>8.3f} s", end="")
        print(f"{entry['peak_live_mib']:>9.0f} MiB" if "peak_live_mib" in entry else " " * 13, end="")
        print(f"   ours: x{entry['ours_takes']:.2f}", f"x{entry['ours_needs']:.2f}" if "ours_needs" in entry else "")
    if o.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        facts = {"settings": {k: getattr(o, k) for k in (*SETTINGS, "threads")}, "results": results}
        facts |= {"hardware": hardware(), "versions": versions(), "commit": commit}
        write_json(o.out, facts)


if __name__ == "__main__":
    main()
