"""A training step of Mixtral-8x7B on a CUDA GPU: tokens per second, peak memory, share of what the GPU's multipliers can do.

    python benchmarks/experts_gpu.py [--minutes 12] [--out build/experts-gpu.json] [--cases ceiling steps …]

The model has Mixtral's real shapes and random NF4 weights that are made on the GPU and were never anything but 4-bit (23 GiB),
LoRA r = 32 on attention, experts and router, gradient checkpointing, and the loss that never builds the logits. A step is
forward, recomputation, backward and Adam. The share is

    FLOPs of the step / (time · FLOP/s of a large bf16 matrix product, measured on the same GPU in the same process)

with FLOPs counted from the shapes: 2 for each weight and token in the forward pass, 2 again in the recomputation (which ends
before the experts' down projection), 2 for the
gradient of the inputs, 2 more for the gradient of LoRA weights, and attention. The cases, most important first:

ceiling     the matrix product
steps       whole steps, one row of 4k tokens, one of 10k, four of 10k
profile     what takes the time in one step, and how often Python waits for the GPU
compare     the same step on fewer layers (--compare-layers): ours, stock PEFT on unquantised experts, and bitsandbytes'
            parametrisation with PEFT's product; both have 16-bit attention and no dropout, which is to their advantage
routers     the same step with z-loss and balancing loss, in turns with one without
attention   rows packed from four documents: SDPA with its mask and document by document, flex_attention, flash-attn if there
kernels     steps through torch's kernels, in turns with those of `helpers.fused`, and with norms and attention compiled, too
decode      tokens that one conversation, and 64 at once, get per second after 256 tokens each: experts through bitsandbytes'
            fused product, in turns with unpacking them

What a case measured is written at once; a case that fails (memory, a missing package) leaves its error in the result, and the
next one runs. After `--minutes` no further measurement begins. `--smoke` runs everything on tiny shapes on the CPU, in a minute.
It needs torch, transformers, peft and bitsandbytes, and no network. benchmarks/results/ holds what an H200 gave for the first
three cases; the others have not been run on a GPU.
"""

# ruff: noqa: E402  (what is missing is said before it is imported)
from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

NEEDED = ("torch", "numpy", "yaml", "safetensors", "transformers", "peft", "accelerate", "bitsandbytes")
if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"missing here: {', '.join(absent)}. Install them first; without a network, from wheels that you bring along")

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # rows of several lengths would leave gaps

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from helpers import activation_checkpointing, budget, experts, fused, losses, nf4, qlora
from helpers.audit import audit
from helpers.environment import hardware, versions
from helpers.files import write_json
from helpers.quantization import random_4bit
from helpers.rehearsal import CARD_TOKENS
from helpers.router_losses import attach_router_losses

WARM = {"cuda": 4.0}  # seconds of calls before those that are timed


class Clock:
    """The time that is left. The first measurement of a case is always made, further ones while there is time."""

    def __init__(self, minutes: float):
        self.started, self.limit = time.monotonic(), 60 * minutes

    @property
    def now(self) -> float:
        return time.monotonic() - self.started

    @property
    def over(self) -> bool:
        return self.now >= self.limit

    def say(self, text: str) -> None:
        print(f"[{self.now:6.1f} s] {text}", flush=True)


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
    spared = 2 * layers * k if checkpointing else 0  # the recomputation ends before the experts' down projection
    found = {name: float(passes * weights * tokens) for name, weights in frozen.items()}
    found["experts"] -= float(spared * h * i * tokens)
    found["adapters"] = float(((passes + 2) * lora - spared * rank * (h + i)) * tokens)  # and the gradient of their weights
    # scores and their product with the values: 2 · 2 · row · q a token forward, half of it masked; backward is 2.5 times that
    found["attention scores"] = float(layers * tokens * 2 * row * q * ((2 if checkpointing else 1) + 2.5))
    found["head"] = float(2 * 2 * h * v * tokens)  # forward and the gradient of the hidden states, in one go
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, repeats: int, clock: Clock | None = None) -> list[float]:
    """Seconds of each of `repeats` calls; fewer, but at least one, when time is over. 0: of one call, without any before it.

    Before them come calls that warm up: one, and on a GPU as many as take `WARM` seconds. It loads a kernel when it is first
    used, and which product takes which one depends on its number of rows, another one for each expert and step.
    """
    found: list[float] = []
    begun, warm = time.perf_counter(), not repeats
    while len(found) < max(1, repeats):
        if found and clock and clock.over:
            break
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        if warm:
            found.append(time.perf_counter() - started)
        warm = warm or time.perf_counter() - begun >= WARM.get(device.type, 0)
    return found


