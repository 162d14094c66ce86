"""transformers' Trainer, as a run of the course uses it.

What it changes: the loss is computed on trained tokens only and never builds the logits of a batch (`losses`), router losses
are normalised over the whole accumulation window, and a loss or gradient that is not finite stops the run before the weights
are touched.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import accelerate
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available

from helpers import activation_checkpointing, losses
from helpers.attention import bounds
from helpers.profiles import Profile
from helpers.router_losses import RouterLosses
from helpers.run_log import Log, merge
from helpers.tokens import IGNORED, Collator

SKIPS = 20  # steps that fp16's gradient scaler may skip in a row: from its first scale, 65,536, down to 1/16


class Arguments(TrainingArguments):
    """TrainingArguments of a process that trains on one GPU, however many it sees.

    transformers would put a copy of the model on each (nn.DataParallel), which neither the batch of the recipe nor the hooks
    on the routers survive. Several GPUs take a process each: `accelerate launch`.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def arguments(profile: Profile, run_dir: Path, log_every: int = 10) -> Arguments:
    """The profile as transformers' TrainingArguments: Adam (0.9, 0.999, 1e-8), cosine, warm-up steps."""
    cuda = torch.cuda.is_available()
    return Arguments(
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
        **(activation_checkpointing.arguments() if profile.gradient_checkpointing else {}),
        logging_steps=log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # nothing may hide them; `_Guard` stops
        save_steps=profile.save_steps,
        save_total_limit=None,  # `resume.Checkpoints` deletes, when the newer one is sealed
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )


class RowsThenFiller(Sampler[int]):
    """The rows in accelerate's order for one process (`SeedableRandomSampler`), and behind them those that fill up (`filled`)."""

    def __init__(self, real: Sequence[bool], seed: int):
        self.real, self.seed, self.epoch = sum(real), seed, 0
        self.filler = range(self.real, len(real))
        assert all(real[: self.real]), "what fills up comes last in the data, too"

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.real, generator=generator).tolist()
        yield from self.filler

    def __len__(self) -> int:
        return self.real + len(self.filler)


