"""Stories → packed rows: what a training run is fed."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.lengths import label_replies
from helpers.profiles import ROOT, Profile
from helpers.prompts import Lengths
from helpers.stories import Story, load_stories
from helpers.tokens import Encoded, encode, pack, packed_row

Labelled = tuple[Story, Lengths]


def labelled_stories(profile: Profile, stories: Sequence[Story] | None = None) -> list[Labelled]:
    """Stories with a modifier or None for each character reply.

    Given stories (or those that the profile names) get each reply's own class, left out at the profile's rate. The tiny
    profile generates its own, with budgets drawn evenly over the classes for 60 % of the labelled replies: a model that
    starts from nothing needs to see the rare classes often.
    """
    if stories is None and profile.stories.startswith("generated:"):
        return list(_generated(int(profile.stories.partition(":")[2]), profile.seed, profile.omit))
    if stories is None:
        stories = load_stories(ROOT / profile.stories)
    rng = random.Random(profile.seed)
    return [(story, label_replies(story, profile.omit, rng)) for story in stories]


@functools.lru_cache(maxsize=2)
def _generated(count: int, seed: int, omit: float) -> tuple[Labelled, ...]:
    from helpers.tiny import ADAPTER_SEED
    from helpers.tiny_stories import labelled_story

    first = ADAPTER_SEED + 10_000 * (seed % 97)
    limits = random.Random(seed)  # stories of 2 to 16 turns, so that a row holds one to five of them
    return tuple(labelled_story(first + k, balanced=0.6, omit=omit, max_words=limits.randint(60, 300)) for k in range(count))


@dataclass(frozen=True)
class Corpus:
    """Packed rows and what is in them."""

    rows: list[dict[str, list[int]]]
    samples: int
    tokens: int
    trained: int  # tokens that carry loss
    dropped_turns: int
    fill: float  # share of the rows' places that hold tokens
    digest: str  # SHA-256 over all ids and labels: the run's data, to the bit

    def __str__(self) -> str:
        return (
            f"{self.samples} stories, {self.tokens:,} tokens, {self.trained / self.tokens:.0%} of them trained, "
            f"{len(self.rows)} rows filled to {self.fill:.1%}"
            + (f", {self.dropped_turns} turns dropped" if self.dropped_turns else "")
        )


def build_corpus(labelled: Sequence[Labelled], tokenizer, context: int, loss: str = "replies", eos: str = "turn") -> Corpus:
    """Encode and pack. Raises ValueError when nothing would be trained."""
    samples: list[Encoded] = [encode(s, tokenizer, lengths, context, loss, eos) for s, lengths in labelled]
    trained = sum(s.trained for s in samples)
    if not trained:
        raise ValueError("no token carries loss: the stories have no character reply that fits the context")
    rows = [packed_row(samples[i] for i in members) for members in pack(samples, context)]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    tokens = sum(map(len, samples))
    return Corpus(
        rows=rows,
        samples=len(samples),
        tokens=tokens,
        trained=trained,
        dropped_turns=sum(s.dropped_turns for s in samples),
        fill=tokens / (len(rows) * context),
        digest=digest.hexdigest(),
    )
