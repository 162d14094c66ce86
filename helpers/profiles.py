"""The one dial of the course: which base model, how much context, which batch, for the machine at hand.

`COURSE_PROFILE=tiny|t4|l4|a100-40|a100-80` sets it; otherwise it is chosen from the measured GPU memory and compute
capability (never from the GPU's name: Colab downgrades silently). Every profile uses the same 4-bit configuration:
NF4 with double quantisation, in every expert. What differs from the card's recipe stands in `reasons`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "COURSE_PROFILE"
KEPT_CHECKPOINTS = 2  # of a run: the last ones
RUNS = Path(os.environ.get("COURSE_RUNS") or ROOT / "runs")  # where the notebooks' runs are kept: a mounted Drive, say


@dataclass(frozen=True)
class Profile:
    """Everything that a run depends on, apart from the stories."""

    name: str
    base: str  # folder or Hub id
    memory_gib: float  # smallest device memory that it is meant for; 0 = CPU
    dtype: str  # compute dtype of the dequantised products
    context: int  # tokens in a packed row
    micro_batch: int  # rows per forward pass
    accumulation: int  # forward passes per optimizer step
    learning_rate: float
    epochs: float
    warmup_steps: int = 10
    max_steps: int = -1  # -1: by epochs
    lora_r: int = 32
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_experts: bool = True
    lora_router: bool = True
    z_coef: float = 1e-3
    balance_coef: float = 1e-3
    omit: float = 0.2  # share of replies without a length modifier
    long_stories: str = "drop"  # of a story beyond the context: "drop" the first turns, or "split" it into several samples
    gradient_checkpointing: bool = True
    save_steps: int = 4  # on a large model a step takes minutes, and a borrowed machine can vanish
    stories: str = "data_samples/stories"  # or "generated:<number>" for the tiny profile's generator
    seed: int = 42
    reasons: tuple[str, ...] = field(default=())

    def __post_init__(self):
        counts = ("context", "micro_batch", "accumulation", "lora_r", "lora_alpha", "save_steps")
        wrong = [f"{n} must be a whole number of at least 1" for n in counts if not (_whole(v := getattr(self, n)) and v >= 1)]
        if not _whole(self.max_steps) or (self.max_steps < 1 and self.max_steps != -1):
            wrong.append("max_steps must be a whole number of at least 1, or -1 for as many as the epochs take")
        if not _whole(self.warmup_steps) or self.warmup_steps < 0:
            wrong.append("warmup_steps must be a whole number of at least 0")
        if not _whole(self.seed) or not 0 <= self.seed < 2**32:
            wrong.append("seed must be a whole number from 0 to 4,294,967,295")
        wrong += [
            f"{n} must be a number above 0" for n in ("learning_rate", "epochs") if not _finite(getattr(self, n), above=True)
        ]
        wrong += [f"{n} must be a number of at least 0" for n in ("z_coef", "balance_coef") if not _finite(getattr(self, n))]
        if not 0 <= self.lora_dropout < 1:
            wrong.append("lora_dropout must be a number from 0 to below 1")
        if not 0 <= self.omit <= 1:
            wrong.append("omit must be a share from 0 to 1")
        if wrong:
            named = [f"{text}, not {getattr(self, text.split()[0])!r}" for text in wrong]
            raise ValueError(f"profile {self.name}: {'; '.join(named)}")

    @property
    def tokens_per_step(self) -> int:
        return self.context * self.micro_batch * self.accumulation

    @property
    def base_path(self) -> str:
        """`base`, with the shipped model's folder made absolute."""
        local = ROOT / self.base
        return str(local) if local.is_dir() else self.base


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: float, above: bool = False) -> bool:
    return math.isfinite(value) and (value > 0 if above else value >= 0)


