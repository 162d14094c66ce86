"""The training run: the card's recipe on any profile, with router losses, a log to plot, and exact resume.

A thin subclass of transformers' Trainer. What it changes: the loss is computed on trained tokens only (logits of the
others are never built), router losses are normalised over the whole accumulation window, non-finite losses and gradients
stop the run before the weights are touched, and each log row goes to `log.jsonl`, from which all plots are drawn.

    run_dir/  run.json (settings, data digest)  log.jsonl  checkpoint-N/  adapter/ (stock PEFT)  result.json
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from helpers import qlora
from helpers.data import Corpus, Labelled, build_corpus, labelled_stories
from helpers.environment import hardware, versions
from helpers.profiles import Profile
from helpers.quantization import audit, load_4bit
from helpers.router_losses import RouterLosses, attach_router_losses
from helpers.stories import Story
from helpers.tokens import IGNORED, Collator

Progress = Callable[[list[dict[str, Any]]], None]


@dataclass(frozen=True)
class TrainingResult:
    """A run on disk."""

    run_dir: Path
    finished: bool
    step: int
    total_steps: int
    history: list[dict[str, Any]]  # the rows of log.jsonl
    facts: dict[str, Any]  # result.json of a finished run

    @property
    def adapter(self) -> Path:
        return self.run_dir / "adapter"


def write_json(path: Path, value: Any) -> None:
    """Atomic: readers see the old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """Rows of a run's log; a last line that was cut off by a crash is left out."""
    path = Path(run_dir) / "log.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def total_seconds(rows: list[dict[str, Any]]) -> float:
    """Training time over all sittings of a run: each row's clock starts anew when the run is resumed."""
    ends = [a["seconds"] for a, b in itertools.pairwise(rows) if b["seconds"] < a["seconds"]]
    return sum(ends) + rows[-1]["seconds"]


# ---------------------------------------------------------------------------------------------------------- trainer


class CourseTrainer(Trainer):
    """Trainer with completion-only logits and attached router losses."""

    def __init__(self, *args, router_losses: RouterLosses, **kwargs):
        super().__init__(*args, **kwargs)
        self.router_losses = router_losses
        # compute_loss divides by the trained tokens of the whole window itself
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(sum(int(b["valid"].sum()) for b in batches), device=device)
        if self.args.world_size > 1:
            tokens = self.accelerator.gather(tokens).sum()
        self.router_losses.window_tokens = int(tokens) or None
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the cross-entropy over this batch's trained tokens, divided by those of the window."""
        inputs = dict(inputs)
        labels, valid = inputs.pop("labels"), inputs.pop("valid", None)
        handle = self.router_losses
        handle.valid = valid
        scaler = getattr(self.accelerator, "scaler", None)
        handle.loss_scale = (scaler.get_scale() if scaler is not None else 1.0) * self.args.world_size
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        places = (targets != IGNORED).any(0).nonzero().squeeze(1)  # columns in which some row is trained
        outputs = model(**inputs, logits_to_keep=places, use_cache=False)
        logits = outputs.logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, places].flatten(), ignore_index=IGNORED, reduction="sum")
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(items, device=loss.device).clamp_min(1) * self.args.world_size
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the weights are untouched. "
                f"Resume from the last checkpoint with a lower learning rate"
            )
        return (loss, outputs) if return_outputs else loss


