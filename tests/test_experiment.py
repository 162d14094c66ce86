"""The whole evaluation of a run by one call, small; and what was committed of the large one."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest

from helpers import experiment, training
from helpers.evaluation import CONDITIONS, LengthTable, Size, held_out
from helpers.files import write_json
from helpers.generation import Sampling
from helpers.model_card import evaluations
from helpers.profiles import PROFILES
from helpers.stories import load_stories, save_stories

SMALL, SHORT = Size(conversations=2, samples=2, batch_size=64), Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    profile = dataclasses.replace(PROFILES["tiny"], max_steps=1, lora_r=4, context=512, micro_batch=1)
    training.train(profile, held_out(PROFILES["tiny"], 2, reply=1), folder, progress=None)
    return folder


@pytest.mark.slow
def test_a_run_is_measured_by_one_call_which_continues_if_interrupted(run, monkeypatch):
    def stop(done, total, left):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.evaluate_run(run, SMALL, SHORT, progress=stop, say=lambda text: None)
    assert list((run / "evaluation" / "replies").glob("*.jsonl"))
    said: list[str] = []
    results = experiment.evaluate_run(run, SMALL, SHORT, say=said.append)
    names = ["1-adapter", "2-adapter-deep", "3-base", "4-base-deep", "5-random", "6-random-deep"]
    tables = [LengthTable.load(p) for p in sorted((run / "evaluation").glob("*.json"))]
    assert [p.stem for p in sorted((run / "evaluation").glob("*.json"))] == names
    assert [t.reply for t in tables] == [0, 3] * 3 and len(tables[0].replies) == 2 * 2 * len(CONDITIONS)
    assert len(tables[2].replies) == 2 * len(CONDITIONS), "controls once a conversation"
    assert tables[0].label == "adapter" and tables[4].label == "random adapter"
    assert "goals reached" in said[-1] and any("adapter, deep: Spearman" in text for text in said)
    written = json.loads((run / "behaviour.json").read_text())
    assert written["conclusions"] == results["conclusions"]
    assert {"change of length", "carry-over", "unknown modifiers", "perplexity", "texts"} <= set(written)

    monkeypatch.setattr("helpers.replies.iterate_replies", None)  # a second call makes no reply again
    assert experiment.evaluate_run(run, SMALL, SHORT, say=lambda text: None) == results


@pytest.fixture
def small_run(run, tmp_path):
    """A copy of the run, and a file of the two stories that it was trained on."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("evaluation", "behaviour.json"))
    return folder, save_stories(held_out(PROFILES["tiny"], 2, reply=1), tmp_path / "trained.jsonl")


def test_the_control_is_trained_on_the_runs_own_stories(small_run, tmp_path):
    folder, trained = small_run
    _, profile = experiment.finished(folder)
    with pytest.raises(ValueError, match=r"trained on stories of yours.*--training-stories"):
        experiment.evaluate_run(folder, SMALL, SHORT, controls=True, say=lambda text: None)
    other = save_stories(held_out(PROFILES["tiny"], 3, reply=1), tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match=r"other.jsonl: not what .* was trained on"):
        experiment.trained_on(folder, profile, other)
    with pytest.raises(ValueError, match="--controls"):
        experiment.evaluate_run(folder, SMALL, SHORT, training_stories=trained, say=lambda text: None)
    assert [s.names for s, _ in experiment.trained_on(folder, profile, trained)] == [s.names for s in load_stories(trained)]
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_json(folder / "run.json", facts | {"stories": training.OF_PROFILE})
    with pytest.raises(ValueError, match="the stories of the profile: not what"):
        experiment.trained_on(folder, dataclasses.replace(profile, stories="generated:20"))


def test_the_control_is_trained_as_the_run_was(small_run, monkeypatch):
    """Two processes made the run's steps, each half of a step's rows, with an attention of their own."""
    folder, trained = small_run
    facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    write_json(folder / "result.json", facts | {"processes": 2, "attention": "eager"})
    asked = []

    def train(profile, labelled, target, **how):
        asked.append((profile, labelled, target, how))
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", train)
    with pytest.raises(KeyboardInterrupt):
        experiment.evaluate_run(folder, SMALL, SHORT, controls=True, training_stories=trained, say=lambda text: None)
    (profile, labelled, target, how), (_, own) = asked[0], experiment.finished(folder)
    assert profile == dataclasses.replace(own, accumulation=2 * own.accumulation) and how["attention"] == "eager"
    assert target == folder / "controls" / "shuffled"
    before = experiment.trained_on(folder, own, trained)
    assert [s for s, _ in labelled] == [s for s, _ in before] and [k for _, k in labelled] != [k for _, k in before]


