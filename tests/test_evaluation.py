"""The statistics of the length table, on replies whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics

import pytest
import scipy.stats
import torch

from helpers import evaluation
from helpers.eval_plots import plot_lengths
from helpers.evaluation import (
    CONDITIONS,
    LengthTable,
    Size,
    conversations_of,
    held_out,
    measure_length_control,
    with_room,
)
from helpers.generation import Prompt, Reply, Sampling
from helpers.lengths import LENGTHS, count_words, length_class, word_range
from helpers.profiles import PROFILES
from helpers.stories import StoryError, save_stories
from helpers.tiny import ADAPTER_SEED, EVALUATION_SEED


def table(words_of, n=20):
    rows = [
        {"condition": c, "story": i, "words": words_of(c, i), "tokens": 1, "end": "eos", "stopped_at": None, "text": ""}
        for c in CONDITIONS
        for i in range(n)
    ]
    return LengthTable("test", rows, [10] * n, dataclasses.asdict(Sampling()), 0)


def test_perfect_control_has_perfect_numbers():
    perfect = table(lambda c, i: word_range(c)[0] if c else 17)
    s = perfect.statistics
    assert s["spearman"] == pytest.approx(1.0) and s["in_class"] == 1.0 and s["rising_means"] == 1.0 and s["cut_off"] == 0.0
    assert s["rising_medians"] == s["separated_medians"] == 9 and s["top_three_separated"]
    assert s["information"] == pytest.approx(math.log2(10), abs=0.35) and s["information_p"] < 0.01
    assert (s["none_mean"], s["natural_mean"], s["none_is_natural"]) == (17, 10, False)
    assert [r["mean"] for r in perfect.rows[:3]] == [1, 5, 9]
    assert perfect.rows[-1]["length"] == "(none)" and perfect.rows[-1]["in class"] is None


def test_a_length_that_lies_in_the_conversation_is_no_information():
    """Each conversation was asked for one class only, and has its own length: across conversations it would look like control."""
    perfect = table(lambda c, i: word_range(c)[0] if c else 17)
    one_each = [r for r in perfect.replies if r["condition"] == LENGTHS[r["story"] % 10]]
    s = LengthTable("test", one_each, perfect.natural, perfect.sampling, 0).statistics
    assert s["information_p"] == 1 and s["information_by_chance"] == pytest.approx(math.log2(10))


def test_lengths_that_ignore_the_modifier_show_no_effect():
    rng = random.Random(0)
    none = table(lambda c, i: rng.randint(1, 200), n=100)
    s = none.statistics
    assert abs(s["spearman"]) < 0.1 and s["in_class"] < 0.3 and s["information"] < 0.05 and s["information_p"] > 0.01
    assert s["spearman_low"] < 0 < s["spearman_high"] and not s["top_three_separated"]


def test_spearman_is_scipys_on_the_same_pairs_and_ignores_the_no_modifier_rows():
    from scipy.stats import rankdata

    rng = random.Random(1)
    noisy = table(lambda c, i: (10 * LENGTHS.index(c) if c else 1000) + rng.randint(1, 40))
    x = rankdata([LENGTHS.index(r["condition"]) for r in noisy.replies if r["condition"]])
    y = rankdata([r["words"] for r in noisy.replies if r["condition"]])
    mx, my = x.mean(), y.mean()
    by_hand = ((x - mx) * (y - my)).sum() / (((x - mx) ** 2).sum() * ((y - my) ** 2).sum()) ** 0.5
    assert noisy.statistics["spearman"] == pytest.approx(by_hand)


def test_saved_tables_come_back(tmp_path):
    original = table(lambda c, i: i + 1)
    assert LengthTable.load(original.save(tmp_path / "deep" / "table.json")) == original
    small = json.loads(json.dumps(original.compact()))
    assert LengthTable.from_compact(small).statistics == original.statistics == small["statistics"]
    assert LengthTable.from_compact(small).rows == small["rows"] and len(json.dumps(small)) < 15_000


def test_replies_that_were_cut_off_are_never_taken_for_short_ones():
    """A third of the replies is cut at 12 words: the median rises above that of what was seen; a cut majority has none."""
    cut = table(lambda c, i: 12 if i % 3 == 0 else 10 + i, n=30)
    for r in cut.replies:
        r["end"] = "limit" if r["story"] % 3 == 0 else "eos"
    row = cut.rows[0]
    assert row["cut off"] == pytest.approx(1 / 3) and row["median"] > statistics.median(cut.words("micro")) + 3
    for r in cut.replies:
        r["end"] = "limit"
    fresh = LengthTable(cut.label, cut.replies, cut.natural, cut.sampling, cut.reply)
    assert fresh.rows[0]["median"] is None and "cut" in str(fresh) and fresh.statistics["cut_off"] == 1.0
    assert fresh.rows[0]["median high"] is None and fresh.statistics["separated_medians"] == 0
    assert json.loads(json.dumps(fresh.compact(), allow_nan=False))["rows"] == fresh.rows
    assert plot_lengths(fresh).alt


def test_a_table_without_lengths_says_what_it_can(tmp_path):
    whole = table(lambda c, i: 10 + i % 3)
    free = LengthTable("free", whole.of(None), whole.natural, whole.sampling, whole.reply)
    assert "spearman" not in free.statistics and free.statistics["none_mean"] == pytest.approx(whole.statistics["none_mean"])
    assert str(free).count("\n") == 1 and LengthTable.load(free.save(tmp_path / "free.json")) == free


def test_intervals_from_a_handful_of_conversations_are_called_that():
    few, many = (str(table(lambda c, i: i + 1, n=n)) for n in (3, 20))
    assert "intervals from 3 conversations say little" in few and "say little" not in many


def test_intervals_draw_whole_conversations():
    """Each conversation answers alike under all samples: the interval is that of 20 conversations, not of 80 replies."""
    rows = table(lambda c, i: 10 + i, n=20).replies
    four = LengthTable("x", [r for r in rows for _ in range(4)], [10], {}, 0)
    one = LengthTable("x", rows, [10], {}, 0)
    width = [t.rows[0]["high"] - t.rows[0]["low"] for t in (four, one)]
    assert width[0] == pytest.approx(width[1], rel=0.1)


def test_held_out_conversations_are_not_training_stories():
    tiny = PROFILES["tiny"]
    sources = {int(s.source.split(":")[1]) for s in held_out(tiny, 5, reply=2)}
    assert all(s >= EVALUATION_SEED for s in sources)
    assert ADAPTER_SEED + 10_000 * 97 + int(tiny.stories.split(":")[1]) < EVALUATION_SEED
    assert all(len(s.replies) > 2 for s in held_out(tiny, 5, reply=2))
    written = held_out(PROFILES["a100-80"], 10)
    assert len(written) == 3 and all("heldout" in s.source for s in written)


def test_measuring_asks_every_conversation_under_every_condition(tiny_model, tokenizer):
    model = tiny_model
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


def test_senseless_sizes_are_refused_by_name(tiny_model, tokenizer):
    for name in ("conversations", "samples", "batch_size"):
        for value in (0, -2):
            with pytest.raises(ValueError, match=f"{name}={value}: at least 1"):
                Size(**{name: value})
    stories = held_out(PROFILES["tiny"], 1)
    with pytest.raises(ValueError, match="batch_size=0"):
        measure_length_control(tiny_model, tokenizer, stories, batch_size=0)
    with pytest.raises(ValueError, match="samples=0"):
        measure_length_control(tiny_model, tokenizer, stories, samples=0)


def test_conversations_of_ones_own_are_read_like_stories(tmp_path, tokenizer):
    stories = held_out(PROFILES["tiny"], 3) + held_out(PROFILES["tiny"], 2, reply=3)
    file = save_stories(stories, tmp_path / "mine.jsonl")
    assert [s.names for s in conversations_of(file)] == [s.names for s in stories]
    assert [s.names for s in conversations_of(file, reply=3)] == [s.names for s in stories if len(s.replies) > 3]
    assert len(with_room(stories, 0, tokenizer, 1024, 420)) == 5 and with_room(stories, 0, tokenizer, 1024, 1000) == []
    file.write_text("{}\n", encoding="utf-8")
    with pytest.raises(StoryError, match=r"mine\.jsonl:1"):
        conversations_of(file)


def test_a_lack_of_memory_names_half_the_batch_and_keeps_what_is_made(tmp_path, tiny_model, tokenizer, monkeypatch):
    from helpers import replies

    real = replies.iterate_replies

    def full(*args):
        yield next(real(*args))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(replies, "iterate_replies", full)
    stories, sampling = held_out(PROFILES["tiny"], 1), Sampling(max_new_tokens=3)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB\. 8 rows at once .*--batch-size 4.* are kept in"):
        measure_length_control(tiny_model, tokenizer, stories, sampling, batch_size=8, folder=tmp_path)
    (file,) = tmp_path.glob("replies-*.jsonl")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 1
    with pytest.raises(torch.OutOfMemoryError, match="even one row"):
        measure_length_control(tiny_model, tokenizer, stories, sampling, batch_size=1)


@pytest.fixture(scope="module")
def tiny_model():
    from transformers import AutoModelForCausalLM

    from helpers.tiny import HOME

    return AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32)


def test_an_interrupted_measurement_continues_where_it_was(tmp_path, tiny_model, tokenizer, monkeypatch):
    """Stopped in the second batch, with half a line written: the rest is made, nothing twice, and the table is the same."""
    from helpers import replies

    stories, sampling = held_out(PROFILES["tiny"], 2), Sampling(max_new_tokens=6)
    whole = measure_length_control(tiny_model, tokenizer, stories, sampling, samples=2)

    def stop(done, total, left):
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_length_control(tiny_model, tokenizer, stories, sampling, samples=2, batch_size=10, progress=stop, folder=tmp_path)
    (file,) = tmp_path.glob("replies-*.jsonl")
    assert len(file.read_text().splitlines()) == 20
    with file.open("ab") as out:
        out.write('{"key": "0123", "text": "é'.encode()[:-1])  # cut inside a letter
    made = []
    again = measure_length_control(
        tiny_model, tokenizer, stories, sampling, samples=2, progress=lambda d, t, left: made.append(t), folder=tmp_path
    )
    assert made[-1] == 24 and again == whole
    assert len(file.read_text().splitlines()) == 44 and all(json.loads(line) for line in file.read_text().splitlines())
    monkeypatch.setattr(replies, "iterate_replies", None)  # a third time nothing is generated
    assert measure_length_control(tiny_model, tokenizer, stories, sampling, samples=2, folder=tmp_path) == whole
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(ValueError, match=r"jsonl:1: not a reply"):
        measure_length_control(tiny_model, tokenizer, stories, sampling, samples=2, folder=tmp_path)


def test_replies_of_another_model_or_sampling_are_never_taken(random_mixtral):
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    from helpers.qlora import add_lora
    from helpers.replies import fingerprint

    plain = fingerprint(AutoModelForCausalLM.from_pretrained(random_mixtral), Sampling())
    assert fingerprint(AutoModelForCausalLM.from_pretrained(random_mixtral), Sampling()) == plain
    assert fingerprint(AutoModelForCausalLM.from_pretrained(random_mixtral), Sampling(seed=7)) == plain, "the seed is in the keys"
    assert fingerprint(AutoModelForCausalLM.from_pretrained(random_mixtral), Sampling(temperature=0.7)) != plain
    model = add_lora(AutoModelForCausalLM.from_pretrained(random_mixtral), r=4, router=False)
    adapted = fingerprint(model, Sampling())
    with model.disable_adapter():
        assert fingerprint(model, Sampling()) == plain, "switched off, it is the base"
    assert adapted != plain and fingerprint(model, Sampling()) == adapted
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).view(-1)[-1] = 1e-3
    changed = fingerprint(model, Sampling())
    assert changed != adapted
    next(m for m in model.modules() if isinstance(m, LoraLayer)).scaling["default"] *= 8
    assert fingerprint(model, Sampling()) != changed, "the same factors, weighed otherwise"


def test_a_4bit_base_with_other_scales_is_another_model(random_mixtral):
    from helpers.quantization import load_4bit
    from helpers.replies import fingerprint

    model = load_4bit(random_mixtral)
    before = fingerprint(model, Sampling())
    model.model.layers[0].mlp.experts.down_proj.quant_state.absmax.add_(1)
    assert fingerprint(model, Sampling()) != before


def test_natural_lengths_are_compared_conversation_by_conversation():
    """Conversations differ widely, replies from their own by one word: by pairs that shows, however wide the means' intervals."""
    own = [5, 80, 9, 140, 30, 12, 60, 7, 25, 100]

    def free(more):
        said = {"condition": None, "sample": 0, "tokens": 9, "end": "eos"}
        rows = [said | {"story": k, "words": n + more(k)} for k, n in enumerate(own)]
        return LengthTable("free", rows, own, dataclasses.asdict(Sampling()), 0).unasked

    longer, even = free(lambda k: 1), free(lambda k: (-1) ** k)
    assert longer["natural_low"] < longer["none_mean"] < longer["natural_high"], "the means alone do not tell"
    assert (longer["difference"], longer["difference_low"], longer["none_is_natural"]) == (1, 1, False)
    assert even["difference"] == 0 and even["difference_low"] < 0 < even["difference_high"] and even["none_is_natural"]


