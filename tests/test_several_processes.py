"""Several processes make the steps of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from helpers.__main__ import main
from helpers.profiles import ROOT
from helpers.run_log import read_log
from helpers.stories import save_stories
from helpers.trainer import NumberedCollator
from helpers.training import filled
from tests import sharded_steps, small_runs


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one_with_twice_the_accumulation(tmp_path):
    """`accelerate launch` on two CPU processes (gloo), for one epoch."""
    base = small_runs.make_base(tmp_path / "base")
    # 9 rows: the last step of an epoch has one for its four places, and the second epoch is drawn anew
    save_stories([story for story, _ in small_runs.STORIES[:41]], tmp_path / "stories.jsonl")
    command = ["train", "--profile", "tiny", "--base", str(base), "--stories", str(tmp_path / "stories.jsonl")]
    command += ["--micro-batch", "2", "--epochs", "2", "--log-every", "1"]
    assert main([*command, "--accumulation", "2", "--output", str(tmp_path / "one")]) == 0
    # The command for GPUs. accelerate's own switch for several CPU processes, `--cpu`, wants MPI.
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launch,
        "--main_process_port",
        str(free_port()),
        "-m",
        "helpers",
    ]
    launch += [*command, "--accumulation", "1", "--output", str(tmp_path / "two")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished after 6 steps") == 1, "one process speaks"
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    weights, others = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert sorted(a["rows"]) == sorted(b["rows"]) and len(b["rows"]) == (1 if b["step"] in (3, 6) else 4)
        assert a["learning_rate"] == b["learning_rate"]
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-4
        assert abs(a["held_out"]["all"] - b["held_out"]["all"]) < 1e-5 if "held_out" in a else "held_out" not in b
    seen = Counter(n for row in two for n in row["rows"])
    assert set(seen.values()) == {2} and len(seen) == 9, "each row once in each epoch"
    for name, tensor in weights.items():
        assert (tensor - others[name]).norm() <= 1e-3 * tensor.norm() + 1e-7, name


@pytest.mark.slow
def test_sharded_adapters_make_the_steps_of_one_process(tmp_path):
    """FSDP2 on the 4-bit model with adapters on experts and router, on two CPU processes, without accelerate."""
    base = small_runs.make_base(tmp_path / "base")
    sharded_steps.main(str(base), tmp_path / "1.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    launch += ["tests/sharded_steps.py", str(base), str(tmp_path / "2.json")]
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert (one["sharded"], two["sharded"]) == (0, two["trainable"]) and two["trainable"] == 2 * (4 + 2 + 1)
    losses = [loss for loss, _norm in one["steps"]]
    assert losses[0] > losses[1] > losses[2], "the optimizer's steps arrive"
    torch.testing.assert_close(torch.tensor(two["steps"]), torch.tensor(one["steps"]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_a_run_under_a_sharding_engine_is_refused_in_one_sentence(engine, tmp_path, monkeypatch, capsys):
    base = small_runs.make_base(tmp_path / "base")
    save_stories([story for story, _ in small_runs.STORIES[:8]], tmp_path / "stories.jsonl")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")  # as `accelerate launch --use_fsdp` sets it
    command = ["train", "--profile", "tiny", "--base", str(base), "--stories", str(tmp_path / "stories.jsonl")]
    assert main([*command, "--output", str(tmp_path / "run")]) == 2
    assert f"error: {engine} is not supported" in capsys.readouterr().err


def test_rows_are_filled_up_so_that_nothing_is_seen_twice():
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [0, 1, 2], "number": 0, "stories": ["a"]}
    rows = filled([row] * 5, 4, pad=0)
    assert len(rows) == 8 and rows[:5] == [row] * 5 and len(filled([row] * 8, 4, 0)) == 8
    batch = NumberedCollator(0)(rows[4:])
    assert batch["valid"].sum(1).tolist() == [3, 0, 0, 0], "what fills up is padding to the router losses, too"
    assert (batch["labels"][1:] == -100).all() and torch.equal(batch["labels"][0, :3], torch.tensor([-100, 6, 7]))
