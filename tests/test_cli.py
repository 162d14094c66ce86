"""`python -m helpers …` as a person uses it, in processes of its own."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from helpers.__main__ import command_line, main
from helpers.profiles import PROFILES, ROOT
from helpers.stories import load_stories, save_stories

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


def test_every_option_says_what_it_is_for():
    (commands,) = (a for a in command_line()._actions if isinstance(a, argparse._SubParsersAction))
    assert {a.dest for a in commands._choices_actions} == set(commands.choices), "commands are listed with their purpose"
    for name, command in commands.choices.items():
        assert not [a.dest for a in command._actions if not a.help], name
        assert command.format_help()  # a stray % would be an error


def test_an_unknown_profile_and_a_missing_run_are_one_sentence(tmp_path, capsys):
    out = helpers("train", "--profile", "gpu", "--output", tmp_path)
    assert out.returncode == 2 and "unknown profile 'gpu': use one of tiny" in out.stderr and "Traceback" not in out.stderr
    assert main(["share", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


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


def test_what_is_asked_of_train_reaches_it(tmp_path, monkeypatch):
    """Each option with a value that is nobody's default, and without them the profile as it is."""
    from helpers import training

    asked = {}

    def train(profile, stories, output, **how):
        asked.update(profile=profile, stories=stories, output=output, how=how)
        raise ValueError("seen")

    monkeypatch.setattr(training, "train", train)
    own = {"max_steps": 7, "seed": 8, "z_coef": 0.25, "balance_coef": 0.75, "context": 640, "micro_batch": 3, "accumulation": 5}
    own |= {"learning_rate": 0.5, "lora_r": 6, "base": str(tmp_path)}
    options = [text for name, value in own.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    how = ["--no-resume", "--shrink", "--log-every", "9", "--attention", "eager", "--skip-bad-stories", "--anyway"]
    how += ["--keep-checkpoints", "3"]
    how += ["--fused-kernels"]
    command = ["train", "--profile", "tiny", "--output", str(tmp_path / "run")]
    assert main([*command, *options, *how]) == 2
    assert asked["profile"] == dataclasses.replace(PROFILES["tiny"], **own) and asked["output"] == tmp_path / "run"
    del asked["how"]["say"]
    wanted = {"resume": False, "shrink": True, "log_every": 9, "attention": "eager", "skip_too_long": True, "fused_kernels": True}
    wanted["keep_checkpoints"] = 3
    assert asked["how"] == wanted
    assert main(command) == 2 and asked["profile"] == PROFILES["tiny"] and asked["stories"] is None
    del asked["how"]["say"]
    assert asked["how"] == {
        "resume": True,
        "shrink": False,
        "log_every": None,
        "attention": None,
        "skip_too_long": False,
        "keep_checkpoints": 2,
        "fused_kernels": False,
    }
    main([*command, "--epochs", "2.5"])
    assert asked["profile"] == dataclasses.replace(PROFILES["tiny"], epochs=2.5, max_steps=-1)


WRONG = """
train --micro-batch 0, train --accumulation -1, train --max-steps 0, train --seed -1, train --z-coef nan, train --log-every 0,
train --epochs 0, train --learning-rate inf, train --lora-r 1.5, train --attention foo, budget --context -5, stories --trl a.yaml
"""


WRONG_ONES = [text.split() for text in WRONG.split(",")] + [["budget", "--context", "9" * 400]]  # beyond any float


@pytest.mark.parametrize("arguments", WRONG_ONES, ids=lambda a: "-".join(a)[:30])
def test_a_wrong_number_is_answered_by_its_name(arguments, tmp_path, capsys):
    command, option, value = arguments
    place = {"train": ["--output", str(tmp_path / "run")], "stories": [str(tmp_path)]}.get(command, [])
    with pytest.raises(SystemExit) as caught:
        main([command, *place, option, value])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and f"argument {option}" in said and value in said
    assert option != "--attention" or "sdpa_documents" in said
    assert not (tmp_path / "run").exists()


def test_no_output_replaces_a_story(tmp_path, capsys):
    good = ROOT / "data_samples" / "stories" / "return_half.yaml"
    own, config = tmp_path / "own.jsonl", tmp_path / "mine.yaml"
    main(["stories", str(good), "--jsonl", str(own)])
    own.write_text(own.read_text(encoding="utf-8") + "not a story\n", encoding="utf-8")
    shutil.copy(good, config)
    before = {p: p.read_bytes() for p in (own, config)}
    (tmp_path / "link.jsonl").symlink_to(own)
    new = str(tmp_path / "new.jsonl")
    refused = [
        (own, ["--jsonl", str(own)], "is the file that the stories are read from"),
        (own, ["--trl", str(tmp_path / "link.jsonl")], "is the file that the stories are read from"),
        (config, ["--axolotl", str(tmp_path / "mine.jsonl")], "is the file that the stories are read from"),
        (own, ["--axolotl", str(tmp_path / "mine.jsonl")], "which is there and is none"),
        (own, ["--jsonl", new, "--trl", new], "would both write"),
        (tmp_path, ["--jsonl", new], "would be read as one"),
    ]
    capsys.readouterr()
    for source, arguments, why in refused:
        assert main(["stories", str(source), *arguments]) == 2
        assert why in capsys.readouterr().err, arguments
    assert {p: p.read_bytes() for p in before} == before and not (tmp_path / "new.jsonl").exists()


def test_a_profile_for_a_gpu_is_refused_without_one(tmp_path, capsys):
    assert main(["train", "--profile", "t4", "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "t4 is meant for 14 GiB of GPU memory, here are 0.0" in said and "--anyway" in said


@pytest.mark.parametrize(
    ("more", "runs"),
    [([], False), (["--shrink"], True), (["--micro-batch", "1", "--accumulation", "8"], True), (["--context", "8192"], False)],
)
def test_a_profile_for_a_larger_gpu_runs_if_the_budget_says_that_it_fits(tmp_path, capsys, monkeypatch, more, runs):
    """The card's run on an A100 of 40 GB: its 4 rows do not fit, one does."""
    from helpers import environment, training

    monkeypatch.setattr(environment, "gpu_memory_gib", lambda: 39.6)
    monkeypatch.setattr(environment, "check_disk", lambda *_: environment.Check("disk", True, ""))
    monkeypatch.setattr(training, "train", lambda *_, **__: (_ for _ in ()).throw(ValueError("it began")))
    assert main(["train", "--profile", "a100-80", "--output", str(tmp_path / "run"), *more]) == 2
    said = capsys.readouterr().err
    assert ("it began" in said) == runs and ("is meant for 70 GiB" in said) != runs


def test_train_leaves_out_what_it_cannot_use_and_says_so(tmp_path, capsys):
    from tests import small_runs

    base = small_runs.make_base(tmp_path / "base")
    story = json.loads(next(iter(stories_as_lines(tmp_path))))
    long = {**story, "conversation": [{"name": "<FIRST>", "text": "Yes. " * 900}]}
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(s) + "\n" for s in (story, story, long, long)) + "{\n", encoding="utf-8")
    command = ["train", "--profile", "tiny", "--base", str(base), "--stories", str(mine), "--epochs", "1", "--lora-r", "4"]
    command += ["--context", "2000", "--learning-rate", "1e-3", "--output", str(tmp_path / "run")]
    assert main(command) == 2 and f"{mine}:5" in capsys.readouterr().err
    assert main([*command, "--skip-bad-stories"]) == 0
    said = capsys.readouterr().out
    assert f"left out: {mine}:5" in said and f"left out: {mine}:3: not even the last reply fits in 2000 tokens" in said
    assert f"left out: {mine}:4" in said and f"twice: {mine}:2 is word for word" in said and "corpus: 2 stories" in said
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["profile"]
    assert (settings["context"], settings["lora_r"], settings["learning_rate"], settings["max_steps"]) == (2000, 4, 1e-3, -1)
    mine.write_text("{\n")
    assert main([*command, "--skip-bad-stories"]) == 2 and "no story is left" in capsys.readouterr().err


def stories_as_lines(folder):
    main(["stories", str(ROOT / "data_samples" / "stories" / "return_half.yaml"), "--jsonl", str(folder / "one.jsonl")])
    return (folder / "one.jsonl").read_text(encoding="utf-8").splitlines()


def test_failures_of_libraries_are_one_sentence(tmp_path, monkeypatch, capsys):
    from safetensors import SafetensorError

    # `_read`, not `load_stories`: a module that is first imported meanwhile would keep the stand-in for all later tests.
    for error in (
        RuntimeError("2 experts are not 4-bit\nmore"),
        SafetensorError("header too small"),
        ImportError("no flash_attn"),
    ):

        def fails(_path, error=error):
            raise error

        monkeypatch.setattr("helpers.stories._read", fails)
        assert main(["stories", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert str(error).splitlines()[0] in said and "COURSE_TRACEBACK" in said and said.count("\n") == 1

    def bug(_path):
        raise KeyError("a bug of ours is not hidden")

    monkeypatch.setattr("helpers.stories._read", bug)
    with pytest.raises(KeyError):
        main(["stories", str(tmp_path)])
    monkeypatch.setenv("COURSE_TRACEBACK", "1")
    with pytest.raises(OSError, match="nothing"):
        main(["chat", str(tmp_path / "nothing")])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of one step."""
    from helpers import training
    from helpers.evaluation import held_out

    folder = tmp_path_factory.mktemp("finished")
    profile = dataclasses.replace(PROFILES["tiny"], max_steps=1, lora_r=4, context=512)
    training.train(profile, held_out(PROFILES["tiny"], 2), folder, progress=None)
    return folder


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("evaluate", "RUN", "--samples", "0"), "samples=0: at least 1"),
        (("evaluate", "RUN", "--batch-size", "-2"), "batch_size=-2: at least 1"),
        (("evaluate", "RUN", "--stories", "nowhere"), "nowhere: no such file or folder"),
        (("evaluate", "RUN", "--temperature", "nan"), "temperature=nan is out of range: at least 0"),
        (("chat", "RUN", "--stories", "nowhere"), "nowhere: no such file or folder"),
        (("share", "RUN", "--send"), "--send belongs to --push"),
        (("share", "RUN", "--public"), "--public belongs to --push"),
        (("share", "RUN", "--target", "fax"), "unknown target 'fax'"),
        (("share", "RUN", "--push", "adapter"), "USER/NAME"),
        (("share", "RUN", "--merged", "helpers"), "helpers exists: merge into another folder"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(finished_run, command, said, capsys):
    before = sorted(p.relative_to(finished_run) for p in finished_run.rglob("*"))
    assert main([str(finished_run) if part == "RUN" else part for part in command]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(p.relative_to(finished_run) for p in finished_run.rglob("*")) == before


def test_an_option_of_share_does_not_swallow_the_run(finished_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    assert main(["share", "--target", "ollama,koboldcpp", "--dataset", "me/stories", str(folder), "--char", "Ferro"]) == 0
    assert sorted(p.name for p in (folder / "adapter" / "presets").iterdir()) == ["Modelfile", "koboldcpp_adapter.json"]
    assert "Ferro:" in (folder / "adapter" / "presets" / "Modelfile").read_text(encoding="utf-8")
    assert "- me/stories" in (folder / "adapter" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_talk_through_a_pipe_is_utf8_and_kept(finished_run, tmp_path):
    stories = tmp_path / "mine.jsonl"
    save_stories(load_stories(ROOT / "data_samples" / "heldout")[:1], stories)
    command = [sys.executable, "-m", "helpers", "chat", str(finished_run), "--stories", str(stories)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "cp1252"},
        input="1\n/length micro\nCafé für zwei?\n".encode(),
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    (file,) = (finished_run / "chats").iterdir()
    assert "Café für zwei?" in file.read_text(encoding="utf-8") and str(file) in done.stdout.decode("utf-8")
    shutil.rmtree(finished_run / "chats")


@pytest.mark.slow
def test_two_trainings_do_not_share_a_folder(tmp_path):
    from filelock import FileLock

    from helpers.resume import alone

    with alone(tmp_path), pytest.raises(ValueError, match="another training is writing into"), alone(tmp_path):
        raise AssertionError("two at once")
    with FileLock(tmp_path / ".lock", timeout=0):  # as another process holds it
        command = [sys.executable, "-m", "helpers", "train", "--profile", "tiny", "--output", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, encoding="utf-8")
        assert done.returncode == 2 and "another training is writing into" in done.stderr
    with alone(tmp_path):
        pass


def test_only_names_notebooks(capsys):
    assert main(["course", "--only", "nosuch"]) == 2
    assert "no notebook's name holds 'nosuch'" in capsys.readouterr().err


@pytest.mark.slow
def test_output_that_nobody_reads_any_more_is_no_error(tmp_path):
    command = (
        f"{shlex.quote(sys.executable)} -m helpers budget --profile tiny | head -c 1 > {os.devnull}; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, encoding="utf-8")
    assert "Traceback" not in done.stderr and "Errno" not in done.stderr and done.returncode in (0, 141)


def test_a_failed_export_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    from helpers import interchange

    def fails(*_, **__):
        yield {"segments": []}
        raise ValueError("no such luck")

    monkeypatch.setattr(interchange, "axolotl_rows", fails)
    good = ROOT / "data_samples" / "stories" / "return_half.yaml"
    assert (
        main(
            [
                "stories",
                str(good),
                "--axolotl",
                str(tmp_path / "rows.jsonl"),
                "--tokenizer",
                str(ROOT / "data_samples" / "tiny_base"),
            ]
        )
        == 2
    )
    assert "no such luck" in capsys.readouterr().err and not list(tmp_path.iterdir())
