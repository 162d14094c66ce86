"""`python -m helpers …` as a person uses it, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.profiles import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COURSE_PROFILE": "tiny", "HF_HUB_OFFLINE": "1"}


def helpers(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "helpers", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        **kwargs,
    )


def test_an_unknown_profile_and_a_missing_run_are_one_sentence(tmp_path):
    out = helpers("train", "--profile", "gpu", "--output", tmp_path)
    assert out.returncode == 2 and "unknown profile 'gpu': use one of tiny" in out.stderr and "Traceback" not in out.stderr
    out = helpers("share", tmp_path)
    assert out.returncode == 2 and "holds no finished run" in out.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to a single process on Windows")
def test_train_stops_at_ctrl_c_and_continues(tmp_path):
    command = [
        sys.executable,
        "-m",
        "helpers",
        "train",
        "--stories",
        "data_samples/heldout",
        "--output",
        str(tmp_path),
        "--max-steps",
        "12",
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command continues" in output, output
    assert list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "result.json").exists()
    again = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    facts = json.loads((tmp_path / "result.json").read_text())
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert facts["steps"] == 12 and steps == sorted(set(steps))
    out = helpers("share", tmp_path)
    assert out.returncode == 0 and (tmp_path / "adapter" / "README.md").exists()
