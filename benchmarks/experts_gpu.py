"""A training step of Mixtral-8x7B on a CUDA GPU: tokens a second, peak memory, share of what the GPU's multipliers can do.

    python benchmarks/experts_gpu.py [--tokens 4096 10240 40960] [--layers 32] [--compare] [--out benchmarks/results/...json]

The model has Mixtral's real shapes and random NF4 weights that were never anything but 4-bit (23 GiB), LoRA r = 32 on
attention, experts and router, gradient checkpointing, and the loss that never builds the logits. A step is forward,
recomputation, backward and Adam. The share is

    FLOPs of the step / (time · FLOP/s of a large bf16 matrix product, measured on the same GPU in the same process)

with FLOPs counted from the shapes: 2 for each weight and token in the forward pass, 2 again in the recomputation, 2 for the
gradient of the inputs, 2 more for the gradient of LoRA weights, and attention. `--compare` lets stock PEFT on unquantised
experts and bitsandbytes' parametrisation take turns with ours, on one layer (32 would need 94 GB).

No GPU was at hand when this was written: the numbers are yet to be measured. `--device cpu` runs it on tiny shapes, which is
what the tests do.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import budget, experts, losses, qlora
from helpers.environment import hardware, versions
from helpers.quantization import audit, random_4bit


def flops(config, tokens: int, row: int, rank: int, checkpointing: bool = True) -> dict[str, float]:
    """FLOPs of one training step by part, for `tokens` tokens in rows of `row`; a multiplication and an addition are two.

    Attention counts a row as one document, of whose token pairs half are masked.
    """
    h, i, v, k = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_experts_per_tok
    head = config.head_dim or h // config.num_attention_heads
    q, kv, e, layers = config.num_attention_heads * head, config.num_key_value_heads * head, config.num_local_experts, 0
    layers = config.num_hidden_layers
    frozen = {
        "attention projections": layers * (h * (q + 2 * kv) + q * h),
        "experts": layers * k * 3 * h * i,
        "router": layers * h * e,
    }
    lora = layers * rank * ((h + q) + 2 * (h + kv) + (q + h) + (h + e) + k * (h + 2 * i + i + h))
    passes = 2 * (3 if checkpointing else 2)  # forward, recomputation, gradient of the inputs
    found = {name: float(passes * weights * tokens) for name, weights in frozen.items()}
    found["adapters"] = float((passes + 2) * lora * tokens)  # and the gradient of their weights
    # scores and their product with the values: 2 · 2 · row · q a token forward, half of it masked; backward is 2.5 times that
    found["attention scores"] = float(layers * tokens * 2 * row * q * ((2 if checkpointing else 1) + 2.5))
    found["head"] = float(2 * 2 * h * v * tokens)  # forward and the gradient of the hidden states, in one go
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work, device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that warms up."""
    found = []
    for repeat in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        if repeat:
            found.append(time.perf_counter() - started)
    return found