FEW = (
    "the sample stories make about a dozen steps of this size, ten of them warm-up: enough to see all of it run. "
    "For a model that has learned something, bring your own stories"
)
_CARD = Profile(
    name="a100-80",
    base="mistralai/Mixtral-8x7B-v0.1",
    memory_gib=70,
    dtype="bfloat16",
    context=10240,
    micro_batch=4,
    accumulation=2,
    learning_rate=1e-4,
    epochs=3,
    reasons=("the card's recipe: 4 x 2 rows of 10k tokens, learning rate 1e-4, cosine, 10 warm-up steps, 3 epochs, seed 42", FEW),
)

PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile(
            name="tiny",
            base="data_samples/tiny_base",
            memory_gib=0,
            dtype="float32",
            context=1024,
            micro_batch=1,
            accumulation=1,
            learning_rate=4e-3,
            epochs=1,
            max_steps=1600,
            warmup_steps=40,
            lora_r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            lora_router=False,
            gradient_checkpointing=False,
            save_steps=200,
            stories="generated:3400",
            reasons=(
                "a 2 M parameter Mixtral that ships with the course: real layers, real NF4, minutes on two CPU cores",
                "fp32: bf16 products are emulated on most CPUs and slower",
                "learning rate 4e-3 and alpha 2r: a small model learns a new skill in hundreds of steps, not thousands",
                "one row of 1,024 tokens per step: it finds what a modifier means by many small steps rather than few large ones",
                "router frozen: the z-loss then acts through the hidden states alone "
                "(notebook 3 compares it with LoRA on the router)",
                "trained on generated stories: the sample stories are too few for a model that starts from nothing",
            ),
        ),
        Profile(
            name="t4",
            base="allenai/OLMoE-1B-7B-0924",
            memory_gib=14,
            dtype="float16",
            context=2048,
            micro_batch=1,
            accumulation=40,
            learning_rate=1e-4,
            epochs=3,
            long_stories="split",
            reasons=(
                "OLMoE-1B-7B: 64 experts top-8, fits 15 GiB in 4 bit with room to train",
                "fp16: compute capability 7.5 has no bf16",
                "2k context with 40 accumulation steps: the card's 81,920 tokens per step in small bites",
                "stories beyond the context are split, each part with its instruction block: no reply is lost",
                FEW,
            ),
        ),
        Profile(
            name="l4",
            base="allenai/OLMoE-1B-7B-0924",
            memory_gib=20,
            dtype="bfloat16",
            context=4096,
            micro_batch=2,
            accumulation=10,
            learning_rate=1e-4,
            epochs=3,
            long_stories="split",
            reasons=(
                "OLMoE's whole 4k context",
                "2 x 10 rows of 4k: the card's 81,920 tokens per step",
                "stories beyond the context are split, each part with its instruction block: no reply is lost",
                FEW,
            ),
        ),
        replace(
            _CARD,
            name="a100-40",
            memory_gib=37,
            micro_batch=1,
            accumulation=8,
            reasons=("the card's recipe with micro-batch 1 x accumulation 8: the same 81,920 tokens per step in 40 GB", FEW),
        ),
        _CARD,
    )
}


def choose(name: str | None = None) -> tuple[Profile, str]:
    """The profile and the reason for it: `name`, else $COURSE_PROFILE, else by measured device memory."""
    asked = name or os.environ.get(VARIABLE)
    if asked:
        if asked not in PROFILES:
            raise ValueError(f"unknown profile {asked!r}: use one of {', '.join(PROFILES)}")
        return PROFILES[asked], f"asked for by {'name' if name else '$' + VARIABLE}"
    import torch

    if not torch.cuda.is_available():
        return PROFILES["tiny"], "no CUDA GPU"
    gib = torch.cuda.mem_get_info()[1] / 2**30
    capability = torch.cuda.get_device_capability()
    oldest = {"float32": (0, 0), "float16": (7, 5), "bfloat16": (8, 0)}  # what torch still has kernels for, and what is fast
    fitting = [p for p in PROFILES.values() if p.memory_gib <= gib and capability >= oldest[p.dtype]]
    best = max(fitting, key=lambda p: p.memory_gib)
    return best, f"{gib:.1f} GiB of GPU memory, compute capability {capability[0]}.{capability[1]}"
