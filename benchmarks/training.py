"""A whole optimizer step of a small Mixtral: this course against TRL's SFTTrainer, and against the stack of the card's time.

    python benchmarks/training.py [--sizes tiny medium] [--rounds 4] [--old FOLDER] [--out benchmarks/results/training-cpu.json]

The same stories, the same trained modules (LoRA r = 16 on attention and all experts), no gradient checkpointing, one thread.
Ours: NF4 experts, packed rows, router losses on. TRL: stock transformers 5 with PEFT `target_parameters`, unquantised experts,
fp32 and bf16, one story a row. Old: transformers 4.57 + PEFT + bitsandbytes, where every expert is a 4-bit linear layer, one
story a row; it lives in a process of its own, started with the packages in FOLDER (pip install --no-deps --target FOLDER
transformers==4.57.6 huggingface-hub==0.36.0 tokenizers==0.22.1 peft==0.18.0 accelerate==1.12.0
datasets==4.4.1).

The variants take turns. `tokens_per_second` counts tokens of stories, not padding; it is the median over rounds, `spread` the
middle half of them relative to it. Memory: weights, gradients and optimizer states, and the peak of what a step makes besides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers.budget import LiveBytes  # of the package, what also works beside transformers 4

ROOT = Path(__file__).resolve().parent.parent
RANK, ROWS, STEPS = 16, 2, 3  # LoRA rank; packed rows per step; steps a round, of which the first is not timed
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SIZES = {
    "tiny": "the shipped base model: hidden 128, 4 layers, 8 experts of 128, 2,304 words",
    "medium": "hidden 512, 4 layers, 8 experts of 1,024, 32,000 words, random weights",
}


def weight_bytes(model) -> int:
    """Bytes of all parameters, each storage once, with the scales of packed ones."""
    total, seen = 0, set()
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        scales = [state.absmax, state.state2.absmax] if state is not None else []
        for t in (p, *scales):
            if t.untyped_storage()._cdata not in seen:
                seen.add(t.untyped_storage()._cdata)
                total += t.untyped_storage().nbytes()
    return total


class Variant:
    """A trainer that can be asked for a few steps at a time."""

    def __init__(self, trainer, tokens: int):
        from transformers import TrainerCallback

        self.trainer, self.tokens, self.ends = trainer, tokens, []

        class Clock(TrainerCallback):
            def on_step_end(callback, *args, **kwargs):
                self.ends.append(time.perf_counter())

        trainer.add_callback(Clock())

    def round(self) -> float:
        """Seconds a step."""
        self.ends = []
        self.trainer.train()
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)

    def memory(self) -> dict[str, float]:
        """MiB of weights with gradients and Adam's two moments, and of the peak of one forward and backward pass."""
        model = self.trainer.model
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        held = weight_bytes(model) + 3 * trained
        loader = self.trainer.get_train_dataloader()
        batches, items = self.trainer.get_batch_samples(iter(loader), 1, self.trainer.args.device)
        with LiveBytes() as peak:
            self.trainer.training_step(model, batches[0], items)
        model.zero_grad()
        return {"held_mib": held / 2**20, "peak_mib": (held + max(0, peak.peak - trained)) / 2**20}


def settings(folder: Path, rows: int) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 42,
    }


# -------------------------------------------------------------------------------------------------------- variants


def make_base(size: str, folder: Path) -> Path:
    from transformers import AutoTokenizer, MixtralForCausalLM

    from helpers.tiny import HOME, tiny_config

    if size == "tiny":
        return HOME
    torch.manual_seed(0)
    config = tiny_config(32000, hidden=512, layers=4, intermediate=1024, tie_word_embeddings=False, initializer_range=0.02)
    MixtralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(HOME).save_pretrained(folder)
    return folder


def stories(tokenizer, context: int):
    """ROWS packed rows, drawn from those of the tiny profile's training, and the stories in them one a row."""
    import dataclasses
    import random

    from helpers.data import build_corpus, labelled_stories
    from helpers.profiles import PROFILES
    from helpers.tokens import encode_all

    labelled = labelled_stories(dataclasses.replace(PROFILES["tiny"], stories="generated:200"))
    corpus = build_corpus(labelled, tokenizer, context)
    drawn = sorted(random.Random(42).sample(range(len(corpus.rows)), ROWS))
    rows, names = ([listed[k] for k in drawn] for listed in (corpus.rows, corpus.names))
    inside = {name for row in names for name in row}
    chosen = [pair for pair in labelled if pair[0].source in inside]
    single = [{"input_ids": list(s.input_ids), "labels": list(s.labels)} for s in encode_all(chosen, tokenizer, context)]
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert tokens == sum(len(s["input_ids"]) for s in single), "both sides train the same stories"
    return dataclasses.replace(corpus, rows=rows, names=names, tokens=tokens, fill=tokens / (ROWS * context)), single


def ours(base: Path, corpus, folder: Path) -> Variant:
    import dataclasses

    from transformers import TrainingArguments

    from helpers import training
    from helpers.profiles import PROFILES
    from helpers.router_losses import attach_router_losses
    from helpers.trainer import CourseTrainer, NumberedCollator

    profile = dataclasses.replace(PROFILES["tiny"], base=str(base), lora_r=RANK, lora_alpha=2 * RANK)
    model = training.prepare_model(profile)
    trainer = CourseTrainer(
        model=model,
        args=TrainingArguments(**settings(folder, ROWS), remove_unused_columns=False),
        train_dataset=corpus.numbered() * STEPS,
        data_collator=NumberedCollator(0),
        router_losses=attach_router_losses(model, 1e-3, 1e-3),
    )
    return Variant(trainer, corpus.tokens)


