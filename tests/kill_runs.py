"""Trains in forked children that come to grief: kill -9 at random moments, Ctrl-C, a disk that is full. Called by test_resume.

python -m tests.kill_runs BASE FOLDER KILLS SEED   prints a JSON report in its last line; FOLDER/plain is a run left alone

One process imports everything once; each child is a fork of it, so a try costs what the training costs.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from helpers import environment
from helpers.resume import MARK
from tests import small_runs

STEPS = 150


def start(base: Path, folder: Path, room: int | None = None) -> int:
    """Fork a child that trains; returns its process id. room: bytes that any one file may have."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        if room is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        torch.set_num_threads(1)
        result = small_runs.train(base, folder, small_runs.small_profile(base, max_steps=STEPS, save_steps=5))
        code = 0 if result.finished else 130
    except OSError as error:
        (folder.parent / "message").write_text(str(error))
        code = 2
    finally:
        os._exit(code)


def unsealed(folder: Path) -> list[str]:
    """Checkpoints that are being written, or whose writing was cut off."""
    return [p.name for p in folder.glob("checkpoint-*") if not (p / MARK).exists()]


def ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] != 0


def kill_somewhere(child: int, folder: Path, rng: random.Random) -> str:
    """kill -9 after a while; every other time during or right after the writing of a checkpoint. Returns where it hit."""
    before = set(unsealed(folder))
    if rng.random() < 0.5:
        while not set(unsealed(folder)) - before:
            if ended(child):
                return "finished"
            time.sleep(0.001)
        time.sleep(rng.choice((0.0, 0.0, rng.uniform(0, 0.15))))  # a fast disk needs less than a hundredth of a second
    else:
        time.sleep(rng.uniform(0.2, 1.5))
    if ended(child):
        return "finished"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "while writing" if set(unsealed(folder)) - before else "between"


def main(base: str, folder: str, kills: str, seed: str) -> None:
    environment.quiet()
    gc.freeze()  # or the children would spend most of their time on collecting garbage
    folder, rng = Path(folder) / "run", random.Random(int(seed))
    report: dict = {"plain": os.waitstatus_to_exitcode(os.waitpid(start(Path(base), folder.with_name("plain")), 0)[1])}

    child = start(Path(base), folder)  # Ctrl-C, once a first checkpoint is whole
    while not list(folder.glob(f"checkpoint-*/{MARK}")):
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    report["interrupted"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    size = max(p.stat().st_size for p in folder.glob("checkpoint-*/optimizer.pt"))
    child = start(Path(base), folder, room=size // 2)
    report["full"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    report["message"] = (folder.parent / "message").read_text()

    report["hits"] = []
    while len(report["hits"]) < int(kills):
        report["hits"].append(kill_somewhere(start(Path(base), folder), folder, rng))
    report["last"] = os.waitstatus_to_exitcode(os.waitpid(start(Path(base), folder), 0)[1])
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
