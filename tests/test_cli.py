"""`python -m helpers …` as a person uses it, in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from helpers.__main__ import main
from helpers.profiles import ROOT
from helpers.stories import load_stories

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


def test_stories_describes_exports_and_names_what_is_wrong(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("return_half", "page_sixty_one"):
        shutil.copy(ROOT / "data_samples" / "stories" / f"{name}.yaml", folder)
    arguments = [
        *("stories", str(folder), "--tokenizer", str(ROOT / "data_samples" / "tiny_base"), "--profile", "a100-80"),
        *("--jsonl", str(tmp_path / "out" / "all.jsonl"), "--trl", str(tmp_path / "out" / "trl.jsonl")),
        *("--axolotl", str(tmp_path / "out" / "axolotl.jsonl"), "--card", str(tmp_path / "CARD.md")),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("2 stories, 14 turns, ")
        and "| micro | 1–4 |" in said
        and "As training samples with the tokenizer" in said
    )
    assert said.split("\n\n/")[0].strip() in (tmp_path / "CARD.md").read_text(encoding="utf-8")
    assert load_stories(tmp_path / "out" / "all.jsonl") == load_stories(folder)
    for name, key in (("trl", "messages"), ("axolotl", "segments")):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 2 and all(key in json.loads(line) for line in lines)
    assert yaml.safe_load((tmp_path / "out" / "axolotl.yaml").read_text())["sequence_len"] == 10240
    assert main(["stories", str(tmp_path / "out" / "all.jsonl")]) == 0

    (folder / "bad.yaml").write_text("names: 1\n")
    assert main(["stories", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "2 stories" in out and f"error: {folder / 'bad.yaml'}:1: persona: this field is missing" in err
    (tmp_path / "CARD.md").write_text("no marks")
    assert main(arguments) == 2 and "has no lines <!-- statistics: begin -->" in capsys.readouterr().err


def test_train_lists_bad_stories_or_leaves_them_out(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("names: 1\n")
    assert main(["train", "--profile", "tiny", "--stories", str(tmp_path), "--output", str(tmp_path / "run")]) == 2
    assert "bad.yaml:1: persona" in capsys.readouterr().err


def test_what_it_prints_is_utf8_whatever_the_console(tmp_path):
    """The length table has an en dash: one byte in a Western code page of Windows, none at all in a Japanese one."""
    command = [sys.executable, "-m", "helpers", "stories", str(ROOT / "data_samples" / "stories")]
    for encoding in ("cp1252", "cp932"):
        done = subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, "PYTHONIOENCODING": encoding}, capture_output=True)
        assert done.returncode == 0 and "\N{EN DASH}" in done.stdout.decode("utf-8")
