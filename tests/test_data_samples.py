"""The stories that ship with the course, and the corpus made of them."""

import importlib.util
import itertools
import os
import re
from collections import Counter
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from helpers import data_card, tiny
from helpers.data import build_corpus, labelled_stories
from helpers.lengths import LENGTHS, count_words, length_class
from helpers.profiles import PROFILES, ROOT
from helpers.stories import Message, Story, clean, load_stories
from helpers.tokens import encode_all

FOLDER = ROOT / "data_samples"
TRAINING, HELD_OUT = (load_stories(FOLDER / name, problems=[]) for name in ("stories", "heldout"))
STORIES = [*TRAINING, *HELD_OUT]


@pytest.fixture(params=STORIES, ids=[s.source.rpartition("/")[2] for s in STORIES])
def story(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "tiny_base")


@pytest.mark.parametrize("folder", ["stories", "heldout"])
def test_every_file_is_read_without_problems_or_repairs(folder):
    problems = []
    stories = load_stories(FOLDER / folder, problems)
    assert problems == [] and len(stories) == len(list((FOLDER / folder).iterdir()))
    assert [s.repairs for s in stories] == [()] * len(stories)


def test_there_is_enough_to_train_on():
    assert len(TRAINING) >= 40 and len(HELD_OUT) >= 3
    assert sum(count_words(m.text) for s in TRAINING for m in s.messages) >= 60_000
    assert min(len(s.messages) for s in TRAINING) == 2


def test_every_length_class_is_there_150_times():
    found = Counter(length_class(m.text) for s in TRAINING for m in s.replies)
    assert min(found[name] for name in LENGTHS) >= 150, found


@pytest.fixture(scope="module")
def mixtral():
    return data_card.load_tokenizer("mixtral")


def test_a_tokenizer_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded from .*\(.+\): name a folder with one, or a Hub id"):
        data_card.load_tokenizer(str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else real(name))
    with pytest.raises(ValueError, match="pip install mistral-common sentencepiece"):
        data_card.load_tokenizer("mixtral")


def test_a_card_is_made_with_its_folder_and_only_between_the_marks(tmp_path, monkeypatch):
    card = tmp_path / "new" / "CARD.md"
    data_card.write_card(card, "one")
    card.write_text("before\n" + card.read_text(encoding="utf-8") + "after\n", encoding="utf-8")
    data_card.write_card(card, "two")
    assert re.fullmatch(rf"before\n# Data card\n\n{data_card.BEGIN}\ntwo\n{data_card.END}\nafter\n", card.read_text())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"CARD.md could not be written \(No space left on device\)"):
        data_card.write_card(card, "three")
    assert "two" in card.read_text() and [p.name for p in card.parent.iterdir()] == ["CARD.md"]


def test_some_need_the_cards_context_and_all_fit_it(mixtral):
    """With Mixtral's own tokenizer, and with a modifier on every reply."""
    labelled = labelled_stories(replace(PROFILES["a100-80"], omit=0.0))
    sizes = [len(s) for s in encode_all(labelled, mixtral)]
    assert sum(n > 9000 for n in sizes) >= 3 and max(sizes) <= 10_240


def test_the_cards_rows_are_full(mixtral):
    profile = PROFILES["a100-80"]
    corpus = build_corpus(labelled_stories(profile), mixtral, profile.context)
    assert corpus.fill >= 0.98 and corpus.dropped_turns == 0


def test_the_data_card_is_what_the_command_writes(mixtral):
    text = data_card.render(data_card.describe(TRAINING, mixtral, "of Mixtral-8x7B"))
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{data_card.BEGIN}\n{text}\n{data_card.END}" in card, (
        "run python -m helpers stories data_samples/stories --card data_samples/README.md"
    )


def test_turns_alternate_and_texts_are_clean(story):
    assert all(a.speaker != b.speaker for a, b in itertools.pairwise(story.messages))
    assert story.replies and story.messages[-1].speaker == "character"
    for text in (*story.personas, story.scenario, *(m.text for m in story.messages)):
        assert text and text == clean(text)
        assert "###" not in text and not re.search(r"<\w+>|\blength = ", text)


def test_personas_and_scenario_say_something(story):
    assert all(count_words(text) >= 15 for text in (*story.personas, story.scenario))
    for name, persona in zip(story.names, story.personas, strict=True):
        assert name.split()[0] in persona
        assert any(name.split()[0] in m.text for m in story.messages) or name.split()[0] in story.scenario


ONES = "one two three four five six seven eight nine".split()  # noqa: SIM905
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()  # noqa: SIM905
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
NUMBERS = {word: n for n, word in enumerate([*ONES, *TEENS], start=1)}
NUMBERS |= {ten: 10 * n for n, ten in enumerate(TENS, start=2)}
NUMBERS |= {f"{ten}-{one}": NUMBERS[ten] + NUMBERS[one] for ten in TENS for one in ONES}
AGE = re.compile(
    r"(?:\bis|^\w+,|\baged?|\b[Ss]he's|\b[Hh]e's|\bof) (\d+|[a-z]+(?:-[a-z]+)?)(?= years|-year|[,.;]| and\b| with\b)"
)


def ages(persona: str) -> list[int]:
    found = (m[1] for m in AGE.finditer(persona))
    return [int(n) if n.isdigit() else NUMBERS[n] for n in found if n.isdigit() or n in NUMBERS]


