"""What else the length control does: changes in mid-conversation, old and unknown modifiers, names, repetition, perplexity.

Each function takes a model or a finished table and returns plain rows, for a table, a figure or a JSON file.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from helpers import length_stats as stats
from helpers.evaluation import CONDITIONS, DEEP, FIRST, LengthTable, row_of
from helpers.generation import Progress, Prompt, Sampling, reply_stops, steady
from helpers.held_out import HeldOutLoss
from helpers.lengths import LENGTHS, count_words, label_replies, length_class, word_range
from helpers.prompts import Lengths, generation_segments, response_header
from helpers.replies import recorded_replies
from helpers.schema import Message, Story, StoryError, clean_reply
from helpers.tokens import encode_segments

Rows = list[dict[str, Any]]
UNKNOWN = ("gigantic", "brief", "20 words", "banana")


@dataclasses.dataclass(frozen=True)
class Asker:
    """A model with everything that is the same for all questions to it."""

    model: Any
    tokenizer: Any
    sampling: Sampling | None = None
    batch_size: int = 64
    progress: Progress | None = None
    folder: str | Path | None = None  # replies are kept here, as in `measure_length_control`

    def ask(self, prompts: Sequence[Prompt]):
        return recorded_replies(self.model, self.tokenizer, prompts, self.sampling, self.batch_size, self.progress, self.folder)


# -------------------------------------------------------------------------------------------------------- conversations


def change_of_length(
    asker: Asker,
    stories: Sequence[Story],
    first: Sequence[str] = ("tiny", "enormous"),
    then: Sequence[str] = ("tiny", "medium", "enormous"),
) -> Rows:
    """The model's own first reply at one length, the user's next message, then a reply at another: words of both.

    A row per reply: first, then, story, words, before (words of the first reply). Stories need two character replies.
    """
    stories = [s for s in stories if len(s.replies) > 1]
    opening = asker.ask([Prompt.of(s.before_reply(0), asker.tokenizer, a) for s in stories for a in first])
    cases, prompts = [], []
    for k, said in enumerate(opening):
        story, a = stories[k // len(first)], first[k % len(first)]
        text = clean_reply(said.text)
        if not text:
            continue
        before = story.before_reply(1)
        at = next(i for i, m in enumerate(before.messages) if m.speaker == "character")
        messages = (*before.messages[:at], Message("character", text), *before.messages[at + 1 :])
        try:
            changed = dataclasses.replace(before, messages=messages)
        except StoryError:  # what it wrote cannot stand in a story (it imitates a block header, say)
            continue
        for b in then:
            cases.append({"first": a, "then": b, "story": k // len(first), "before": count_words(text)})
            prompts.append(Prompt.of(changed, asker.tokenizer, b, [a]))
    return [row_of(r, **case) for case, r in zip(cases, asker.ask(prompts), strict=True)]


def carry_over(asker: Asker, stories: Sequence[Story], asked: Sequence[str | None] = ("medium", None), reply: int = DEEP) -> Rows:
    """The same conversation, word for word, with other modifiers on the replies already given. A row per reply."""
    cases, prompts = [], []
    for number, story in enumerate(stories):
        before = story.before_reply(reply)
        own: Lengths = [length_class(m.text) for m in before.replies]
        histories = {"their own": own, "none": None, "all tiny": ["tiny"] * len(own), "all enormous": ["enormous"] * len(own)}
        for name, history in histories.items():
            for length in asked:
                cases.append({"history": name, "asked": length, "story": number})
                prompts.append(Prompt.of(before, asker.tokenizer, length, history))
    return [row_of(r, **case) for case, r in zip(cases, asker.ask(prompts), strict=True)]


def unknown_modifiers(asker: Asker, stories: Sequence[Story], words: Sequence[str] = UNKNOWN, reply: int = FIRST) -> Rows:
    """Replies to modifiers that no training has seen. Formatting refuses them, so they are put into the header by hand."""
    cases, prompts = [], []
    for number, story in enumerate(stories):
        before = story.before_reply(reply)
        char = before.names.character
        history = [length_class(m.text) for m in before.replies]
        *pieces, header = generation_segments(before, "medium", history)
        assert header.text.endswith(response_header(char, "medium"))
        for word in words:
            text = header.text.replace("(length = medium)", f"(length = {word})")
            ids = encode_segments([*pieces, dataclasses.replace(header, text=text)], asker.tokenizer).input_ids
            cases.append({"asked": word, "story": number})
            prompts.append(Prompt(tuple(ids), reply_stops(before)))
    return [row_of(r, **case) for case, r in zip(cases, asker.ask(prompts), strict=True)]


def mean_by(rows: Iterable[dict[str, Any]], *keys: str) -> Rows:
    """Mean words with 95 % intervals over conversations for each combination of `keys`, in order of appearance."""
    groups: dict[tuple, list] = defaultdict(list)
    for r in rows:
        groups[tuple(r[k] for k in keys)].append(r)
    table = []
    for values, members in groups.items():
        words, stories = [r["words"] for r in members], [r["story"] for r in members]
        low, high = stats.bootstrap(words, groups=stories)
        cut = sum(r["end"] == "limit" for r in members) / len(members)
        numbers = {"n": len(words), "mean": statistics.fmean(words), "low": low, "high": high, "cut off": cut}
        table.append(dict(zip(keys, values, strict=True)) | numbers)
    return table


# --------------------------------------------------------------------------------------------------------------- texts


def text_report(table: LengthTable, stories: Sequence[Story], known_names: set[str]) -> Rows:
    """How replies of each condition end and read. Shares of replies, except distinct-2 (share of different word pairs).

    right names: of the replies that use a name, those that use only the two speakers' (None if no reply does).
    """
    rows = []
    for c in (c for c in CONDITIONS if c in table.conditions):
        chosen = table.of(c)
        n = len(chosen)
        low, high = word_range(c) if c else (0, None)
        named = [(r, found) for r in chosen if (found := names_in(r["text"], known_names))]
        right = [found <= set(stories[r["story"]].names) for r, found in named]
        rows.append(
            {
                "length": c or "(none)",
                "speaks for the user": sum(_for_the_user(r["stopped_at"]) for r in chosen) / n,
                "new header": sum("###" in (r["stopped_at"] or "") for r in chosen) / n,
                "empty": sum(not r["text"] for r in chosen) / n,
                "too short": sum(r["words"] < low for r in chosen) / n if c else None,
                "too long": sum(high is not None and r["words"] > high for r in chosen) / n if c else None,
                "loops": sum(stats.loops(r["text"]) for r in chosen) / n,
                "distinct-2": stats.distinct([r["text"] for r in chosen], 2),
                "with names": len(named) / n,
                "right names": sum(right) / len(right) if right else None,
            }
        )
    return rows


def _for_the_user(stopped_at: str | None) -> bool:
    """A reply that was stopped at the user's name or at an input header began to speak for the user."""
    return bool(stopped_at) and ("###" not in stopped_at or "Input" in stopped_at)