def test_earlier_replies_keep_their_own_modifiers(tokenizer, monkeypatch):
    (story,) = held_out(PROFILES["tiny"], 1, reply=2)
    asked = []
    monkeypatch.setattr(
        evaluation,
        "recorded_replies",
        lambda m, t, prompts, *_: (asked.extend(prompts), [Reply("a", 1, "eos")] * len(prompts))[1],
    )
    measure_length_control(None, tokenizer, [story], reply=2, conditions=("huge", None))
    for prompt, last in zip(asked, (" (length = huge)", ""), strict=True):
        heads = tokenizer.decode(prompt.ids, skip_special_tokens=True).split("### Response:")[1:]
        wanted = [f" (length = {length_class(m.text)})" for m in story.replies[:2]] + [last]
        assert [h.partition("\n")[0] for h in heads] == wanted


def test_held_out_prompts_leave_room_for_the_longest_reply():
    stories = held_out(PROFILES["tiny"], 60, reply=3)
    assert max(sum(count_words(m.text) for m in s.before_reply(3).messages) for s in stories) <= 330


def test_the_interval_without_modifier_draws_whole_conversations():
    rows = [r for r in table(lambda c, i: 10 + i, n=20).replies if r["condition"] is None]
    one, four = (LengthTable("x", [r for r in rows for _ in range(n)], [10] * 20, {}, 0).unasked for n in (1, 4))
    assert four["none_high"] - four["none_low"] == pytest.approx(one["none_high"] - one["none_low"], rel=0.1)