def test_ages_are_understood():
    assert ages("Ana, 19, is a baker.") == ages("Ana is nineteen and bakes.") == ages("She is 19 years old.") == [19]
    assert ages("Bo is forty-three, a nurse.") == [43] and ages("Bo is a nurse.") == []


def test_everybody_is_an_adult(story):
    for persona in story.personas:
        assert all(age >= 18 for age in ages(persona)[:1])
        assert not re.search(r"\b(teenage|schoolgirl|schoolboy|little girl|little boy)\b", persona, re.I)


def test_most_personas_state_an_age():
    stated = [bool(ages(p)) for s in STORIES for p in s.personas]
    assert sum(stated) >= 0.9 * len(stated)


def test_held_out_stories_are_others():
    assert not {s.names for s in TRAINING} & {s.names for s in HELD_OUT}
    assert not {s.scenario for s in TRAINING} & {s.scenario for s in HELD_OUT}

    def phrases(stories) -> set[tuple[str, ...]]:
        texts = [m.text.lower().split() for s in stories for m in s.messages]
        return {tuple(words[i : i + 8]) for words in texts for i in range(len(words) - 7)}

    assert not phrases(TRAINING) & phrases(HELD_OUT)
    assert len({s.scenario for s in STORIES}) == len({s.names for s in STORIES}) == len(STORIES)


# ----------------------------------------------------------------------------------------------------------- corpus


def test_labels_of_the_samples():
    profile = PROFILES["t4"]
    labelled = labelled_stories(profile)
    assert [s for s, _ in labelled] == TRAINING
    labels = [label for _, lengths in labelled for label in lengths]
    own = [length_class(m.text) for s in TRAINING for m in s.replies]
    assert all(label in (None, name) for label, name in zip(labels, own, strict=True))
    assert labels.count(None) / len(labels) == pytest.approx(profile.omit, abs=0.08)
    assert labelled_stories(profile) == labelled
    assert labelled_stories(replace(profile, seed=1)) != labelled
    assert labelled_stories(profile, HELD_OUT[:1])[0][0] == HELD_OUT[0]


def test_generated_stories_of_the_tiny_profile():
    few = replace(PROFILES["tiny"], stories="generated:30")
    labelled = labelled_stories(few)
    assert len(labelled) == 30 and labelled == labelled_stories(few)
    assert not {s.source for s, _ in labelled} & {s.source for s, _ in labelled_stories(replace(few, seed=few.seed + 1))}
    for seed in (0, 42, 96, 97, 12345):
        for s, _ in labelled_stories(replace(few, seed=seed, stories="generated:1")):
            number = int(s.source.removeprefix("generated:"))
            assert tiny.ADAPTER_SEED <= number <= tiny.VALIDATION_SEED - 10_000


def test_corpus_of_the_samples(tokenizer):
    context = 16384
    labelled = labelled_stories(PROFILES["t4"])
    corpus = build_corpus(labelled, tokenizer, context)
    assert corpus.samples == len(TRAINING)
    assert all(len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= context for row in corpus.rows)
    assert corpus.tokens == sum(len(row["input_ids"]) for row in corpus.rows)
    assert corpus.trained == sum(label != -100 for row in corpus.rows for label in row["labels"]) > 0
    assert corpus.fill == pytest.approx(corpus.tokens / (len(corpus.rows) * context))
    assert sum(list(row["position_ids"]).count(0) for row in corpus.rows) == corpus.samples
    assert corpus.dropped_turns == 0 and str(corpus).startswith(f"{len(TRAINING)} stories, {corpus.tokens:,} tokens, ")


def test_a_short_context_says_what_it_drops(tokenizer):
    corpus = build_corpus(labelled_stories(PROFILES["t4"], HELD_OUT[:1]), tokenizer, 2048)
    assert corpus.dropped_turns > 0 and str(corpus).endswith(f", {corpus.dropped_turns} turns dropped")
    split = build_corpus(labelled_stories(PROFILES["t4"], HELD_OUT[:1]), tokenizer, 2048, long="split")
    assert split.dropped_turns == 0 and split.samples > split.stories == 1 and split.trained > corpus.trained
    assert str(split).startswith(f"1 story in {split.samples} samples, ")


def test_digest_changes_with_the_data(tokenizer):
    labelled = labelled_stories(PROFILES["t4"], HELD_OUT[:2])
    corpora = [
        build_corpus(labelled, tokenizer, 4096),
        build_corpus(labelled, tokenizer, 4096, loss="all"),
        build_corpus(labelled, tokenizer, 4096, eos="sample"),
        build_corpus(labelled[:1], tokenizer, 4096),
        build_corpus([(s, None) for s, _ in labelled], tokenizer, 4096),
    ]
    assert len({c.digest for c in corpora}) == len(corpora)
    assert build_corpus(labelled, tokenizer, 4096) == corpora[0]


def test_nothing_to_train_is_refused(tokenizer):
    silent = Story(("Ana", "Bo"), ("x", "y"), "z", (Message("user", "Hello?"),))
    for labelled in ([], [(silent, None)]):
        with pytest.raises(ValueError, match="no token carries loss"):
            build_corpus(labelled, tokenizer, 512)