@pytest.mark.slow
def test_the_control_is_trained_and_measured_before_the_run_is_loaded(small_run, monkeypatch):
    folder, trained = small_run
    order, real = [], experiment.load_run

    def load(place):
        order.append(Path(place).name)
        gc.collect()
        assert not [m for m in alive if m() is not None], "two models at once"
        found = real(place)
        alive.append(weakref.ref(found[1]))
        return found

    alive: list = []
    monkeypatch.setattr(experiment, "load_run", load)
    monkeypatch.setattr(experiment, "train", lambda *a, **k: training.train(*a, stop_after=None, progress=None, **k))
    said: list[str] = []
    size = Size(conversations=1, samples=1)
    results = experiment.evaluate_run(folder, size, SHORT, True, say=said.append, training_stories=trained)
    assert order == ["shuffled", "run"]
    labels = [LengthTable.load(p).label for p in sorted((folder / "evaluation").glob("*.json"))]
    assert labels[-2:] == ["shuffled labels", "shuffled labels, deep"] and len(labels) == 8
    assert any(c["claim"].startswith("shuffled labels:") for c in results["conclusions"])


def test_an_interrupted_control_is_an_interruption(small_run, monkeypatch, capsys):
    from helpers.__main__ import main

    folder, trained = small_run
    monkeypatch.setattr(experiment, "train", lambda *a, **k: training.train(*a, stop_after=1, progress=None, **k))
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    facts["profile"]["max_steps"] = 3
    write_json(folder / "run.json", facts)
    assert main(["evaluate", str(folder), "--controls", "--training-stories", str(trained)]) == 130
    assert "run the same evaluate again" in capsys.readouterr().err
    assert list((folder / "controls" / "shuffled").glob("checkpoint-*")), "its steps are kept"


@pytest.mark.slow
def test_conversations_of_ones_own_are_measured_and_named(small_run, tmp_path):
    folder, _ = small_run
    mine = save_stories(held_out(PROFILES["tiny"], 3, reply=1), tmp_path / "mine.jsonl")
    shallow = [dataclasses.replace(s, messages=s.messages[:2]) for s in load_stories(mine)]
    shallow = save_stories(shallow, tmp_path / "shallow.jsonl")
    size = Size(conversations=2, samples=1)
    said: list[str] = []
    results = experiment.evaluate_run(folder, size, SHORT, say=said.append, stories=shallow)
    assert f"2 for reply 1, none has a reply 4, so nothing is asked there; from {shallow}" in said[0]
    assert "first of 3 (--conversations" in said[0] and "not known here" in said[0]
    names = sorted(p.stem for p in (folder / "evaluation").glob("*.json"))
    assert names == ["1-adapter", "3-base", "5-random"]
    assert results["conversations"] == {"from": str(shallow), "first": 2, "deep": 0, "held out": False}
    assert "too few conversations" in said[-1]
    said.clear()
    experiment.evaluate_run(folder, size, SHORT, say=said.append, stories=mine)
    assert any("3 tables of other conversations or settings were moved" in text for text in said)
    (earlier,) = (folder / "evaluation").glob("earlier-*")
    assert sorted(p.stem for p in earlier.iterdir()) == [*names, "behaviour"], "nothing is lost"
    table = folder / "evaluation" / "7-shuffled.json"
    shutil.copy(folder / "evaluation" / "1-adapter.json", table)  # a control of some time ago
    assert len(evaluations(folder)) == 6, "the card has what was measured last"
    warmer = dataclasses.replace(SHORT, temperature=1.0)
    experiment.evaluate_run(folder, size, warmer, say=said.append, stories=mine)
    assert "7 tables of other" in "".join(said) and not table.exists(), "other settings are other results"
    with pytest.raises(ValueError, match="none of 3 conversations leaves room for a reply of 9999 tokens"):
        experiment.evaluate_run(folder, size, Sampling(max_new_tokens=9999), stories=mine, say=lambda text: None)


def test_the_summary_has_one_line_a_table():
    from tests.test_evaluation import table

    text = experiment.summary([table(lambda c, i: 5 + i), table(lambda c, i: 6 + i)])
    assert len(text.splitlines()) == 3 and "+0.00" in text


def test_the_committed_results_hold_together():
    """Numbers, tables and conclusions in the file follow from the replies in the file."""
    variants = experiment.recorded()["variants"]
    assert {"seed 42", "shuffled labels"} <= set(variants)
    first, deep = experiment.recorded_tables("first"), experiment.recorded_tables("deep")
    for name, v in variants.items():
        for place, table in (("first", first[name]), ("deep", deep[name])):
            kept = v["tables"][place]["statistics"]
            assert table.statistics["spearman"] == pytest.approx(kept["spearman"]), name
            assert kept["conversations"] == 40 and len(table.natural) == 40
    main = variants["seed 42"]
    for tables in (first, deep):
        assert len(tables["seed 42"].replies) == 40 * 11 * 4
        assert tables["seed 42"].statistics["spearman_low"] > 0.8
        for control in ("shuffled labels", "base model", "random adapter"):
            assert abs(tables[control].statistics["spearman"]) < 0.2, control
    said = {c["claim"]: c for c in main["conclusions"]}
    rho = main["tables"]["first"]["statistics"]["spearman"]
    assert float(said["reply 1: single replies follow the modifier (Spearman)"]["measured"]) == pytest.approx(rho, abs=0.006)
    assert all(len(c["replies"]) == 22 and c["replies"][0]["text"] for c in main["texts to read"])