def stock(base: Path, single: list[dict], folder: Path, dtype: torch.dtype) -> Variant:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=ATTENTION,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    config = SFTConfig(**settings(folder, len(single)), max_length=None, gradient_checkpointing=False, bf16=False)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(single * STEPS),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora,
    )
    return Variant(trainer, sum(len(s["input_ids"]) for s in single))


def old_stack(base: Path, single: list[dict], folder: Path) -> Variant:
    """Runs with transformers 4: every expert is a module of its own, so bitsandbytes and PEFT reach it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["gate", "lm_head"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, torch_dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[*ATTENTION, "w1", "w2", "w3"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    width = max(len(s["input_ids"]) for s in single)

    def collate(rows):
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            pad = width - len(row["input_ids"])
            batch["input_ids"].append(row["input_ids"] + [0] * pad)
            batch["labels"].append(row["labels"] + [-100] * pad)
            batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * pad)
        return {k: torch.tensor(v) for k, v in batch.items()}

    args = TrainingArguments(**settings(folder, len(single)), remove_unused_columns=False)
    trainer = Trainer(model=model, args=args, train_dataset=single * STEPS, data_collator=collate)
    return Variant(trainer, sum(len(s["input_ids"]) for s in single))


def serve(base: str, stories_file: str) -> None:
    """The old stack's side: answers "round" and "memory" on stdin with a line of JSON each."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")  # libraries print on stdout
    os.dup2(2, 1)
    variant = old_stack(Path(base), json.loads(Path(stories_file).read_text()), Path(tempfile.mkdtemp()))
    import peft
    import transformers

    facts = {"versions": {"transformers": transformers.__version__, "peft": peft.__version__}}
    facts["trained"] = sum(p.numel() for p in variant.trainer.model.parameters() if p.requires_grad)
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        answer = variant.round() if line.strip() == "round" else variant.memory()
        print(json.dumps(answer), file=answers, flush=True)


class Remote:
    """The old stack in its own process, with the interface of a Variant."""

    def __init__(self, packages: Path, base: Path, single: list[dict], folder: Path):
        file = folder / "stories.json"
        file.write_text(json.dumps(single))
        command = [sys.executable, __file__, "--serve", str(base), str(file)]
        environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.facts = json.loads(self.process.stdout.readline())
        self.tokens = sum(len(s["input_ids"]) for s in single)

    def _ask(self, what: str):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def round(self) -> float:
        return self._ask("round")

    def memory(self) -> dict[str, float]:
        return self._ask("memory")


def measure(size: str, rounds: int, old: Path | None) -> dict:
    from transformers import AutoTokenizer

    from helpers.environment import quiet
    from helpers.profiles import PROFILES

    quiet()
    folder, context = Path(tempfile.mkdtemp()), PROFILES["tiny"].context
    base = make_base(size, folder / "base")
    corpus, single = stories(AutoTokenizer.from_pretrained(base), context)
    variants = {
        "ours": ours(base, corpus, folder / "ours"),
        "TRL + PEFT, fp32": stock(base, single, folder / "trl32", torch.float32),
        "TRL + PEFT, bf16": stock(base, single, folder / "trl16", torch.bfloat16),
    }
    if old:
        variants["transformers 4.57 + bitsandbytes"] = Remote(old, base, single, folder)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            seconds = variant.round()
            if number:  # the first round warms up
                times[name].append(seconds)
        print(size, number, {n: round(t[-1], 2) for n, t in times.items() if t}, flush=True)
    rows = {}
    for name, variant in variants.items():
        middle = statistics.median(times[name])
        low, _, high = statistics.quantiles(times[name], n=4)
        facts = {"seconds": middle, "spread": (high - low) / middle, "tokens": variant.tokens, **variant.memory()}
        facts["tokens_per_second"] = variant.tokens / middle
        trained = getattr(variant, "facts", {}).get("trained")
        facts["trained"] = trained or sum(p.numel() for p in variant.trainer.model.parameters() if p.requires_grad)
        rows[name] = facts | getattr(variant, "facts", {})
    for name, row in rows.items():
        # Round by round, so that a disturbance that lasts longer than a round touches both sides.
        paired = [t / o for t, o in zip(times[name], times["ours"], strict=True)]
        row["speed_of_ours"] = statistics.median(paired) * corpus.tokens / row["tokens"]
        row["memory_of_ours"] = rows["ours"]["peak_mib"] / row["peak_mib"]
    padding = 1 - sum(len(s["input_ids"]) for s in single) / (len(single) * max(len(s["input_ids"]) for s in single))
    shape = {
        "rows": len(corpus.rows),
        "context": context,
        "stories": len(single),
        "filled": corpus.fill,
        "padding_of_peers": padding,
    }
    return {"model": SIZES[size], **shape, "variants": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--old", type=Path, help="folder with the packages of the old stack")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {size: measure(size, options.rounds, options.old) for size in options.sizes}
    from helpers.environment import hardware, versions
    from helpers.files import write_json

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    facts = {"hardware": hardware(), "threads": 1, "rounds": options.rounds, "versions": versions(), "seed": 42, "commit": commit}
    for size, result in results.items():
        print(f"{size}: {result['model']}")
        for name, row in result["variants"].items():
            print(
                f"  {name:34} {row['tokens_per_second']:8,.0f} tokens/s (spread {row['spread']:.0%}) {row['peak_mib']:8.1f} MiB;",
                f"ours is {row['speed_of_ours']:.2f} times as fast at {row['memory_of_ours']:.2f} of the memory",
            )
    if options.out:
        write_json(options.out, {"sizes": results, **facts})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
