"""Ten length classes for replies: `micro` … `unlimited`.

The names and their order are the model card's. Its author never published thresholds, unit or omission rate, so these are
ours: `OURS` counts words (`count_words`), and from `short` on each class is about 1.5 times as long as the one before,
which is the smallest step that a reader notices and that a model of whole sentences can hit. The bounds lie at even steps of
a log-normal distribution, the shape of reply lengths in chats (notebook 1 draws it).

`unlimited` means "as long as you like": every reply of 150 words or more, with no upper end. It is a class like the others, in
training and in sampling: the reply ends where the model writes its end token.

`OVERLAPPING` is the documented alternative: seventeen ranges that overlap, one of the fitting ones drawn at random, as in
Charles Goddard's `rathe` (rathe/rp.py, branch feature/rp), from whose author the card's router losses come. Its descriptors are
other words, or mean other lengths (its `medium` is 130 to 179 words); half of all replies stay without one there, and a reply
of 500 words or more has none.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

LENGTHS = ("micro", "tiny", "short", "medium", "long", "massive", "huge", "enormous", "humongous", "unlimited")

# First word count of each class after `micro`: class i holds BOUNDS[i-1] <= words < BOUNDS[i].
BOUNDS = (5, 9, 14, 21, 31, 46, 68, 100, 150)


# Scripts without spaces between words, and the characters of about one word: Han and Japanese, then Thai, Lao, Tibetan,
# Burmese and Khmer.
_UNSPACED = (
    (
        re.compile(
            "[\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u30fc-\u30fe\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
        ),
        2,
    ),
    (re.compile("[\u0e01-\u0e4e\u0e80-\u0fd4\u1000-\u1049\u1050-\u109d\u1780-\u17d3]+"), 4),
)
_WIDE_MARKS = re.compile("[\u3001-\u3003\u3008-\u301f\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")


def count_words(text: str) -> int:
    """Number of whitespace-separated words.

    Where a script puts no spaces between words, that would be one word a sentence, and nearly every reply `micro`. There, two
    (Chinese, Japanese) or four characters (Thai and its neighbours) count as a word: about what their words have.
    """
    if text.isascii():
        return len(text.split())
    spaced = text
    for script, characters in _UNSPACED:
        spaced = script.sub(lambda run, n=characters: _in_words(run, n), spaced)
    return len(text.split()) if spaced == text else len(_WIDE_MARKS.sub(" ", spaced).split())


def _in_words(run: re.Match, characters: int) -> str:
    """A run of a script without spaces, as that many words; a word of another script beside it stands by itself."""
    before, after = run.string[: run.start()][-1:], run.string[run.end() :][:1]
    words = " ".join("w" * math.ceil(len(run[0]) / characters))
    return " " * before.isalnum() + words + " " * after.isalnum()


UNITS: dict[str, Callable[[str], int]] = {"words": count_words, "characters": len}


@dataclass(frozen=True)
class Scheme:
    """Names for lengths, each with a half-open range [low, high) in a unit; the last `high` may be None: no upper end.

    Ranges may overlap: then one of the fitting names is drawn at random.
    """

    names: tuple[str, ...]
    ranges: tuple[tuple[int, int | None], ...]
    unit: str | Callable[[str], int] = "words"  # a key of UNITS, or a function of the text (say, a token count)
    omit: float = 0.2  # share of replies without a modifier: without any, a model would never learn to choose by itself

    def __post_init__(self):
        if len(self.names) != len(self.ranges) or not self.names:
            raise ValueError(f"{len(self.names)} names for {len(self.ranges)} ranges: give each name a range")
        if not 0 <= self.omit <= 1:
            raise ValueError(f"omit={self.omit}: it is a share, from 0 to 1")
        if isinstance(self.unit, str) and self.unit not in UNITS:
            raise ValueError(f"unknown unit {self.unit!r}: use one of {', '.join(UNITS)} or a function of the text")
        for name, (low, high) in zip(self.names, self.ranges, strict=True):
            if low < 0 or (high is not None and high <= low):
                raise ValueError(f"{name!r}: the range {low} to {high} is empty")

    @classmethod
    def from_bounds(cls, bounds: Sequence[int] = BOUNDS, overlap: float = 0.0, **more) -> Scheme:
        """The card's ten names over nine rising bounds. `overlap` stretches each range by that share at both ends."""
        if len(bounds) != len(LENGTHS) - 1 or list(bounds) != sorted(set(bounds)) or bounds[0] < 1 or overlap < 0:
            raise ValueError(
                f"bounds {tuple(bounds)}, overlap {overlap}: give nine rising numbers above 0, and an overlap of 0 or more"
            )
        lows, highs = [0, *bounds], [*bounds, None]
        wide = [
            (int(low / (1 + overlap)), None if high is None else max(low + 1, round(high * (1 + overlap))))
            for low, high in zip(lows, highs, strict=True)
        ]
        return cls(LENGTHS, tuple(wide), **more)

    @cached_property
    def size(self) -> Callable[[str], int]:
        """Text → its length in the scheme's unit."""
        return UNITS[self.unit] if isinstance(self.unit, str) else self.unit

    def fitting(self, text: str) -> list[str]:
        """The names whose range holds the text, in order; empty where the scheme has a gap."""
        n = self.size(text)
        return [
            name for name, (low, high) in zip(self.names, self.ranges, strict=True) if low <= n and (high is None or n < high)
        ]

    def draw(self, text: str, rng: random.Random) -> str | None:
        """A label for a reply: None with probability `omit` or where no range fits, else one of the fitting names."""
        if rng.random() < self.omit:
            return None
        names = self.fitting(text)
        return None if not names else names[0] if len(names) == 1 else rng.choice(names)


