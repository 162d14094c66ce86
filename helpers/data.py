"""Stories → packed rows: what a training run is fed; and stories as a `datasets.Dataset`."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from helpers.lengths import label_replies
from helpers.profiles import ROOT, Profile
from helpers.prompts import Lengths
from helpers.stories import Story, StoryError, StoryErrors, load_stories, parse_record
from helpers.tokens import encode_all, pack, packed_row

Labelled = tuple[Story, Lengths]


def labelled_stories(profile: Profile, stories: Sequence[Story] | None = None) -> list[Labelled]:
    """Stories with a modifier or None for each character reply.

    Given stories (or those that the profile names) get each reply's own class, left out at the profile's rate. The tiny
    profile generates its own, with budgets drawn evenly over the classes for nine in ten labelled replies: a model
    that starts from nothing needs to see the rare classes often.
    """
    if stories is None and profile.stories.startswith("generated:"):
        return list(_generated(int(profile.stories.partition(":")[2]), profile.seed, profile.omit))
    if stories is None:
        stories = load_stories(ROOT / profile.stories)
    rng = random.Random(profile.seed)
    return [(story, label_replies(story, profile.omit, rng)) for story in stories]


def to_dataset(stories: Iterable[Story]):
    """Stories as a `datasets.Dataset` in the file schema, one story a row; `from_dataset` is the inverse."""
    from datasets import Dataset

    return Dataset.from_list([s.record() for s in stories])


def from_dataset(rows: Iterable[Mapping[str, Any]], source: str = "dataset") -> list[Story]:
    """Stories from rows in the file schema, say of `load_dataset("json", data_files="my.jsonl")["train"]`.

    A bad row raises its StoryError, with the row's number.
    """
    return [parse_record(row, f"{source}[{i}]") for i, row in enumerate(rows)]


@functools.lru_cache(maxsize=2)
def _generated(count: int, seed: int, omit: float) -> tuple[Labelled, ...]:
    from helpers.tiny import ADAPTER_SEED
    from helpers.tiny_stories import labelled_story

    first = ADAPTER_SEED + 10_000 * (seed % 97)
    limits = random.Random(seed)  # stories of 2 to 16 turns, so that a row holds one to five of them
    return tuple(labelled_story(first + k, balanced=0.9, omit=omit, max_words=limits.randint(60, 300)) for k in range(count))


@dataclass(frozen=True)
class Corpus:
    """Packed rows and what is in them."""

    rows: list[dict[str, np.ndarray]] = field(compare=False)  # of `packed_row`; `digest` stands for them
    stories: int
    samples: int  # more than stories if long ones were split
    tokens: int
    trained: int  # tokens that carry loss
    dropped_turns: int
    fill: float  # share of the rows' places that hold tokens
    digest: str  # SHA-256 over all ids and labels: the run's data, to the bit
    names: list[list[str]] = field(default_factory=list, compare=False, repr=False)  # of the stories in each row
    parts: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # what the rows are made of, by its digest

    def numbered(self) -> list[dict[str, Any]]:
        """The rows, each with its number and the names of its stories: so a message about a row can say whose it is."""
        return [{**row, "number": n, "stories": names} for n, (row, names) in enumerate(zip(self.rows, self.names, strict=True))]

    def __str__(self) -> str:
        parts = f" in {self.samples} samples" if self.samples > self.stories else ""
        dropped = f", {self.dropped_turns} turns dropped" if self.dropped_turns else ""
        noun = "story" if self.stories == 1 else "stories"
        return (
            f"{self.stories} {noun}{parts}, {self.tokens:,} tokens, {self.trained / self.tokens:.0%} of them trained, "
            f"{len(self.rows)} rows filled to {self.fill:.1%}{dropped}"
        )


def build_corpus(
    labelled: Sequence[Labelled],
    tokenizer,
    context: int,
    loss: str = "replies",
    eos: str = "turn",
    long: str = "drop",
    too_long: list[StoryError] | None = None,
) -> Corpus:
    """Encode and pack. Raises ValueError when nothing would be trained. `long`: see `tokens.encode_all`.

    Stories of which nothing fits the context: StoryErrors names them all; with a list `too_long`, each is left out and its
    StoryError is appended.
    """
    labelled = list(labelled)
    unfit: dict[int, StoryError] = {}
    if long == "split":  # a story becomes several samples; encoded by itself, its samples are known to be its own
        encoded = []
        for k, pair in enumerate(labelled):
            found: dict[int, StoryError] = {}
            encoded.append([s.compact() for s in encode_all([pair], tokenizer, context, loss, eos, long=long, unfit=found)])
            if found:
                unfit[k] = found[0]
        owners = [k for k, group in enumerate(encoded) for _ in group]
        samples = [sample for group in encoded for sample in group]
    else:
        samples = [s.compact() for s in encode_all(labelled, tokenizer, context, loss, eos, long=long, unfit=unfit)]
        owners = [k for k in range(len(labelled)) if k not in unfit]
    if unfit and too_long is None:
        problems = list(unfit.values())
        if len(problems) == 1:
            raise problems[0]
        raise StoryErrors(problems, len(labelled) - len(problems), f"do not fit the context of {context:,} tokens")
    if unfit:
        too_long += unfit.values()
    titles = [story.source or " and ".join(story.names) for story, _ in labelled]
    trained = sum(s.trained for s in samples)
    if not samples:
        left = f"all {len(labelled)} are longer than the context of {context:,} tokens" if labelled else "none was given"
        raise ValueError(f"no token carries loss, because no story is left: {left}")
    if not trained:
        raise ValueError("no token carries loss: the stories have no character reply that fits the context")
    bins = pack(samples, context)
    rows = [packed_row(samples[i] for i in members) for members in bins]
    told = [story.record() for story, _ in labelled]
    made_of = {"the stories": told, "their length labels": [list(lengths or ()) for _, lengths in labelled]}
    parts = {name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in made_of.items()}
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["input_ids"].tobytes() + row["labels"].tobytes())
    tokens = sum(map(len, samples))
    return Corpus(
        rows=rows,
        stories=len(labelled) - len(unfit),
        samples=len(samples),
        tokens=tokens,
        trained=trained,
        dropped_turns=sum(s.dropped_turns for s in samples),
        fill=tokens / (len(rows) * context),
        digest=digest.hexdigest(),
        names=[list(dict.fromkeys(titles[owners[i]] for i in members)) for members in bins],
        parts=parts,
    )
