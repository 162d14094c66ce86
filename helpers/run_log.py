"""The log of a training run: one row of numbers now and then, from which text, plots and TensorBoard are made.

`log.jsonl` holds the rows. What is measured at each step is kept until the next row, in the checkpoints too: so the log of a
run that was killed and resumed is the log of a run that was not, but for the clock.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from helpers.files import write_text
from helpers.router_losses import RouterLosses

Row = dict[str, Any]
Progress = Callable[[list[Row]], None]
CLOCK = ("seconds", "tokens_per_second", "memory_gib", "sitting")  # of a row, what differs from one sitting to the next


def read_log(run_dir: str | Path) -> list[Row]:
    """Rows of a run's log; a last line that was cut off by a crash is left out."""
    path = Path(run_dir) / "log.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def total_seconds(rows: Sequence[Row]) -> float:
    """Training time over all sittings of a run: each row's clock starts anew when the run is resumed. 0 without a row."""
    if not rows:
        return 0.0
    ends = [a["seconds"] for a, b in itertools.pairwise(rows) if _resumed(a, b)]
    return sum(ends) + rows[-1]["seconds"]


def _resumed(before: Row, now: Row) -> bool:
    """Did a new sitting begin between two rows? Rows of older versions have no number of it: there the clock has to tell."""
    return before.get("sitting") != now.get("sitting") or now["seconds"] < before["seconds"]


def memory_gib() -> float:
    """Peak of the GPU memory that tensors took; without a GPU, the process's memory now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import psutil  # accelerate and PEFT need it too

    return psutil.Process().memory_info().rss / 2**30


def merge(steps: Sequence[Row]) -> Row:
    """Steps of a window → what a log row says of them: losses averaged over steps, router numbers over tokens and layers."""
    row: Row = {"loss": sum(s["loss"] for s in steps) / len(steps)}
    routed = [s["routers"] for s in steps if s["routers"]]
    if not routed:
        return row
    tokens = sum(r["tokens"][0] for r in routed)
    layers = range(len(routed[0]["tokens"]))

    def mean(pick: Callable[[Row], float]) -> float:
        return sum(pick(r) * r["tokens"][0] for r in routed) / max(tokens, 1)

    for name in ("z", "balance", "entropy", "logsumexp", "mean", "spread"):
        row[f"router/{name}"] = round(sum(mean(lambda r, n=name, k=k: r[n][k]) for k in layers) / len(layers), 6)
    row["router/max"] = round(max(x for r in routed for x in r["max"]), 6)
    row["router/min"] = round(min(x for r in routed for x in r["min"]), 6)
    load = [[mean(lambda r, k=k, e=e: r["load"][k][e]) for e in range(len(routed[0]["load"][k]))] for k in layers]
    row["router/max_load"] = round(max(map(max, load)) * len(load[0]), 6)
    return {**row, "entropy": [round(mean(lambda r, k=k: r["entropy"][k]), 4) for k in layers],
            "load": [[round(x, 4) for x in layer] for layer in load]}  # fmt: skip


class Log(TrainerCallback):
    """Collects what a run says of itself → rows → `log.jsonl` and a progress function (of process 0).

    The trainer hands over each step (`add`). On several GPUs the losses and the data are everybody's, the router numbers
    those of process 0's share. `measure` is called for the loss on held-out stories, every `measure_every` steps.
    """

    def __init__(self, run_dir: Path, handle: RouterLosses, progress: Progress | None, measure=None, measure_every: int = 0):
        self.path, self.handle, self.progress = run_dir / "log.jsonl", handle, progress
        self.measure, self.measure_every = measure, measure_every
        self.rows: list[Row] = []
        self.window: list[Row] = []
        self.restored: Row | None = None
        self.sitting = 1  # one more with each resumption
        self.seen = 0  # tokens of this sitting

    def state(self) -> Row:
        """What a checkpoint keeps."""
        return {"rows": self.rows, "window": self.window, "sitting": self.sitting}

    def restore(self, write: bool = True) -> None:
        """The rows that the checkpoint kept, and the file as it was then."""
        kept = self.restored or {"rows": [], "window": []}
        self.rows, self.window = list(kept["rows"]), list(kept["window"])
        self.sitting = 1 + kept.get("sitting", 1 if self.restored else 0)
        if write:
            write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.rows))

    def on_train_begin(self, args, state, control, **kwargs):
        self.restore(state.is_world_process_zero)
        self.handle.reset()
        self.started, self.seen = time.monotonic(), 0

    def add(self, loss: float, tokens: int, rows: list[int]) -> None:
        """A step's loss (nats a trained token), its tokens (all but padding) and the numbers of its packed rows."""
        layers = {name: value.tolist() for name, value in self.handle.layer_metrics().items()}
        self.window.append({"loss": loss, "rows": rows, "routers": layers})
        self.handle.reset()
        self.seen += tokens

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step is always logged

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" not in logs or not self.window:
            return
        seconds = time.monotonic() - self.started
        row = {
            "step": state.global_step,
            "of": state.max_steps,
            "epoch": round(state.epoch, 4),
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            **merge(self.window),
            "rows": [n for step in self.window for n in step["rows"]],
            "seconds": round(seconds, 2),
            "tokens_per_second": round(self.seen / max(seconds, 1e-9)),
            "memory_gib": round(memory_gib(), 3),
            "sitting": self.sitting,
        }
        if self.measure and self._due(state):
            row["held_out"] = self.measure(model)
        self.window = []
        self.rows.append(row)
        if state.is_world_process_zero:
            self._append(row)
            if self.progress is not None:
                self.progress(self.rows)

    def _append(self, row: Row) -> None:
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error.strerror or error}): make room on the disk, then run the same command "
                "again; it continues from the last checkpoint"
            ) from error

    def _due(self, state) -> bool:
        """At the first and the last row, and at the first one at or behind each multiple."""
        before = self.rows[-1]["step"] if self.rows else -1
        return state.global_step >= state.max_steps or before // self.measure_every < state.global_step // self.measure_every


def duration(seconds: float) -> str:
    """12 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def describe(rows: Sequence[Row]) -> str:
    """The last row as one line: where we are, loss, speed, and the time that is left at the pace of the last two rows."""
    now = rows[-1]
    before = rows[-2] if len(rows) > 1 else {"step": 0, "seconds": 0.0}
    if len(rows) > 1 and _resumed(before, now):  # the clock began anew
        before = {"step": before["step"], "seconds": 0.0}
    pace = (now["seconds"] - before["seconds"]) / max(1, now["step"] - before["step"])
    left = duration((now["of"] - now["step"]) * pace)
    text = (
        f"step {now['step']:>5}/{now['of']}  epoch {now['epoch']:.2f}  loss {now['loss']:.3f}  norm {now['grad_norm'] or 0:.2f}  "
        f"z {now.get('router/z', 0):.2f}  {now['tokens_per_second']:,} tokens/s  {left} left"
    )
    return text + (f"  held out {now['held_out']['all']:.3f}" if "held_out" in now else "")


def print_progress(rows: list[Row]) -> None:
    """A progress function for terminals: one line per row."""
    print(describe(rows), flush=True)
