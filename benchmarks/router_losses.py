"""What the attached router losses cost: time of a training step, and memory between forward and backward pass.

    python benchmarks/router_losses.py [--repeats 40] [--only tiny] [--out benchmarks/results/router-losses-cpu.json]

Three variants of the same step take turns in one process, in changing order: without router losses, attached (z-loss and
balancing loss, with statistics), and "recorded" (the usual way: `output_router_logits=True`, then the two functions).
Reported are the median and the best time, and of the ratios within a turn the median and quartiles; on a CPU of processor
time. Where a step varies by more than the losses cost, `share` says more: one router alone, forward and backward, with and
without, hundreds of times, times the layers, over the step's median. Memory is what is alive after the forward pass.

tiny        Mixtral of the tiny profile's shape, all weights trained in fp32: the cheapest step, so the dearest losses
tiny-qlora  the tiny profile as the course trains it: NF4, LoRA, its checkpointing
medium      hidden 512, intermediate 1792, 4 layers
mixtral     one GPU only: Mixtral-8x7B's layer shapes, 2 layers, bf16
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.experts import LiveBytes
from helpers import activation_checkpointing
from helpers.environment import hardware, versions
from helpers.files import write_json
from helpers.router_losses import attach_router_losses, load_balancing_loss, router_z_loss

VARIANTS = ("without", "attached", "recorded")
Z, B = 1e-3, 1e-3
SIZES = {  # hidden, intermediate, layers, heads, rows, tokens per row
    "tiny": (128, 128, 4, 4, 4, 512),
    "medium": (512, 1792, 4, 8, 2, 512),
    "mixtral": (4096, 14336, 2, 32, 4, 2048),
}


def mixtral(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 2424) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(2, heads // 4),
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.0,
    )
    return MixtralForCausalLM(config).train()


def batch(rows: int, length: int, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    """Random tokens, the second half of the first row padding."""
    ids = torch.randint(3, vocabulary, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    made = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {k: v.to(device) for k, v in made.items()}


def forward(model, inputs: dict, variant: str) -> torch.Tensor:
    if variant != "recorded":
        return model(**inputs, use_cache=False).loss
    out = model(**inputs, use_cache=False, output_router_logits=True)
    x, mask = out.router_logits, inputs["attention_mask"]
    return out.loss + Z * router_z_loss(x, mask) + B * load_balancing_loss(x, 2, mask)


def timed(model, inputs: dict, repeats: int) -> dict:
    """Seconds by variant, and the ratios to `without` within a turn."""
    cuda = inputs["input_ids"].is_cuda
    clock = time.perf_counter if cuda else time.process_time
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for turn in range(repeats + 1):
        for i in range(len(VARIANTS)):
            variant = VARIANTS[(i + turn) % len(VARIANTS)]
            handle = attach_router_losses(model, Z, B) if variant == "attached" else None
            model.zero_grad(set_to_none=True)
            gc.collect()
            if cuda:
                torch.cuda.synchronize()
            started = clock()
            forward(model, inputs, variant).backward()
            if cuda:
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                seconds[variant].append(clock() - started)
            if handle:
                handle.remove()
    result = {}
    for variant, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["without"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[variant] = {"median_seconds": statistics.median(values), "best_seconds": min(values)}
        result[variant] |= {"best_ratio": min(values) / min(seconds["without"]), "ratio": middle, "quartiles": [low, high]}
    return result


def one_router(model, inputs: dict, repeats: int = 400) -> float:
    """Seconds that the losses add to one router's forward and backward pass."""
    handle = attach_router_losses(model, Z, B)
    handle.valid, router = inputs["attention_mask"], handle.routers[0]
    hidden = torch.randn(handle.valid.numel(), model.config.hidden_size, dtype=model.dtype, device=model.device)
    hidden.requires_grad_()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * repeats):
        training = turn % 2 == 1
        model.train(training)
        handle._enter(model, (), {})  # as if the model had begun a pass, in evaluation or training
        router.train()
        if hidden.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        router(hidden)[1].sum().backward()
        if hidden.is_cuda:
            torch.cuda.synchronize()
        seconds[training].append(time.perf_counter() - started)
        handle._leave(model)
    model.train()
    handle.remove()
    return statistics.median(seconds[True]) - statistics.median(seconds[False])


