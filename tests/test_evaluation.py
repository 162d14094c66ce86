"""The statistics of the length table, on replies whose answer is known."""

from __future__ import annotations

import dataclasses
import random

import pytest

from helpers.evaluation import CONDITIONS, LengthTable, bootstrap_mean, held_out, measure_length_control
from helpers.generation import Sampling
from helpers.lengths import LENGTHS, word_range
from helpers.profiles import PROFILES
from helpers.tiny import ADAPTER_SEED, EVALUATION_SEED


def table(words_of, n=20):
    rows = [
        {"condition": c, "story": i, "words": words_of(c, i), "tokens": 1, "end": "eos", "text": ""}
        for c in CONDITIONS
        for i in range(n)
    ]
    return LengthTable("test", rows, [10] * n, dataclasses.asdict(Sampling()), 0)


def test_perfect_control_has_perfect_numbers():
    perfect = table(lambda c, i: word_range(c)[0] if c else 17)
    s = perfect.statistics
    assert s["spearman"] == pytest.approx(1.0) and s["in_class"] == 1.0 and s["rising_means"] == 1.0 and s["cut_off"] == 0.0
    assert [r["mean"] for r in perfect.rows[:3]] == [1, 5, 9]
    assert perfect.rows[-1]["length"] == "(none)" and perfect.rows[-1]["in class"] is None


def test_lengths_that_ignore_the_modifier_show_no_effect():
    rng = random.Random(0)
    none = table(lambda c, i: rng.randint(1, 200), n=100)
    assert abs(none.statistics["spearman"]) < 0.1 and none.statistics["in_class"] < 0.3


def test_spearman_is_scipys_on_the_same_pairs_and_ignores_the_no_modifier_rows():
    from scipy.stats import rankdata

    rng = random.Random(1)
    noisy = table(lambda c, i: (10 * LENGTHS.index(c) if c else 1000) + rng.randint(1, 40))
    x = rankdata([LENGTHS.index(r["condition"]) for r in noisy.replies if r["condition"]])
    y = rankdata([r["words"] for r in noisy.replies if r["condition"]])
    mx, my = x.mean(), y.mean()
    by_hand = ((x - mx) * (y - my)).sum() / (((x - mx) ** 2).sum() * ((y - my) ** 2).sum()) ** 0.5
    assert noisy.statistics["spearman"] == pytest.approx(by_hand)


def test_bootstrap_interval_contains_the_mean_and_shrinks():
    rng = random.Random(0)
    few, many = ([rng.gauss(50, 10) for _ in range(n)] for n in (20, 500))
    for values in (few, many):
        low, high = bootstrap_mean(values)
        assert low < sum(values) / len(values) < high
    assert (bootstrap_mean(many)[1] - bootstrap_mean(many)[0]) < (bootstrap_mean(few)[1] - bootstrap_mean(few)[0])
    # normal theory: 1.96 s / sqrt(n) on each side
    low, high = bootstrap_mean(many)
    assert high - low == pytest.approx(2 * 1.96 * 10 / 500**0.5, rel=0.25)


def test_saved_tables_come_back(tmp_path):
    original = table(lambda c, i: i + 1)
    assert LengthTable.load(original.save(tmp_path / "deep" / "table.json")) == original


def test_held_out_conversations_are_not_training_stories():
    tiny = PROFILES["tiny"]
    sources = {int(s.source.split(":")[1]) for s in held_out(tiny, 5, reply=2)}
    assert all(s >= EVALUATION_SEED for s in sources)
    assert ADAPTER_SEED + 10_000 * 97 + int(tiny.stories.split(":")[1]) < EVALUATION_SEED
    assert all(len(s.replies) > 2 for s in held_out(tiny, 5, reply=2))
    written = held_out(PROFILES["a100-80"], 10)
    assert len(written) == 3 and all("heldout" in s.source for s in written)


def test_measuring_asks_every_conversation_under_every_condition(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    from helpers.tiny import HOME

    model = AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32)
    stories = held_out(PROFILES["tiny"], 2)
    done = []
    result = measure_length_control(
        model,
        tokenizer,
        stories,
        Sampling(max_new_tokens=5),
        samples=2,
        label="x",
        progress=lambda d, t, left: done.append((d, t)),
    )
    assert len(result.replies) == 2 * 11 * 2 and done[-1] == (44, 44)
    assert {(r["story"], r["condition"]) for r in result.replies} == {(s, c) for s in range(2) for c in CONDITIONS}
    assert result.statistics["cut_off"] > 0.5, "five tokens cut most replies off, and the table says so"
    with pytest.raises(ValueError, match="no conversation"):
        measure_length_control(model, tokenizer, [])