class NumberedCollator(Collator):
    """Rows with a `number` → a batch that knows which rows it holds ("rows", (B,)). Rows of no story are padding throughout."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        batch["valid"][[r.get("stories") == [] for r in rows]] = False
        return {**batch, "rows": torch.tensor([r.get("number", -1) for r in rows])}


class CourseTrainer(Trainer):
    """Trainer with a loss on completions that never builds logits, and attached router losses."""

    def __init__(self, *args, router_losses: RouterLosses, log: Log | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.router_losses, self.run_log = router_losses, log
        # compute_loss divides by the trained tokens of the whole window itself
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        # A head that is sharded, quantised, adapted or followed by something else is left to the model itself.
        self.fused = not self.is_fsdp_enabled and losses.plain_head(self.model)
        self.window: list[tuple[torch.Tensor, torch.Tensor]] = []  # (loss, row numbers) of each batch since the last step
        self.add_callback(_Guard(self))

    def get_train_dataloader(self) -> DataLoader:
        """Of several processes, together the rows in the order of one."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order = RowsThenFiller([row.get("number", 0) >= 0 for row in self.train_dataset], seed)
        loader = DataLoader(self.train_dataset, self.args.train_batch_size, sampler=order, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(sum(int(b["valid"].sum()) for b in batches), device=device)
        if self.args.world_size > 1:
            tokens = self.accelerator.gather(tokens).sum()
        self.router_losses.window_tokens = int(tokens) or None
        self.window = []
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the cross-entropy over this batch's trained tokens, divided by those of the window."""
        inputs = dict(inputs)
        labels, valid, rows = inputs.pop("labels"), inputs.pop("valid", None), inputs.pop("rows", None)
        handle = self.router_losses
        handle.valid = valid
        scaler = getattr(self.accelerator, "scaler", None)
        handle.loss_scale = (scaler.get_scale() if scaler is not None else 1.0) * self.args.world_size
        inputs |= bounds(self.model, inputs["position_ids"])
        outputs = None
        if self.fused and not return_outputs:
            loss = losses.completion_loss(model, inputs, labels, self.model)
        else:
            outputs, logits, targets = losses.completion_logits(model, inputs, labels)
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(items, device=loss.device).clamp_min(1) * self.args.world_size
        self.window.append((loss.detach(), rows))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TensorBoard, and whoever else is reported to, gets the router numbers too."""
        if self.run_log is not None and self.run_log.window and "loss" in logs:
            logs.update({k: v for k, v in merge(self.run_log.window).items() if isinstance(v, float)})
        super().log(logs, start_time)


class _Guard(TrainerCallback):
    """Between backward and the optimizer's step: stops at what is not finite. After the step: hands it to the log."""

    def __init__(self, trainer: CourseTrainer):
        self.trainer, self.verified, self.skipped = trainer, False, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainer, step = self.trainer, state.global_step + 1
        parts = torch.stack([loss for loss, _ in trainer.window])
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        # Clipping comes before, and leaves zeros behind where the norm was too large for fp32.
        gone = (norm == 0) & (parts.sum() > 0)
        flags = torch.cat([parts.isfinite(), norm.isfinite().reshape(1), gone.reshape(1)])
        *found, norm, gone = flags.tolist()  # one wait for the GPU
        norm = norm and not gone
        numbers = [rows.tolist() if rows is not None else [] for _, rows in trainer.window]
        bad = [n for ok, rows in zip(found, numbers, strict=True) if not ok for n in rows]
        rows = [n for part in numbers for n in part]
        if args.world_size > 1 and not norm:  # gradients are common to all processes, so all are here; whose rows were it?
            bad, rows = ([n for part in accelerate.utils.gather_object([of]) for n in part] for of in (bad, rows))
        if bad or not all(found):
            raise FloatingPointError(f"the loss is not finite at step {step}, in {_named(trainer, bad)}. {_ADVICE}")
        # Under fp16 the gradient scaler skips such a step and halves its scale, which helps once or twice, not for ever.
        self.skipped = 0 if norm else self.skipped + 1
        if gone or self.skipped >= (SKIPS if args.fp16 else 1):
            often = f" for the {SKIPS}th time in a row, whatever the loss scale" if args.fp16 and not gone else ""
            what = "the norm of the gradient is too large" if gone else "a gradient is not finite"
            raise FloatingPointError(f"{what} at step {step}{often}, in {_named(trainer, rows)}. {_ADVICE}")
        if not self.verified:
            trainer.router_losses.verify()
            self.verified = True

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.run_log is None:
            return
        loss = torch.stack([loss for loss, _ in trainer.window]).sum()
        rows = torch.cat([rows.cpu() for _, rows in trainer.window])
        if args.world_size > 1:
            loss = accelerate.utils.reduce(loss, "mean")
            rows = torch.cat(accelerate.utils.gather_object([rows]))
        tokens = trainer.router_losses.window_tokens or 0
        trainer.run_log.add(loss.item(), tokens, [n for n in rows.tolist() if n >= 0])


# A run does not go on with other settings, so a lower learning rate needs a folder of its own.
_ADVICE = (
    "The weights are untouched and the last checkpoint is good: look at those stories, "
    "or begin again with a lower learning rate (--learning-rate) in another folder"
)


def _named(trainer: Trainer, numbers: Sequence[int]) -> str:
    """Rows by number, with the stories that are packed in them."""
    texts = []
    for n in numbers:
        stories = trainer.train_dataset[n].get("stories", ()) if n >= 0 else ()
        texts.append(f"row {n}" + (f" ({', '.join(stories)})" if stories else ""))
    return "; ".join(texts) or "an unnumbered row"


class StopAfter(TrainerCallback):
    """Ends a run early with a checkpoint, as an interruption would: for showing that it resumes."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


class Interruptible(TrainerCallback):
    """Ctrl-C, a notebook's stop button or SIGTERM ends the step, writes a checkpoint and stops; a second one stops at once."""

    asked = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, *_):
        self.asked = True
        self.restore()
        print("\nstopping after this step …", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked
        if args.world_size > 1:  # all stop at the same step, or they would wait for each other for ever
            asked = bool(accelerate.utils.reduce(torch.tensor(float(asked), device=args.device), "sum"))
        if asked:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)