def test_replies_that_spoke_for_the_user_are_counted():
    t = table(lambda c, i: 10)
    for r in t.replies:
        r["end"] = "stop" if r["story"] == 0 else "eos"
    assert t.statistics["impersonated"] == pytest.approx(1 / 20) and t.statistics["cut_off"] == 0


def test_the_natural_lengths_are_those_of_the_reply_that_was_asked_for(tokenizer):
    from transformers import AutoModelForCausalLM

    from helpers.tiny import HOME

    model = AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32)
    stories = held_out(PROFILES["tiny"], 2, reply=1)
    t = measure_length_control(model, tokenizer, stories, Sampling(max_new_tokens=1), reply=1, conditions=("tiny",))
    assert t.natural == [count_words([m for m in s.messages if m.speaker == "character"][1].text) for s in stories]
    assert t.natural != [count_words(s.replies[0].text) for s in stories]


def test_the_top_three_are_apart_only_if_both_pairs_are():
    half = table(lambda c, i: {"enormous": 80, "humongous": 120 + i % 9, "unlimited": 120 + (i + 3) % 9}.get(c, 5))
    assert half.statistics["separated_medians"] >= 1 and not half.statistics["top_three_separated"]


def test_room_is_that_of_the_reply_that_is_asked_for(tokenizer):
    (story,) = held_out(PROFILES["tiny"], 1, reply=3)
    before = story.before_reply(3)
    history = [length_class(m.text) for m in before.replies]
    most = max(len(Prompt.of(before, tokenizer, c, history).ids) for c in CONDITIONS)
    assert with_room([story], 3, tokenizer, most + 50, 50) == [story] and with_room([story], 3, tokenizer, most + 49, 50) == []


def test_the_p_value_is_scipys():
    rng = random.Random(1)
    for spread, follows in ((20, True), (10_000, False)):
        noisy = table(lambda c, i, spread=spread: (10 * LENGTHS.index(c) if c else 0) + rng.randint(1, spread))
        rows = [r for r in noisy.replies if r["condition"]]
        wanted = scipy.stats.spearmanr([LENGTHS.index(r["condition"]) for r in rows], [r["words"] for r in rows]).pvalue
        assert noisy.statistics["spearman_p"] == pytest.approx(wanted) and (wanted < 1e-6) == follows