def ceiling(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """FLOP/s of a square matrix product: the most that this GPU gives in practice."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, device, repeats))


def shapes(o: argparse.Namespace, layers: int | None = None):
    from transformers import MixtralConfig

    return MixtralConfig(
        hidden_size=o.hidden, intermediate_size=o.intermediate, num_hidden_layers=layers or o.layers, num_local_experts=o.experts,
        num_attention_heads=o.heads, num_key_value_heads=max(1, o.heads // 4), vocab_size=o.vocabulary, use_cache=False,
        max_position_embeddings=32768,
    )  # fmt: skip


class Step:
    """A whole training step of a model with adapters."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.model = model.train()
        activation_checkpointing.enable(self.model)
        self.model.enable_input_require_grads()
        self.adam = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.device, self.dtype = device, dtype

    def __call__(self, rows: int, row: int, documents: int = 0) -> None:
        """`documents`: so many in each row, of equal length, told to the model by their positions; 0: a row is one."""
        ids = torch.randint(3, self.model.config.vocab_size, (rows, row), device=self.device)
        inputs = {"input_ids": ids}
        if documents:
            inputs["position_ids"] = (torch.arange(row, device=self.device) % -(-row // documents)).expand(rows, row)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = losses.completion_loss(self.model, inputs, ids, self.model.get_base_model())
        (loss / ids.numel()).backward()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def ours(o: argparse.Namespace, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Experts, attention and all in NF4."""
    return qlora.add_lora(random_4bit(shapes(o, layers), dtype, device=device), r=o.rank, alpha=16, dropout=o.dropout)


def stock(o: argparse.Namespace, layers: int, device: torch.device, dtype: torch.dtype, experts_too: bool = True) -> nn.Module:
    """Everything unquantised, PEFT's own wrapper on the same parameters. It refuses dropout."""
    from peft import get_peft_model
    from transformers import MixtralForCausalLM

    with torch.device(device):
        model = MixtralForCausalLM._from_config(shapes(o, layers), dtype=dtype).requires_grad_(False)
    settings = qlora.lora_config(model, r=o.rank, alpha=16, dropout=0.0, experts_too=experts_too)
    return get_peft_model(model, settings).to(device)


def parametrised(o: argparse.Namespace, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' own 4-bit parameters for the experts, with the product that PEFT forms as a second parametrisation."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    from benchmarks.experts import _PlusProduct

    model = stock(o, layers, device, dtype, experts_too=False)
    for module in [m for m in model.modules() if experts.is_experts(m)]:
        for name in experts.STACKS:
            e, out, inner = getattr(module, name).shape
            a, b = torch.randn(e, o.rank, inner, device=device) * 0.02, torch.zeros(e, out, o.rank, device=device)
            replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4", blocksize=64)
            product = _PlusProduct(nn.Parameter(a), nn.Parameter(b))
            nn.utils.parametrize.register_parametrization(module, name, product, unsafe=True)
    return model


VARIANTS = {
    "nf4 (ours)": ours,
    "unquantised experts + PEFT target_parameters": stock,
    "bitsandbytes parametrisation + PEFT's product": parametrised,
}


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measured(work: Callable[[], object], device: torch.device, repeats: int, clock: Clock) -> dict:
    """Seconds (median, quartiles) and peak memory of some work, or why there are none."""
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        seconds = timed(work, device, repeats, clock)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).partition(".")[0]}
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    found = {"seconds": median, "quartiles": [low, high], "repeats": len(seconds)}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / budget.GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / budget.GIB
    return found


KERNELS = {
    "attention": ("sdpa", "flash", "fmha"),
    "unpacking": ("dequantize", "_unpack"),
    "products": ("nvjet", "gemm", "gemv", "cutlass", "xmma", "aten::mm", "aten::addmm", "aten::bmm"),
    "fused": ("_gate", "_take", "_by_token", "_thin_product"),
}


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KERNELS.items() if any(part in name for part in parts)), "the rest")


class Bench:
    """The cases. Each is a generator: what it yields is a result so far, which is written before it goes on."""

    def __init__(self, o: argparse.Namespace, clock: Clock):
        self.o, self.clock, self.device, self.dtype = o, clock, torch.device(o.device), getattr(torch, o.dtype)
        self.top = 0.0  # FLOP/s
        self._step: Step | None = None

    def step(self) -> Step:
        """The whole model, made when it is first needed."""
        if self._step is None:
            free(self.device)
            started = time.perf_counter()
            self._step = Step(ours(self.o, self.o.layers, self.device, self.dtype), self.device, self.dtype)
            synchronize(self.device)
            self.clock.say(f"model of {self.o.layers} layers made in {time.perf_counter() - started:.1f} s")
        return self._step

    def forget(self) -> None:
        self._step = None
        free(self.device)

    def failed(self) -> None:
        """After an error: gradients of a half-made step would count as memory of the next one."""
        if self._step is not None:
            self._step.adam.zero_grad(set_to_none=True)
        free(self.device)

    def run(self, work: Callable[[], object]) -> dict:
        found = measured(work, self.device, self.o.repeats, self.clock)
        if "error" in found:
            self.failed()
        return found

    def ceiling(self) -> Iterator[dict]:
        self.top = ceiling(self.device, self.dtype, self.o.ceiling_size, self.o.repeats)
        self.clock.say(f"ceiling: {self.top / 1e12:.1f} TFLOP/s")
        yield {"tflops": self.top / 1e12, "size": self.o.ceiling_size}

    def steps(self) -> Iterator[dict]:
        o, config = self.o, shapes(self.o)
        described = budget.describe(config, self.dtype, r=o.rank)
        step, found = self.step(), []
        made = {"model": audit(step.model).table, "steps": found}
        yield made
        for tokens in o.tokens:
            if self.clock.over:
                break
            row = min(tokens, o.row)
            rows = tokens // row
            work = flops(config, rows * row, row, o.rank)
            guess = budget.estimate(described, rows, row, True, o.dropout, self.device.type)
            entry = {"tokens": rows * row, "rows": rows, "row": row, "tflop": sum(work.values()) / 1e12, "tflop_parts": work}
            entry |= {"budget_gib": guess.peak / budget.GIB, **self.run(lambda rows=rows, row=row: step(rows, row))}
            if "error" not in entry:
                speed = rows * row / entry["seconds"]
                entry |= {"tokens_per_second": speed, "hours_of_the_card": CARD_TOKENS / speed / 3600}
                if self.top:
                    entry["share_of_ceiling"] = sum(work.values()) / entry["seconds"] / self.top
            found.append(entry)
            self.clock.say(described_step(entry))
            yield made

    def profile(self) -> Iterator[dict]:
        step, (rows, row) = self.step(), (1, min(self.o.row, max(self.o.tokens)))
        found = self.profiled(step, rows, row)
        yield found
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    step(rows, row)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
            found["waits_a_step"] = dict(waits.most_common())
            self.clock.say(f"profile: Python waits {sum(waits.values())} times per step for the GPU")
            yield found

    def profiled(self, step: Step, rows: int, row: int) -> dict:
        """Where the time of one step goes, by kernel."""
        step(rows, row)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with torch.profiler.profile(activities=kinds) as profiler:
            step(rows, row)
            synchronize(self.device)
        cuda = self.device.type == "cuda"
        own, kind = ("self_device_time_total", "CUDA") if cuda else ("self_cpu_time_total", "CPU")
        # of a GPU's work the kernels only: the operations that launched them count it once more, and so do annotations
        events = [
            e for e in profiler.key_averages() if e.device_type.name == kind and not getattr(e, "is_user_annotation", False)
        ]
        events.sort(key=lambda e: -getattr(e, own))
        total = sum(getattr(e, own) for e in events)
        found = {"tokens": rows * row, "seconds": total / 1e6}
        kinds = Counter()
        for event in events:
            kinds[kind_of(event.key)] += getattr(event, own)
        found["kinds"] = {name: part / total for name, part in kinds.most_common()}
        found["top"] = [{"name": e.key[:90], "share": getattr(e, own) / total, "calls": e.count} for e in events[:20]]
        for line in found["top"][:8]:
            self.clock.say(f"profile: {line['share']:6.1%} {line['calls']:>6} x {line['name']}")
        return found

    def compare(self) -> Iterator[dict]:
        self.forget()
        found = {"layers": self.o.compare_layers, "variants": {}}
        for name, make in VARIANTS.items():
            if self.clock.over:
                break
            lines = found["variants"][name] = []
            step = None
            try:
                step = Step(make(self.o, self.o.compare_layers, self.device, self.dtype), self.device, self.dtype)
                for tokens in [t for t in self.o.tokens if t <= self.o.row]:
                    if self.clock.over and lines:
                        break
                    lines.append({"tokens": tokens, **self.run(lambda step=step, tokens=tokens: step(1, tokens))})
                    self.clock.say(f"compare: {name}: {described_step(lines[-1])}")
            except Exception as error:  # one variant's failure is no reason to lose the others
                lines.append({"error": in_a_line(error)})
                self.clock.say(f"compare: {name}: {lines[-1]['error']}")
            del step
            free(self.device)
            yield found

    def routers(self) -> Iterator[dict]:
        step, row, seconds = self.step(), min(self.o.row, max(self.o.tokens)), {"without": [], "with": []}
        valid = torch.ones(1, row, dtype=torch.bool, device=self.device)
        for repeat in range(self.o.repeats + 1):
            if seconds["with"] and self.clock.over:
                break
            for name, found in seconds.items():
                handle = attach_router_losses(step.model, 1e-3, 1e-3) if name == "with" else None
                try:
                    if handle:
                        handle.valid, handle.window_tokens = valid, row
                    (took,) = timed(lambda: step(1, row), self.device, 0)
                finally:
                    if handle:
                        handle.remove()
                if repeat:  # the first turn warms up
                    found.append(took)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        cost = medians["with"] / medians["without"] - 1
        self.clock.say(f"router losses: {cost:+.2%} of a step of {row:,} tokens")
        yield {"tokens": row, "seconds": medians, "cost": cost}

    def attention(self) -> Iterator[dict]:
        from helpers.attention import DOCUMENTS, choose_attention

        step, row = self.step(), min(self.o.row, max(self.o.tokens))
        best, why = choose_attention(type(step.model.get_base_model()), self.dtype)
        found = {"tokens": row, "documents": 4, "best": best, "why": why, "steps": {}}
        self.clock.say(f"attention: a run takes {best} here ({why})")
        for name in dict.fromkeys(["sdpa", DOCUMENTS, best, "flex_attention"]):
            step.model.get_base_model().set_attn_implementation(name)
            try:
                # one row: then transformers finds the documents itself, whatever the attention is
                found["steps"][name] = self.run(lambda: step(1, row, documents=4))
            except Exception as error:  # Triton, compilers and missing kernels have their own
                found["steps"][name] = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
                self.failed()
            finally:
                step.model.get_base_model().set_attn_implementation("sdpa")
            self.clock.say(f"attention: {name}: {described_step(found['steps'][name])}")
            yield found

    def kernels(self) -> Iterator[dict]:
        step, found = self.step(), {"steps": [], "compiled": []}
        try:
            fused.fuse(step.model)
        except ValueError as error:
            yield {"not here": str(error)}
            return
        stacks = [m for m in step.model.modules() if experts.is_experts(m)]
        plain, ours = ("torch", False, "force_eager"), ("fused", True, "force_eager")
        compiled = ("fused, rest compiled", True, "default")
        try:
            # what may fail in a compiler comes when all else has its numbers
            for name, ways, warm in (("steps", (plain, ours), 1), ("compiled", (ours, compiled), 2)):
                for tokens in sorted(self.o.tokens, reverse=True):
                    if self.clock.over:
                        break
                    row = min(self.o.row, tokens)
                    try:
                        for entries in self.in_turns(step, tokens // row, row, stacks, ways, warm):
                            yield found | {name: found[name] + entries}
                        found[name] += entries
                    except Exception as error:  # a smaller one may fit; Triton and compilers have errors of their own
                        found[name].append({"tokens": tokens, "error": in_a_line(error)})
                        self.failed()
                    for entry in found[name][-len(ways) :]:
                        self.clock.say(f"kernels: {entry.get('kernels', '')}: {described_step(entry)}")
                    yield found
                if name == "steps" and not self.clock.over:
                    self.switch(stacks, *ours[1:])
                    found["profile"] = self.profiled(step, 1, min(self.o.row, max(self.o.tokens)))
                    yield found
        finally:
            torch.compiler.set_stance("default")
            self.forget()  # its modules stay compiled

    @staticmethod
    def switch(stacks: list, on: bool, stance: str) -> None:
        """Our kernels on or off, and whether what was handed to torch.compile is compiled."""
        for module in stacks:
            module.fused_kernels = on
        torch.compiler.set_stance(stance)

    def in_turns(self, step: Step, rows: int, row: int, stacks: list, ways: tuple, warm: int) -> Iterator[list[dict]]:
        """What a step takes each way, one after the other in every round; after each round what is known so far."""
        seconds, peaks = {name: [] for name, *_ in ways}, {}
        work = sum(flops(shapes(self.o), rows * row, row, self.o.rank).values())
        for repeat in range(self.o.repeats + warm):
            if min(map(len, seconds.values())) and self.clock.over:
                break
            for name, on, stance in ways:
                self.switch(stacks, on, stance)
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                (took,) = timed(lambda: step(rows, row), self.device, 0)
                if repeat >= warm:
                    seconds[name].append(took)
                if self.device.type == "cuda":
                    peaks[name] = {"peak_gib": torch.cuda.max_memory_allocated(self.device) / budget.GIB}
            if repeat < warm:
                continue
            found = []
            for name, times in seconds.items():
                median = statistics.median(times)
                entry = {"kernels": name, "tokens": rows * row, "rows": rows, "row": row, "seconds": median}
                entry |= {"tokens_per_second": rows * row / median, "repeats": len(times), **peaks.get(name, {})}
                entry |= {"hours_of_the_card": CARD_TOKENS / entry["tokens_per_second"] / 3600}
                found.append(entry | ({"share_of_ceiling": work / median / self.top} if self.top else {}))
            yield found

    def decode(self) -> Iterator[dict]:
        model, kept = self.step().model.eval(), dict(nf4.FUSED)
        found = {"context": min(256, self.o.row), "conversations": {}}
        try:
            for rows in (1, 64):
                seconds = found["conversations"][rows] = {"fused": [], "unpacked": []}
                for repeat in range(self.o.repeats + 1):
                    if repeat > 1 and self.clock.over:
                        break
                    for name, took in seconds.items():
                        nf4.FUSED.update(kept if name == "fused" else dict.fromkeys(kept, 0))
                        one = self.decoded(model, rows, found["context"])
                        if repeat:  # the first turn warms up
                            took.append(one)
                for name, took in seconds.items():
                    speed = rows / statistics.median(took)
                    seconds[name] = {"seconds_a_token": statistics.median(took), "tokens_per_second": speed}
                    self.clock.say(f"decode: {rows} conversations, {name}: {speed:,.0f} tokens/s")
                yield found
        finally:
            nf4.FUSED.update(kept)
            model.train()

    @torch.no_grad()
    def decoded(self, model: nn.Module, rows: int, context: int, tokens: int = 8) -> float:
        """Seconds of a decoding step: the mean of a few, as each is too short to be timed alone."""
        ids = torch.randint(3, model.config.vocab_size, (rows, context), device=self.device)
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        step = functools.partial(model, use_cache=True, past_key_values=cache)
        (took,) = timed(lambda: [step(input_ids=ids[:, :1]) for _ in range(tokens)], self.device, 0)
        return took / tokens


CASES = ("ceiling", "steps", "profile", "compare", "routers", "attention", "decode", "kernels")


def described_step(entry: dict) -> str:
    if "error" in entry:
        return (f"{entry['tokens']:,} tokens: " if "tokens" in entry else "") + entry["error"]
    parts = [f"{entry['tokens']:,} tokens" if "tokens" in entry else None, f"{entry['seconds']:.3f} s"]
    if "tokens_per_second" in entry:
        parts += [f"{entry['tokens_per_second']:,.0f} tokens/s", f"the card's training {entry['hours_of_the_card']:.2f} h"]
    if "budget_gib" in entry:
        parts += [f"by the budget {entry['budget_gib']:.1f} GiB"]
    if "peak_gib" in entry:
        parts.append(f"peak {entry['peak_gib']:.1f} GiB")
    if "share_of_ceiling" in entry:
        parts.append(f"{entry['share_of_ceiling']:.1%} of the ceiling")
    return ", ".join(filter(None, parts))


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"


SIZES = {"hidden": 4096, "intermediate": 14336, "layers": 32, "experts": 8, "heads": 32, "vocabulary": 32000, "rank": 32}
SIZES |= {"row": 10240, "repeats": 5, "ceiling_size": 8192, "compare_layers": 2, "seed": 0}
SMOKE = {"hidden": 64, "intermediate": 64, "layers": 2, "heads": 4, "vocabulary": 128, "rank": 4, "row": 32, "repeats": 2}
SMOKE |= {"ceiling_size": 64, "compare_layers": 1, "tokens": [16, 32, 128], "device": "cpu", "dtype": "float32"}


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 10240, 40960], help="tokens per step")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--minutes", type=float, default=8, help="after these, no further measurement begins")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU; what else is given still holds")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "experts-gpu.json")
    if parser.parse_known_args(args)[0].smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> dict:
    o = parse(args)
    clock = Clock(o.minutes)
    if o.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: run this on a machine with one (--smoke tries it out on tiny shapes)")
    torch.manual_seed(o.seed)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    settings = {k: v for k, v in vars(o).items() if k != "out"}
    facts = {"settings": settings, "hardware": hardware(), "versions": versions(), "commit": commit, "cases": {}}
    bench = Bench(o, clock)
    for name in (c for c in CASES if c in o.cases):
        if clock.over:
            facts["cases"][name] = {"error": f"not begun: {o.minutes:g} minutes were over"}
            clock.say(f"{name}: {facts['cases'][name]['error']}")
        else:
            clock.say(f"{name} …")
            try:
                for found in getattr(bench, name)():
                    facts["cases"][name] = found
                    write_json(o.out, facts)
            except Exception as error:  # recorded: the next case may work
                facts["cases"][name] = {**facts["cases"].get(name, {}), "error": in_a_line(error)}
                clock.say(f"{name}: {facts['cases'][name]['error']}")
            bench.failed()
        facts["seconds"] = clock.now
        write_json(o.out, facts)
    clock.say(f"results in {o.out}")
    return facts


if __name__ == "__main__":
    main()
