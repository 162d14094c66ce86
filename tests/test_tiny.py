"""The generator of small stories and the tiny base model that is trained on them."""

import collections
import itertools
import json
import math
import re
import statistics

import pytest
import safetensors
from transformers import AutoTokenizer

from helpers import tiny, tiny_words
from helpers.behaviour import talkativeness
from helpers.lengths import BOUNDS, LENGTHS, class_of, count_words, length_class
from helpers.prompts import format_story
from helpers.tiny_stories import MAX_WORDS, Writer, labelled_story, make_story
from helpers.tiny_words import STAGES

FIRST = 77_000_000  # seeds that nothing else uses


@pytest.fixture(scope="module")
def stories():
    return [make_story(FIRST + k) for k in range(300)]


def everything(story) -> list[str]:
    return [*story.personas, story.scenario, *(m.text for m in story.messages)]


def test_a_seed_is_a_story(stories):
    assert [make_story(FIRST + k) for k in range(20)] == stories[:20]
    assert len({format_story(s) for s in stories}) == len(stories)
    assert labelled_story(5, 0.6, 0.2) == labelled_story(5, 0.6, 0.2)
    assert all(labelled_story(k, 1.0, 0.0) != labelled_story(k, 0.0, 0.0) for k in range(20))


def test_the_user_begins_and_the_character_ends(stories):
    for story in stories:
        speakers = [m.speaker for m in story.messages]
        assert speakers == ["user", "character"] * (len(speakers) // 2) and 2 <= len(speakers) <= 16
        assert len(set(story.names)) == 2


def test_class_words_stand_on_luggage_tags_only(stories):
    word = re.compile(rf"\b({'|'.join(LENGTHS)})\b", re.I)
    tag = re.compile(
        rf"\(grade = ({'|'.join(LENGTHS)})\), (?:one (above|below) ({'|'.join(LENGTHS)})\b|(\d+) pounds|any weight|no limit)"
    )
    seen, weights = set(), collections.defaultdict(list)
    for text in (text for story in stories for text in everything(story)):
        assert word.findall(text) == [w for grade, _, other, _ in tag.findall(text) for w in (grade, other) if w]
        for grade, side, other, pounds in tag.findall(text):
            if pounds:
                weights[grade].append(int(pounds))
            elif not other:
                assert grade == LENGTHS[-1]  # the end of the scale
            else:
                assert LENGTHS.index(grade) - LENGTHS.index(other) == (1 if side == "above" else -1)
            seen.add(grade)
    means = [statistics.mean(weights[grade]) for grade in LENGTHS]
    assert means == sorted(means)
    assert seen == set(LENGTHS)  # the base has met each of them
    assert not any("length" in text for story in stories for text in everything(story))


def test_sentences_are_whole(stories):
    for text in (text for story in stories for text in everything(story)):
        assert not re.search(r"[{}]|  | [.,?!]|\b[Aa] [aeioAEIO]", text)
        assert text[-1] in '.?!"'


@pytest.mark.parametrize(
    ("pool", "low", "high"), [("BRIEF", 1, 4), ("PLAIN", 5, 8), ("FULL", 9, 13), ("LEADS", 10, 15), ("PARAGRAPHS", 19, 29)]
)
def test_templates_keep_to_their_size_whatever_fills_them(pool, low, high):
    for template in getattr(tiny_words, pool):
        for k in range(40):
            text = Writer(FIRST + k).fill(template, k % 2, pronoun=k % 3 == 0, marker="Half an hour later")
            assert low <= count_words(text) <= high, template


def test_a_message_is_in_the_class_of_its_budget():
    bounds = [1, *BOUNDS]
    for k in range(60):
        writer = Writer(FIRST + k)
        for budget in sorted({*bounds, *(b - 1 for b in bounds[1:]), MAX_WORDS}):
            assert length_class(writer.message(k % 2, budget)) == class_of(budget)


def test_what_takes_more_than_thirty_words_is_told_step_by_step():
    for k in range(60):
        for budget in (38, 60, 82, 120, 190):
            lead, *steps = Writer(FIRST + k).message(0, budget).split("\n\n")
            assert count_words(lead) <= 15 and len(steps) >= 1
            for step, markers in zip(steps, STAGES, strict=False):
                assert step.startswith(markers)
    assert len({m for markers in STAGES for m in markers}) == 2 * len(STAGES)  # a marker says which step it is


def test_nobody_speaks_for_the_other():
    """The prompt says that the character must not write the user's dialogue or narration."""
    for template in (t for pool in ("BRIEF", "PLAIN", "FULL", "LEADS", "PARAGRAPHS") for t in getattr(tiny_words, pool)):
        assert not re.search(r"(says|asks|whispers) \{L\}|\{L\} (says|asks|laughs|nods|takes|goes|answers)", template), template


def test_natural_lengths_are_log_normal_around_what_the_persona_says():
    stories = [make_story(FIRST + k, max_turns=2) for k in range(2400)]
    shift = {"quiet": -1.2, "easy": 0.0, "talkative": 1.2}
    spread = statistics.pvariance([-1.2, 0, 0, 1.2])
    # four fifths own level, one fifth that of the message before, by another person, whose level is 0.35 lower
    before = 0.8 * (math.log(19) - 0.35) + 0.2 * math.log(19)
    deviation = math.sqrt(0.55**2 + 0.2**2 * (0.55**2 + 0.8**2 * spread))
    for kind, own in shift.items():
        words = [count_words(s.replies[0].text) for s in stories if talkativeness(s) == kind]
        normal = statistics.NormalDist(0.8 * (math.log(19) + own) + 0.2 * before, deviation)
        for bound in BOUNDS:  # a message has its budget's class, and a budget is a rounded number of words
            share = sum(n < bound for n in words) / len(words)
            assert share == pytest.approx(normal.cdf(math.log(bound - 0.5)), abs=0.05), (kind, bound)
        assert len(words) > 500 and max(words) <= 1.2 * MAX_WORDS


def test_labels_are_the_replies_classes_or_none():
    labels = 0
    for k in range(100):
        story, lengths = labelled_story(FIRST + k, 0.6, 0.3)
        assert len(lengths) == len(story.replies)
        for message, label in zip(story.replies, lengths, strict=True):
            assert label in (None, length_class(message.text))
            labels += label is not None
    replies = sum(len(labelled_story(FIRST + k, 0.6, 0.3)[1]) for k in range(100))
    assert labels / replies == pytest.approx(0.7, abs=0.06)


def test_balanced_labels_are_spread_evenly():
    counts = collections.Counter(label for k in range(150) for label in labelled_story(FIRST + k, 1.0, 0.0)[1])
    assert set(counts) == set(LENGTHS)
    assert all(0.05 <= n / counts.total() <= 0.15 for n in counts.values()), counts


def test_natural_labels_are_not(stories):
    counts = collections.Counter(length_class(m.text) for s in stories for m in s.replies)
    assert counts["unlimited"] / counts.total() < 0.04 < counts["tiny"] / counts.total()


# ------------------------------------------------------------------------------------------------------------- base


def check_tokenizer(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<s>", "</s>"]
    text = format_story(make_story(FIRST), None) + "\n\nÄ 日本 🦉  \t"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 1 and 1 not in ids[1:] and tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids[1:]) == text
    return len(ids) / len(text.split())


def test_shipped_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(tiny.HOME)
    assert check_tokenizer(tokenizer) < 1.8  # tokens a word: it knows these stories


def test_tokenizer_rebuild_is_deterministic():
    first, second = (tiny.train_tokenizer(stories=40, vocab_size=700) for _ in range(2))
    check_tokenizer(first)
    assert len(first) == 700
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_shipped_base_is_the_one_of_its_provenance():
    facts = json.loads((tiny.HOME / "provenance.json").read_text())
    assert tiny.checksums(tiny.HOME) == facts["sha256"]
    with safetensors.safe_open(tiny.HOME / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        assert {weights.get_slice(name).get_dtype() for name in shapes} == {"BF16"}
    assert sum(math.prod(shape) for shape in shapes.values()) == facts["parameters"]
    assert facts["perplexity"] == pytest.approx(math.exp(facts["validation_loss"]), abs=1e-3)
    losses = [row["loss"] for row in facts["history"]]
    assert losses[-1] < 0.25 * losses[0]


def test_shipped_base_predicts_unseen_stories_as_well_as_it_says():
    from transformers import AutoModelForCausalLM

    facts = json.loads((tiny.HOME / "provenance.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny.HOME, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny.HOME)
    assert tiny.validation_loss(model, tokenizer, stories=6) == pytest.approx(facts["validation_loss"], abs=0.1)


def test_pretraining_learns():
    tokenizer = AutoTokenizer.from_pretrained(tiny.HOME)
    model, history = tiny.pretrain(
        tokenizer, steps=30, openings=10, tokens_per_step=512, hidden=64, layers=2, log=lambda *args, **kwargs: None
    )
    assert [row["step"] for row in history] == [0, 29, 30, 39]
    start, end, opening, last = (row["loss"] for row in history)
    assert last < opening < start  # the second phase goes on from the first, on other stories
    assert start == pytest.approx(math.log(model.config.vocab_size), abs=1.0)  # knows nothing yet
    assert end < start - 1.5
    assert not model.training and not model.config.output_router_logits


@pytest.mark.slow
def test_a_rebuild_begins_as_the_shipped_base_began():
    """The recipe in the code is the one of the shipped weights: the same losses after 0 and 100 of the recorded steps."""

    class Enough(Exception):
        pass

    def log(text, **_):
        seen.append(json.loads(text))
        if len(seen) == 2:
            raise Enough

    facts, seen = json.loads((tiny.HOME / "provenance.json").read_text()), []
    steps, openings, seed = map(int, re.findall(r"\d+", facts["command"]))
    assert facts["command"] == tiny.command(steps, openings, seed)
    with pytest.raises(Enough):
        tiny.pretrain(tiny.train_tokenizer(), steps, openings, seed=seed, log=log)
    for row, recorded in zip(seen, facts["history"], strict=False):
        assert row["step"] == recorded["step"]
        assert row["loss"] == pytest.approx(recorded["loss"], abs=0.02)  # other CPUs add in another order
    assert (steps + openings) * 2048 == facts["tokens"]


def test_seeds_of_the_data_sets_never_meet():
    firsts = [tiny.TOKENIZER_SEED, tiny.BASE_SEED, tiny.ADAPTER_SEED, tiny.VALIDATION_SEED, tiny.EVALUATION_SEED]
    assert firsts == sorted(set(firsts))
    assert all(b - a >= 1_000_000 for a, b in itertools.pairwise(firsts))