OURS = Scheme.from_bounds()
OVERLAPPING = Scheme(
    names=(
        *("microscopic", "tiny", "quite short", "concise", "short", "brief", "medium", "moderate", "somewhat long", "long"),
        *("lengthy", "extended", "very long", "humongous", "hundreds of words", "comprehensive", "extremely long"),
    ),
    ranges=(
        *((0, 30), (0, 85), (40, 80), (50, 110), (85, 130), (100, 160), (130, 180), (160, 220), (150, 200), (180, 240)),
        *((210, 280), (220, 290), (240, 305), (305, 390), (350, 410), (360, 450), (390, 500)),
    ),
    omit=0.5,
)


def class_of(words: int, bounds: Sequence[int] = BOUNDS) -> str:
    """The class of a number of words."""
    return LENGTHS[bisect_right(bounds, words)]


def length_class(text: str, bounds: Sequence[int] = BOUNDS) -> str:
    """The class of a reply, by its number of words. Total (every text has one) and monotone in the number of words."""
    return class_of(count_words(text), bounds)


def word_range(name: str, bounds: Sequence[int] = BOUNDS) -> tuple[int, int | None]:
    """Smallest and largest word count of a class; the largest is None for `unlimited`."""
    i = rank(name)
    return (bounds[i - 1] if i else 1), (bounds[i] - 1 if i < len(bounds) else None)


def rank(name: str) -> int:
    """Position of a class in LENGTHS; a ValueError that lists the ten names for any other word."""
    if name not in LENGTHS:
        raise ValueError(f"unknown length {name!r}: use one of {', '.join(LENGTHS)}, or none for no modifier")
    return LENGTHS.index(name)


def label_replies(story, omit: float | None = None, rng: random.Random | None = None, scheme: Scheme = OURS) -> list[str | None]:
    """One label or None per character reply of a story, drawn by `scheme` (`omit` overrides the scheme's rate)."""
    rng = rng or random.Random(0)
    if omit is not None and omit != scheme.omit:
        scheme = replace(scheme, omit=omit)
    return [scheme.draw(m.text, rng) for m in story.replies]