def names_in(text: str, known: set[str]) -> set[str]:
    """Known first names that occur in a text as words."""
    return known & set(re.findall(r"\b[^\W\d_]+\b", text))


def known_names(stories: Iterable[Story]) -> set[str]:
    """The names of all speakers, and those that the story generator uses."""
    from helpers.tiny_words import HE, SHE

    return {*SHE, *HE} | {name for s in stories for name in s.names}


TALKATIVE = ("quiet", "easy", "talkative")


def talkativeness(story: Story) -> str | None:
    """How much the character talks, by its persona; None where a persona does not say it in the story generator's words."""
    from helpers.tiny_words import TALK

    for kind, sentences in TALK.items():
        if any(story.personas.character.endswith(s.format(N=story.names.character)) for s in sentences):
            return kind
    return None


def verbosity(table: LengthTable, stories: Sequence[Story], condition: str | None = None) -> Rows:
    """Words without modifier by the character's talkativeness, replies beside the conversations' own."""
    rows = []
    for kind in TALKATIVE:
        members = [i for i, s in enumerate(stories) if talkativeness(s) == kind]
        chosen = [r for r in table.of(condition) if r["story"] in members]
        if chosen:
            (row,) = mean_by(({**r, "persona": kind} for r in chosen), "persona")
            rows.append({**row, "their own": statistics.fmean(table.natural[i] for i in members)})
    return rows


# ---------------------------------------------------------------------------------------------------------- perplexity


def reply_perplexity(model, tokenizer, stories: Sequence[Story]) -> Rows:
    """Perplexity of the conversations' own replies, by class, with every reply's right modifier and with none anywhere.

    Perplexity is exp of the mean negative log-likelihood of a reply's tokens and its end, in nats per token.
    """
    own = [(story, label_replies(story, 0.0)) for story in stories]
    plain = [(story, [None] * len(lengths)) for story, lengths in own]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    context = model.config.get_text_config().max_position_embeddings
    measures = {kind: HeldOutLoss(part, tokenizer, context, pad) for kind, part in (("with", own), ("without", plain))}
    with steady(model):
        nats = {kind: measure(model) for kind, measure in measures.items()}
    counted = measures["with"]
    return [
        {"length": name, "replies": counted.replies[name], "tokens": counted.tokens[name]}
        | {kind: math.exp(found[name]) for kind, found in nats.items()}
        for name in LENGTHS
        if counted.replies[name]
    ]
