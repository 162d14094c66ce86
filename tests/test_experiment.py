"""The whole evaluation of a run by one call, small; and what was committed of the large one."""

from __future__ import annotations

import dataclasses
import json

import pytest

from helpers import experiment, training
from helpers.evaluation import CONDITIONS, LengthTable, Size, held_out
from helpers.generation import Sampling
from helpers.profiles import PROFILES

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