class Log(TrainerCallback):
    """Rows of loss, learning rate, gradient norm and router metrics → log.jsonl and a progress function."""

    def __init__(self, run_dir: Path, handle: RouterLosses, corpus: Corpus, progress: Progress | None):
        self.path, self.handle, self.progress = run_dir / "log.jsonl", handle, progress
        self.rows: list[dict[str, Any]] = []
        self.tokens_per_row = corpus.tokens / len(corpus.rows)
        self.verified = False

    def on_train_begin(self, args, state, control, **kwargs):
        # Rows after the checkpoint belong to steps that will be made again.
        self.rows = [r for r in read_log(self.path.parent) if r["step"] <= state.global_step]
        partial = self.path.with_name("log.jsonl.partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in self.rows), encoding="utf-8")
        os.replace(partial, self.path)
        self.handle.reset()
        self.started, self.first = time.monotonic(), state.global_step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.stack([g.isfinite().all() for g in grads]).all():
            if args.fp16:  # the gradient scaler skips such a step and lowers its scale
                return
            raise FloatingPointError(f"a gradient is not finite at step {state.global_step + 1}; the weights are untouched")
        if not self.verified:
            self.handle.verify()
            self.verified = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        done = state.global_step - self.first
        seconds = time.monotonic() - self.started
        rows = done * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        layers = self.handle.layer_metrics()
        row = {
            "step": state.global_step,
            "of": state.max_steps,
            "epoch": round(state.epoch, 4),
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            **{k: round(v, 6) for k, v in self.handle.metrics.items()},
            "load": [[round(x, 4) for x in layer] for layer in layers["load"].tolist()] if layers else None,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(rows * self.tokens_per_row / max(seconds, 1e-9)),
        }
        self.handle.reset()
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.progress is not None and state.is_world_process_zero:
            self.progress(self.rows)


def print_progress(rows: list[dict[str, Any]]) -> None:
    """One line a log row, with the share done and the time left."""
    r = rows[-1]
    steps_done = r["step"] - (rows[-2]["step"] if len(rows) > 1 else 0)
    per_step = (r["seconds"] - (rows[-2]["seconds"] if len(rows) > 1 and rows[-2]["seconds"] < r["seconds"] else 0)) / max(
        1, steps_done
    )
    left = (r["of"] - r["step"]) * per_step
    print(
        f"step {r['step']:>5}/{r['of']}  loss {r['loss']:.3f}  z {r.get('router/z', 0):.2f}  "
        f"{r['tokens_per_second']:,} tokens/s  {left / 60:.0f} min left",
        flush=True,
    )


class StopAfter(TrainerCallback):
    """Ends a run early with a checkpoint, as an interruption would: for showing that it resumes."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


class Interruptible(TrainerCallback):
    """Ctrl-C (or a notebook's stop button) ends the step, writes a checkpoint and stops; a second one stops at once."""

    asked = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        print("\nstopping after this step …", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


# -------------------------------------------------------------------------------------------------------------- run


def arguments(profile: Profile, run_dir: Path, log_every: int = 10) -> TrainingArguments:
    """The profile as transformers' TrainingArguments: Adam (0.9, 0.999, 1e-8), cosine, warm-up steps."""
    cuda = torch.cuda.is_available()
    checkpointing: dict[str, Any] = {}
    if profile.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(run_dir),
        per_device_train_batch_size=profile.micro_batch,
        gradient_accumulation_steps=profile.accumulation,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=profile.warmup_steps,
        num_train_epochs=profile.epochs,
        max_steps=profile.max_steps,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=profile.seed,
        data_seed=profile.seed,
        bf16=cuda and profile.dtype == "bfloat16",
        fp16=cuda and profile.dtype == "float16",
        use_cpu=not cuda,
        **checkpointing,
        logging_steps=log_every,
        logging_first_step=True,
        save_steps=profile.save_steps,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )


def prepare_model(profile: Profile):
    """The profile's base model in audited 4 bit with fresh adapters."""
    set_seed(profile.seed)  # LoRA's initial A is random
    model = load_4bit(profile.base_path, dtype=profile.dtype)
    model.config.use_cache = False
    model = qlora.add_lora(
        model, profile.lora_r, profile.lora_alpha, profile.lora_dropout, experts=profile.lora_experts, router=profile.lora_router
    )
    if profile.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def settings(profile: Profile, corpus: Corpus | None = None) -> dict[str, Any]:
    """What must be unchanged for a run to be continued; without a corpus, only the profile."""
    kept = {k: v for k, v in dataclasses.asdict(profile).items() if k not in ("reasons", "memory_gib", "save_steps")}
    return {"profile": kept, "data": corpus.digest if corpus else None}


def _check_settings(run_dir: Path, wanted: dict[str, Any]) -> None:
    path = run_dir / "run.json"
    if not path.exists():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{k}: {found['profile'].get(k)!r} then, {v!r} now" for k, v in wanted["profile"].items() if found["profile"].get(k) != v
    ]
    if wanted["data"] and found["data"] != wanted["data"]:
        changed.append("the stories, their labels or the tokenizer")
    if changed:
        raise ValueError(
            f"{run_dir} holds a run with other settings ({'; '.join(changed)}): use another output folder, or delete it"
        )


def train(
    profile: Profile,
    stories: Sequence[Story] | Sequence[Labelled] | None,
    output_dir: str | Path,
    resume: bool = True,
    progress: Progress | None = print_progress,
    log_every: int = 10,
    stop_after: int | None = None,
) -> TrainingResult:
    """Train adapters; continue from the last checkpoint if there is one; return at once if the run is finished.

    stories: stories, or (story, lengths) pairs, or None for those of the profile. `resume=False` refuses a folder that
    already holds a run. `stop_after` ends with a checkpoint after that step, as an interruption would.
    """
    run_dir = Path(output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if stories is None and resume and (run_dir / "result.json").exists():
        _check_settings(run_dir, settings(profile))
        return load_result(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(profile.base_path)
    labelled = stories if stories and isinstance(stories[0], tuple) else labelled_stories(profile, stories)
    corpus = build_corpus(labelled, tokenizer, profile.context, long=profile.long_stories)
    wanted = settings(profile, corpus)
    if not resume and (run_dir / "run.json").exists():
        raise FileExistsError(f"{run_dir} already holds a run: resume it, or use another folder")
    _check_settings(run_dir, wanted)
    if (run_dir / "result.json").exists():
        return load_result(run_dir)
    write_json(run_dir / "run.json", {**wanted, "corpus": str(corpus), "versions": versions()})

    args = arguments(profile, run_dir, log_every)
    args.device  # noqa: B018  chooses this process's GPU, before the model is loaded onto the current one
    model = prepare_model(profile)
    report = audit(model).check()
    handle = attach_router_losses(model, profile.z_coef, profile.balance_coef)
    log = Log(run_dir, handle, corpus, progress)
    interruptible = Interruptible()
    trainer = CourseTrainer(
        model=model,
        args=args,
        train_dataset=corpus.rows,
        data_collator=Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id),
        callbacks=[log, interruptible, *([StopAfter(stop_after)] if stop_after else [])],
        router_losses=handle,
    )
    trainer.remove_callback(PrinterCallback)  # our log rows say more
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run_dir)))
    finally:
        handle.remove()
        interruptible.restore()
    state = trainer.state
    if state.global_step < state.max_steps:
        return TrainingResult(run_dir, False, state.global_step, state.max_steps, log.rows, {})
    model.config.use_cache = True
    qlora.save_lora(model, run_dir / "adapter")
    tokenizer.save_pretrained(run_dir / "adapter")
    facts = {
        "profile": profile.name,
        "steps": state.global_step,
        "corpus": dataclasses.asdict(dataclasses.replace(corpus, rows=[])),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "audit": report.table,
        "seconds": total_seconds(log.rows),
        "tokens_per_second": log.rows[-1]["tokens_per_second"],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "adapter_norms": qlora.adapter_norms(model),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(run_dir / "result.json", facts)
    return load_result(run_dir)


def profile_of(run_dir: str | Path) -> Profile:
    """The profile with which a run was made, from its folder."""
    fields = json.loads((Path(run_dir) / "run.json").read_text(encoding="utf-8"))["profile"]
    return Profile(**fields, memory_gib=0)


def load_result(run_dir: str | Path) -> TrainingResult:
    """A finished run from its folder."""
    run_dir = Path(run_dir)
    path = run_dir / "result.json"
    if not path.exists():
        raise FileNotFoundError(f"{run_dir} holds no finished run: train it first (python -m helpers train --output {run_dir})")
    facts = json.loads(path.read_text(encoding="utf-8"))
    return TrainingResult(run_dir, True, facts["steps"], facts["steps"], read_log(run_dir), facts)
