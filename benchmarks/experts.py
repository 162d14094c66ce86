"""Time and memory of one expert layer with LoRA: ours in NF4 against stock transformers + PEFT in full precision.

    python benchmarks/experts.py [--hidden 1024 --intermediate 3584 --tokens 2048 --repeats 7] [--out benchmarks/results/...json]

All variants live in one process and take turns; reported are medians of a forward and backward pass, their ratios to the
first variant, and the peak of live tensor bytes of one such pass, weights included. `floor` is the same matrix products
alone, on weights that are already unpacked.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import experts
from helpers.environment import hardware, versions


class LiveBytes(TorchDispatchMode):
    """Peak bytes of tensor storages that are created while it is active, and still alive at that moment."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def factors(config, rank: int) -> list[nn.Parameter]:
    e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
    shapes = [(e, rank, h), (e, 2 * i, rank), (e, rank, i), (e, h, rank)]
    return [nn.Parameter(torch.randn(s) * 0.02) for s in shapes]


class Ours(nn.Module):
    """NF4 stacks, factors applied in turn."""

    def __init__(self, config, rank):
        super().__init__()
        config._experts_implementation = experts.NAME
        self.layer = MixtralExperts(config)
        for name in experts.STACKS:
            setattr(self.layer, name, experts.quantize_stack(torch.randn_like(getattr(self.layer, name)) * 0.02))
        self.lora = nn.ParameterList(factors(config, rank))

    def forward(self, *inputs):
        a1, b1, a2, b2 = self.lora
        self.layer.lora_factors = {"gate_up_proj": experts.Factors(a1, b1), "down_proj": experts.Factors(a2, b2)}
        return self.layer(*inputs)


class Stock(nn.Module):
    """Unquantised stacks behind PEFT's own parameter wrapper (`target_parameters`), which forms W + B·A."""

    def __init__(self, config, rank, implementation):
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        config._experts_implementation = implementation
        layer = MixtralExperts(config)
        for name in experts.STACKS:
            nn.init.normal_(getattr(layer, name), std=0.02)
        holder = nn.ModuleDict({"experts": layer})
        settings = LoraConfig(r=rank, lora_alpha=rank, target_parameters=[f"experts.{s}" for s in experts.STACKS])
        self.layer = inject_adapter_in_model(settings, holder)["experts"]

    def forward(self, *inputs):
        return self.layer(*inputs)


class Floor(nn.Module):
    """The matrix products alone: forward, and backward for the inputs, with as many rows an expert as on average."""

    def __init__(self, config, rows):
        super().__init__()
        h, i, e = config.hidden_size, config.intermediate_size, config.num_local_experts
        self.w1, self.w2 = torch.randn(e, 2 * i, h) * 0.02, torch.randn(e, h, i) * 0.02
        self.rows, self.e = rows // e, e
        self.x, self.a, self.g1, self.g2 = (torch.randn(self.rows, n) for n in (h, i, 2 * i, h))

    def run(self):
        for e in range(self.e):
            self.x @ self.w1[e].T
            self.a @ self.w2[e].T
            self.g2 @ self.w2[e]
            self.g1 @ self.w1[e]


def weight_bytes(module: nn.Module) -> int:
    total = 0
    for p in module.parameters():
        total += p.numel() * p.element_size()
        state = getattr(p, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() + 4 * state.state2.absmax.numel()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "hidden": 1024,
        "intermediate": 3584,
        "experts": 8,
        "tokens": 2048,
        "rank": 8,
        "repeats": 7,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    torch.manual_seed(o.seed)

    def config():
        return MixtralConfig(hidden_size=o.hidden, intermediate_size=o.intermediate, num_local_experts=o.experts)

    variants = {
        "nf4 (ours)": Ours(config(), o.rank),
        "stock eager + PEFT": Stock(config(), o.rank, "eager"),
        "stock grouped_mm + PEFT": Stock(config(), o.rank, "grouped_mm"),
    }
    floor = Floor(config(), o.tokens * 2)
    x = torch.randn(o.tokens, o.hidden, requires_grad=True)
    scores, index = torch.rand(o.tokens, o.experts).softmax(-1).topk(2)

    def step(module):
        module(x, index, scores).sum().backward()
        for p in (*module.parameters(), x):
            p.grad = None

    results = {name: {"seconds": [], "weight_mib": weight_bytes(m) / 2**20} for name, m in variants.items()}
    results["floor"] = {"seconds": []}
    for repeat in range(o.repeats + 1):
        for name, module in [*variants.items(), ("floor", floor)]:
            started = time.perf_counter()
            floor.run() if name == "floor" else step(module)
            if repeat:  # the first round warms up
                results[name]["seconds"].append(time.perf_counter() - started)
    for name, module in variants.items():
        gc.collect()
        with LiveBytes() as live:
            step(module)
        results[name]["peak_live_mib"] = live.peak / 2**20
    first = next(iter(results))
    for entry in results.values():
        entry["median_seconds"] = statistics.median(entry.pop("seconds"))
    for name, entry in results.items():
        entry["time_ratio"] = entry["median_seconds"] / results[first]["median_seconds"]
        print(f"{name:<26}{entry['median_seconds']:>8.2f} s  x{entry['time_ratio']:.2f}", end="")
        print(f"  peak {entry['peak_live_mib']:.0f} + weights {entry['weight_mib']:.0f} MiB" if "weight_mib" in entry else "")
    if o.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        facts = {"settings": {k: v for k, v in vars(o).items() if k != "out"}, "threads": torch.get_num_threads()}
        facts |= {"results": results, "hardware": hardware(), "versions": versions(), "commit": commit}
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
