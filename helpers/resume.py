"""Checkpoints that survive a kill at any moment, and what is refused when a run is continued.

    run_dir/  run.json (settings, data digest)  log.jsonl  checkpoint-N/  adapter/ (stock PEFT)  result.json

transformers' Trainer writes `checkpoint-N`: adapters, optimizer, learning rate, random states. When all of it is on the disk, a
file `complete.json` with the checksum of each file is put beside them in one atomic step. A folder without it was cut off
while it was written: it is passed over, and nothing else is lost.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from helpers.checkpoints import identity
from helpers.data import Corpus
from helpers.files import read_json, sha256, sync, write_json
from helpers.profiles import KEPT_CHECKPOINTS, Profile
from helpers.run_log import Log, read_log

MARK, PROGRESS = "complete.json", "progress.json"
DELETED = "deleted-"
NEEDED = (PROGRESS, "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")  # of a checkpoint
NOT_COMPARED = ("reasons", "memory_gib", "save_steps")  # of a profile: they may change while a run rests


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Nobody else trains into the folder meanwhile: ValueError if somebody does. A process that dies gives it free.

    Some file systems have no locks (Google Drive's, mounted): there nothing is watched.
    """
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another training is writing into {run_dir}: let it end, or use another output folder") from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


def settings(profile: Profile, corpus: Corpus | None = None, processes: int | None = None) -> dict[str, Any]:
    """What must be unchanged for a run to be continued: profile, the base's weights, data, number of processes.

    What is not given (corpus, processes) is not compared: for a finished run, say, it no longer matters how many made it.
    """
    kept = {k: v for k, v in dataclasses.asdict(profile).items() if k not in NOT_COMPARED}
    found = {"profile": kept, "base": identity(profile.base_path), "data": None, "processes": processes}
    return found | ({"data": corpus.digest, "parts": corpus.parts, "corpus": str(corpus)} if corpus else {})


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """In what two settings differ, in words; "" if in nothing."""
    then, now = found["profile"], wanted["profile"]
    changed = [f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in {**now, **then} if then.get(k) != now.get(k)]
    if found["base"] != wanted["base"]:
        changed.append(f"the weights of the base {now.get('base')!r}")
    if wanted["data"] and found["data"] != wanted["data"]:
        then, now = found.get("parts", {}), wanted.get("parts", {})
        what = [name for name in now if name in then and then[name] != now[name]]
        if not what:
            what = ["the tokenizer"] if then and now else ["the stories, their labels or the tokenizer"]
        changed.append(f"{' and '.join(what)} ({found.get('corpus', 'other data')}, then; {wanted.get('corpus')}, now)")
    before, here = found.get("processes"), wanted.get("processes")  # runs of older versions do not say
    if before and here and before != here:
        changed.append(f"{before} processes then, {here} now, and so other rows per step; start as many again")
    return "; ".join(changed)


def begun(run_dir: Path) -> bool:
    """Is there anything that another run would destroy: a checkpoint, an adapter, a row of the log, a result?"""
    made = any((run_dir / name).exists() for name in ("result.json", "adapter"))
    return made or any(run_dir.glob("checkpoint-*")) or bool(read_log(run_dir))


