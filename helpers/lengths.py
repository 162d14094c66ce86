"""Ten length classes for replies: `micro` … `unlimited`, measured in words.

The names and their order are the model card's. Its author never published thresholds, unit or omission rate, so these
are ours: words are `len(text.split())`, and from `tiny` on each class is about 1.5 times as long as the one before, which
is the smallest step that a reader notices and that a model of whole sentences can hit.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence

LENGTHS = ("micro", "tiny", "short", "medium", "long", "massive", "huge", "enormous", "humongous", "unlimited")

# First word count of each class after `micro`: class i holds BOUNDS[i-1] <= words < BOUNDS[i].
BOUNDS = (5, 9, 14, 21, 31, 46, 68, 100, 150)


def count_words(text: str) -> int:
    """Number of whitespace-separated words."""
    return len(text.split())


def length_class(text: str, bounds: Sequence[int] = BOUNDS) -> str:
    """The class of a reply, by its number of words."""
    return LENGTHS[bisect_right(bounds, count_words(text))]


def word_range(name: str, bounds: Sequence[int] = BOUNDS) -> tuple[int, int | None]:
    """Smallest and largest word count of a class; the largest is None for `unlimited`."""
    i = rank(name)
    return (bounds[i - 1] if i else 1), (bounds[i] - 1 if i < len(bounds) else None)


def rank(name: str) -> int:
    """Position of a class in LENGTHS; a ValueError that lists the ten names for any other word."""
    if name not in LENGTHS:
        raise ValueError(f"unknown length {name!r}: use one of {', '.join(LENGTHS)}, or None for no modifier")
    return LENGTHS.index(name)


def label_replies(story, omit: float = 0.2, rng: random.Random | None = None) -> list[str | None]:
    """One class or None per character reply of a story: the reply's own class, left out with probability `omit`.

    Without omissions the model would never learn to choose a length by itself when the modifier is missing.
    """
    rng = rng or random.Random(0)
    return [None if rng.random() < omit else length_class(m.text) for m in story.replies]
