"""The ten length classes: names in the card's order, bounds, and the share of replies without a modifier."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import lengths
from helpers.lengths import (
    BOUNDS,
    LENGTHS,
    OURS,
    OVERLAPPING,
    Scheme,
    count_words,
    label_replies,
    length_class,
    rank,
    word_range,
)
from helpers.stories import Message, Pair, Story
from helpers.tiny_stories import make_story

NAMES = ["micro", "tiny", "short", "medium", "long", "massive", "huge", "enormous", "humongous", "unlimited"]
FIRST_WORDS = [1, 5, 9, 14, 21, 31, 46, 68, 100, 150]  # of each class


def story(*word_counts: int) -> Story:
    messages = []
    for n in word_counts:
        messages += [Message("user", "Well?"), Message("character", " ".join(["word"] * n))]
    return Story(Pair("Ana", "Bo"), Pair("x", "y"), "z", tuple(messages))


def test_names_and_bounds():
    assert list(LENGTHS) == NAMES
    assert [1, *BOUNDS] == FIRST_WORDS
    assert [rank(name) for name in NAMES] == list(range(10))


@pytest.mark.parametrize(("name", "first", "following"), zip(NAMES, FIRST_WORDS, [*FIRST_WORDS[1:], None], strict=True))
def test_every_class_is_reached_from_its_first_to_its_last_word(name, first, following):
    last = following - 1 if following else None
    assert word_range(name) == (first, last)
    assert length_class("word " * first) == name
    assert length_class("word " * (last or 100_000)) == name
    assert length_class("word " * (first - 1)) == (NAMES[NAMES.index(name) - 1] if first > 1 else "micro")


def test_each_class_is_about_one_and_a_half_times_the_one_before():
    steps = [b / a for a, b in itertools.pairwise(BOUNDS)]
    assert all(1.4 <= step <= 1.8 for step in steps)
    assert math.prod(steps) ** (1 / len(steps)) == pytest.approx(1.5, abs=0.05)


@settings(deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.text(st.characters(categories=("L", "N", "P"), max_codepoint=0x5FF), min_size=1), max_size=200),
    st.sampled_from([" ", "\n\n", " \t "]),
)
def test_word_range_agrees_with_length_class(words, space):
    text = space.join(words)
    assert count_words(text) == len(words)
    low, high = word_range(length_class(text))
    assert low <= max(1, len(words)) <= (high or math.inf)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("はい。", 1),
        ('"はい..."', 1),
        ("「今日は。明日も行きます！」", 6),
        ("彼は Python を使う", 4),
        ("你好，我叫王小明。我住在北京，是一名老师。", 10),
        ("我用iPhone打电话", 4),
        ("我用 iPhone 打电话", 4),
        ("สวัสดีครับ ผมชื่อโบ", 5),
        ("안녕하세요 저는 보입니다", 3),
        ("Он пошёл домой — да", 5),
        ("Hello！ You", 2),
        ("アイ・ウエ", 2),  # a dot between words is none itself
    ],
)
def test_words_are_counted_where_nothing_is_put_between_them(text, words):
    """By spaces alone, every Japanese reply would be `micro`, and a modifier would teach nothing."""
    assert count_words(text) == words


def test_replies_without_spaces_fall_into_all_classes():
    classes = [length_class("今日は駅まで歩きました。" * n) for n in (1, 2, 3, 4, 6, 8, 12, 18, 30)]
    assert len(set(classes)) >= 7 and [rank(c) for c in classes] == sorted(map(rank, classes))


@settings(deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(2, 400), min_size=9, max_size=9, unique=True).map(sorted), st.integers(1, 500))
def test_other_bounds(bounds, n):
    low, high = word_range(length_class("word " * n, bounds), bounds)
    assert low <= n <= (high or math.inf)


@pytest.mark.parametrize("word", ["Micro", "", "average", "medium "])
def test_unknown_names_are_refused_with_the_ten(word):
    for function in (rank, word_range):
        with pytest.raises(ValueError, match=", ".join(NAMES)):
            function(word)


def test_labels_are_the_replies_own_classes():
    assert label_replies(story(3, 15, 200), omit=0.0) == ["micro", "medium", "unlimited"]
    assert label_replies(story(3, 15, 200), omit=1.0) == [None] * 3
    assert label_replies(Story(Pair("Ana", "Bo"), Pair("x", "y"), "z", (Message("user", "Hm."),))) == []


@pytest.mark.parametrize("omit", [0.1, 0.2, 0.5])
def test_omission_rate(omit):
    labels = label_replies(story(*[7] * 4000), omit, random.Random(3))
    assert set(labels) == {"tiny", None}
    deviation = math.sqrt(omit * (1 - omit) / len(labels))
    assert labels.count(None) / len(labels) == pytest.approx(omit, abs=4 * deviation)


def test_labels_follow_from_the_generator():
    text = story(*range(1, 300))
    assert label_replies(text) == label_replies(text)
    assert label_replies(text, rng=random.Random(1)) == label_replies(text, rng=random.Random(1))
    assert label_replies(text, rng=random.Random(1)) != label_replies(text, rng=random.Random(2))


# ---------------------------------------------------------------------------------------------------------- schemes


def test_our_scheme_is_length_class():
    assert [OURS.fitting("w " * n) for n in range(1, 400)] == [[length_class("w " * n)] for n in range(1, 400)]
    assert OURS.fitting("") == ["micro"] and OURS.names == LENGTHS


def test_overlap_gives_neighbours_too_and_draws_among_them():
    wide = Scheme.from_bounds(overlap=0.25, omit=0.0)
    for n in range(1, 400):
        names = wide.fitting("w " * n)
        places = [rank(name) for name in names]
        assert length_class("w " * n) in names and places == list(range(places[0], places[-1] + 1))
    border = "w " * BOUNDS[4]
    assert wide.fitting(border) == [LENGTHS[4], LENGTHS[5]]
    drawn = [wide.draw(border, random.Random(k)) for k in range(400)]
    assert drawn.count(LENGTHS[4]) == pytest.approx(200, abs=40)


def test_units():
    characters = Scheme.from_bounds([b * 6 for b in BOUNDS], unit="characters", omit=0.0)
    assert characters.draw("x" * 30, random.Random(0)) == "tiny" and characters.draw("x" * 29, random.Random(0)) == "micro"
    lines = Scheme(("one", "more"), ((0, 1), (1, None)), unit=lambda text: text.count("\n"), omit=0.0)
    assert lines.draw("a", random.Random(0)) == "one" and lines.draw("a\nb", random.Random(0)) == "more"
    assert label_replies(story(3, 15), scheme=characters, omit=0.0) == ["micro", "short"]


def test_the_overlapping_alternative():
    """Half-open ranges, as published: 30 words are no longer microscopic, 500 have no descriptor."""
    assert OVERLAPPING.fitting("w " * 29) == ["microscopic", "tiny"] and OVERLAPPING.fitting("w " * 30) == ["tiny"]
    assert OVERLAPPING.fitting("w " * 220) == ["long", "lengthy", "extended"]
    assert OVERLAPPING.fitting("w " * 499) == ["extremely long"] and OVERLAPPING.fitting("w " * 500) == []
    labels = label_replies(story(*[50] * 3000, 700), rng=random.Random(0), scheme=OVERLAPPING)
    assert labels[-1] is None and set(labels) == {"tiny", "quite short", "concise", None}
    assert labels.count(None) / len(labels) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scheme(("a", "b"), ((0, 5),)),
        lambda: Scheme(("a",), ((5, 5),)),
        lambda: Scheme(("a",), ((0, 5),), unit="tokens"),
        lambda: Scheme(("a",), ((0, 5),), omit=1.5),
        lambda: Scheme.from_bounds([1, 2, 3]),
        lambda: Scheme.from_bounds([9, 8, 7, 6, 5, 4, 3, 2, 1]),
        lambda: Scheme.from_bounds(overlap=-0.1),
    ],
)
def test_senseless_schemes_are_refused(make):
    with pytest.raises(ValueError, match=r"give each name|is empty|unknown unit|a share|nine rising"):
        make()


def test_narrow_classes_are_not_empty():
    scheme = Scheme.from_bounds((1, 2, 3, 4, 5, 6, 7, 8, 9), overlap=0.0)
    assert all(high is None or high > low for low, high in scheme.ranges)


def test_nothing_is_left_out_if_that_is_asked_for():
    story = make_story(3)
    assert label_replies(story, 0.0, scheme=lengths.OURS) == [length_class(m.text) for m in story.replies]