def check_settings(run_dir: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """run.json of the run that is to be continued; {} if there is none, or one that failed before its first row.

    ValueError with the difference if the folder holds a run with other settings, or what is no run at all.
    """
    path = run_dir / "run.json"
    if not path.exists():
        kinds = ("checkpoint-*", "result.json", "adapter", "log.jsonl")  # what a run would overwrite
        if found := [path.name for kind in kinds for path in sorted(run_dir.glob(kind))]:
            raise ValueError(f"{run_dir} holds {found[0]} but no run.json, so it is not ours to continue: use another folder")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = difference(found, wanted)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not begun(run_dir):
            return {}
        raise ValueError(f"{path} cannot be read ({error}): delete it with its checkpoints, or use another folder") from error
    if changed and begun(run_dir):
        raise ValueError(f"{run_dir} holds a run with other settings ({changed}): use another output folder, or delete it")
    return {} if changed else found


def last_step(checkpoint: Path) -> int | None:
    """The run's number of steps, if this checkpoint was made behind the last of them; else None."""
    state = read_json(checkpoint / "trainer_state.json", "take this checkpoint out of the folder")
    return state["global_step"] if state["global_step"] >= state["max_steps"] else None


def _step(folder: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def seal(folder: Path, wanted: dict[str, Any]) -> None:
    """Mark a checkpoint as whole: checksums of its files, after all of them are on the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MARK, MARK + ".partial"))
    for file in files:
        sync(file)
    sync(folder)
    sums = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    write_json(folder / MARK, {"step": _step(folder), "settings": wanted, "files": sums})
    sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed checkpoint's files, or None."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        files, _ = mark["files"], difference(mark["settings"], mark["settings"])  # which reads all that it needs
        if unlisted := [name for name in NEEDED if name not in files]:
            return f"{MARK} does not list {unlisted[0]}"
        for name, fact in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != fact["bytes"] or sha256(folder / name) != fact["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARK} cannot be read ({error})"
    return None


def last_good(run_dir: Path, wanted: dict[str, Any], say=print) -> Path | None:
    """The newest checkpoint that is whole; None if there is none yet.

    Cut-off ones are passed over, and damaged ones if an older one is whole (the result is the same, it only takes longer).
    ValueError for a checkpoint of another run, and if all that were finished are damaged.
    """
    damaged = []
    for folder in sorted((p for p in run_dir.glob("checkpoint-*") if _step(p) >= 0), key=_step, reverse=True):
        if not (folder / MARK).exists():
            say(f"{folder.name} was cut off while it was written: passed over")
            continue
        if problem := damage(folder):
            damaged.append(f"{folder.name}: {problem}")
            say(f"{folder.name} is damaged ({problem}): passed over")
            continue
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if changed := difference(mark["settings"], wanted):
            raise ValueError(f"{folder} belongs to another run ({changed}): take it out of this folder")
        return folder
    if damaged:
        raise ValueError(
            f"no whole checkpoint is left in {run_dir} ({'; '.join(damaged)}): delete them to start from the beginning"
        )
    return None


class Checkpoints(TrainerCallback):
    """Seals each checkpoint that the Trainer has written, and deletes all but the last `keep` whole ones.

    `since`: the one that the run goes on from. Those behind it were cut off or are damaged, so they do not count, and go.
    """

    def __init__(self, run_dir: Path, wanted: dict[str, Any], log: Log, keep: int = KEPT_CHECKPOINTS, since: Path | None = None):
        self.run_dir, self.wanted, self.log, self.keep = run_dir, wanted, log, keep
        first = _step(since) if since else 0
        self.useless = {p for p in run_dir.glob("checkpoint-*") if _step(p) > first}
        self.writing = False  # a failure now is a failure to write

    def on_step_end(self, args, state, control, **kwargs):
        self.writing = control.should_save and not control.should_log
        if control.should_save and state.is_world_process_zero:  # of an earlier sitting, cut off or about to be made again
            (self.run_dir / f"checkpoint-{state.global_step}" / MARK).unlink(missing_ok=True)

    def on_log(self, args, state, control, **kwargs):  # last of all callbacks, so what comes next is the writing
        self.writing = control.should_save

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            folder = self.run_dir / f"checkpoint-{state.global_step}"
            write_json(folder / PROGRESS, self.log.state())
            seal(folder, self.wanted)
            self.useless.discard(folder)
            behind = [p for p in self.run_dir.glob("checkpoint-*") if 0 <= _step(p) <= state.global_step]
            sealed = sorted((p for p in behind if (p / MARK).exists() and p not in self.useless), key=_step)
            for old in (p for p in behind if p not in sealed[-self.keep :]):
                old.rename(old.with_name(DELETED + old.name))  # a deletion that is cut off must not look like a checkpoint
            for old in self.run_dir.glob(DELETED + "*"):
                shutil.rmtree(old)
        self.writing = False
        PartialState().wait_for_everyone()