def retained(depth: int, checkpointing: bool, variant: str) -> int:
    """Bytes of tensors alive after the forward pass of a tiny model, weights and gradients not counted."""
    torch.manual_seed(0)
    hidden, intermediate, _, heads, rows, length = SIZES["tiny"]
    model, inputs = mixtral(hidden, intermediate, depth, heads), batch(rows, length, 2424, "cpu")
    if checkpointing:
        activation_checkpointing.enable(model)
    forward(model, inputs, variant)  # lazily made buffers exist now
    handle = attach_router_losses(model, Z, B) if variant == "attached" else None
    gc.collect()
    with LiveBytes() as live:
        loss = forward(model, inputs, variant)
        gc.collect()
        now = live.now
    del loss, handle
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a size; may be given more than once")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    cuda = torch.cuda.is_available()
    names = o.only or ["tiny", "tiny-qlora", "medium", *(["mixtral"] if cuda else [])]
    times, memory = {}, []
    for name in names:
        torch.manual_seed(o.seed)
        repeats = o.repeats if name.startswith("tiny") else max(5, o.repeats // 3)
        if name == "tiny-qlora":
            from helpers.profiles import PROFILES
            from helpers.training import prepare_model

            profile = PROFILES["tiny"]
            model = prepare_model(profile).train()
            if profile.gradient_checkpointing:
                activation_checkpointing.enable(model)
            model.config.router_aux_loss_coef = model.get_base_model().router_aux_loss_coef = 0.0
            inputs = batch(profile.micro_batch, profile.context, model.config.vocab_size, str(model.device))
        else:
            *shape, rows, length = SIZES[name]
            vocabulary = 32000 if name == "mixtral" else 2424
            model = mixtral(*shape, vocabulary)
            if name == "mixtral":
                model = model.to("cuda", torch.bfloat16)
            inputs = batch(rows, length, vocabulary, "cuda" if name == "mixtral" else "cpu")
        times[name] = {"tokens": inputs["input_ids"].numel(), "repeats": repeats, **timed(model, inputs, repeats)}
        own, layers = one_router(model, inputs), model.config.num_hidden_layers
        share = own * layers / times[name]["without"]["median_seconds"]
        times[name] |= {"layers": layers, "seconds_a_layer": own, "share": share}
        print(f"{name:<11}one router: {own * 1e6:.0f} µs more; {layers} layers are {100 * share:.2f} % of a step")
        for variant in VARIANTS:
            t = times[name][variant]
            quartiles = "–".join(f"{100 * (q - 1):+.2f}" for q in t["quartiles"])
            print(f"{name:<11}{variant:<10}{t['median_seconds'] * 1e3:>9.1f} ms, best {t['best_seconds'] * 1e3:.1f}", end="")
            print(f"   in a turn {100 * (t['ratio'] - 1):+.2f} % ({quartiles}), best {100 * (t['best_ratio'] - 1):+.2f} %")
        del model
    if "tiny" in names:
        for checkpointing in (False, True):
            for depth in (2, 4, 8):
                row = {"checkpointing": checkpointing, "layers": depth}
                row |= {v: retained(depth, checkpointing, v) for v in VARIANTS}
                memory.append(row)
                extra = {v: row[v] - row["without"] for v in VARIANTS[1:]}
                print(f"checkpointing {checkpointing!s:<6}{depth} layers: {row['without'] / 2**20:7.2f} MiB alive", end="")
                print("".join(f", {v} {extra[v] / 1024:+.1f} KiB" for v in extra))
    if o.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        facts = {"settings": {k: v for k, v in vars(o).items() if k != "out"}, "threads": torch.get_num_threads()}
        facts |= {"sizes": SIZES, "times": times, "bytes_alive_after_forward": memory}
        facts |= {"hardware": hardware(), "versions": versions(), "commit": commit}
        write_json(o.out, facts)


if __name__ == "__main__":
    main()