def ceiling(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """FLOP/s of a square matrix product: the most that this GPU gives in practice."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, device, repeats))


def shapes(o: argparse.Namespace):
    from transformers import MixtralConfig

    return MixtralConfig(
        hidden_size=o.hidden, intermediate_size=o.intermediate, num_hidden_layers=o.layers, num_local_experts=o.experts,
        num_attention_heads=o.heads, num_key_value_heads=max(1, o.heads // 4), vocab_size=o.vocabulary, use_cache=False,
        max_position_embeddings=32768,
    )  # fmt: skip


class Step:
    """A whole training step of the 4-bit model."""

    def __init__(self, o: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        self.model = qlora.add_lora(random_4bit(shapes(o), dtype, device=device), r=o.rank, alpha=16, dropout=o.dropout).train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.enable_input_require_grads()
        self.adam = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.device, self.dtype = device, dtype

    def __call__(self, rows: int, row: int) -> None:
        ids = torch.randint(3, self.model.config.vocab_size, (rows, row), device=self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = losses.completion_loss(self.model, {"input_ids": ids}, ids, self.model.get_base_model())
        (loss / ids.numel()).backward()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def measure(o: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """Whole steps, for each number of tokens: seconds, tokens a second, peak, share of the ceiling, and the budget's guess."""
    config = shapes(o)
    top = ceiling(device, dtype, o.ceiling_size, o.repeats)
    step = Step(o, device, dtype)
    described = budget.describe(config, dtype, r=o.rank)
    found = {"ceiling_tflops": top / 1e12, "model": audit(step.model).table, "steps": []}
    for tokens in o.tokens:
        row = min(tokens, o.row)
        rows = tokens // row
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            seconds = timed(lambda rows=rows, row=row: step(rows, row), device, o.repeats)
        except torch.OutOfMemoryError as error:
            found["steps"].append({"tokens": rows * row, "error": str(error).partition(".")[0]})
            step.adam.zero_grad(set_to_none=True)
            continue
        low, median, high = statistics.quantiles(seconds, n=4)
        work = flops(config, rows * row, row, o.rank)
        guess = budget.estimate(described, rows, row, True, o.dropout, device.type, documents=False)
        entry = {"tokens": rows * row, "rows": rows, "row": row, "seconds": median, "quartiles": [low, high]}
        entry |= {"tokens_per_second": rows * row / median, "tflop": sum(work.values()) / 1e12, "tflop_parts": work}
        entry |= {"share_of_ceiling": sum(work.values()) / median / top, "budget_gib": guess.peak / budget.GIB}
        if device.type == "cuda":
            entry["peak_gib"] = torch.cuda.max_memory_allocated(device) / budget.GIB
        found["steps"].append(entry)
    return found


def compare(o: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """One expert layer with adapters, forward and backward, variants in turns: seconds and peak."""
    from benchmarks import experts as layers

    o.top_k, found = 2, {}
    variants = {
        "nf4 (ours)": layers.Ours(o),
        "stock grouped_mm + PEFT target_parameters": layers.stock(o, "grouped_mm"),
        "bitsandbytes parametrisation + PEFT's product": layers.parametrised(o, "grouped_mm"),
    }
    for name, module in variants.items():
        for stack in experts.STACKS if name.startswith("nf4") else ():
            getattr(module.layer, stack).quant_state.dtype = dtype
        variants[name] = module.to(device, dtype)
    for tokens in o.tokens:
        x = torch.randn(tokens, o.hidden, device=device, dtype=dtype, requires_grad=True)
        scores, index = torch.rand(tokens, o.experts, device=device).softmax(-1).topk(2)
        inputs, rounds = (x, index, scores.to(dtype)), {name: [] for name in variants}
        peaks = dict.fromkeys(variants, 0.0)
        for _ in range(o.repeats):
            for name, module in variants.items():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                rounds[name] += timed(lambda module=module, inputs=inputs: module(*inputs).sum().backward(), device, 1)
                for p in (*module.parameters(), x):
                    p.grad = None
                if device.type == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated(device) / budget.GIB
        found[str(tokens)] = {n: {"seconds": statistics.median(s), "peak_gib": peaks[n]} for n, s in rounds.items()}
    return found


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 4096, "intermediate": 14336, "layers": 32, "experts": 8, "heads": 32, "vocabulary": 32000, "rank": 32}
    for name, value in {**sizes, "row": 10240, "repeats": 7, "ceiling_size": 8192, "seed": 0}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 10240, 40960], help="tokens a step")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--compare", action="store_true", help="also one expert layer against stock software")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> dict:
    o = parse(args)
    if o.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: run this on a machine with one (--device cpu is for trying it out on tiny shapes)")
    torch.manual_seed(o.seed)
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    found = measure(o, device, dtype)
    if o.compare:
        gc.collect()
        found["one_layer"] = compare(o, device, dtype)
    print(f"ceiling {found['ceiling_tflops']:.1f} TFLOP/s")
    for entry in found["steps"]:
        if "error" in entry:
            print(f"{entry['tokens']:>8,} tokens: {entry['error']}")
            continue
        peak = f"peak {entry['peak_gib']:.1f} GiB, " if "peak_gib" in entry else ""
        print(f"{entry['tokens']:>8,} tokens: {entry['seconds']:.3f} s, {entry['tokens_per_second']:,.0f} tokens/s, ", end="")
        print(f"{peak}by the budget {entry['budget_gib']:.1f} GiB, {entry['share_of_ceiling']:.1%} of the ceiling")
    if o.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        settings = {k: v for k, v in vars(o).items() if k != "out"}
        facts = {"settings": settings, **found, "hardware": hardware(), "versions": versions(), "commit": commit}
        o.out.parent.mkdir(parents=True, exist_ok=True)
        part = o.out.with_name(o.out.name + ".part")
        part.write_text(json.dumps(facts, indent=1) + "\n")
        part.replace(o.out)
    return found


if __name__ == "__main__":
    main()
