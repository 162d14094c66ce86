"""Prompt text → token ids and labels, and packed batches.

The loss is taken on the character's replies (completion mask); everything else gets the label -100. Text is tokenised in
chunks from one end-of-sequence token to the next and labels are assigned by character offset, so that a reply's first
token is the one that generation meets after `{char}:`, with its leading space, for BPE and SentencePiece alike.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from helpers.prompts import Lengths, Segment, generation_segments, segments
from helpers.stories import Story

IGNORED = -100  # cross-entropy's default ignore_index


@dataclass(frozen=True)
class Encoded:
    """One sample: `input_ids` and `labels`, both of length T; labels are ids or -100."""

    input_ids: list[int]
    labels: list[int]
    dropped_turns: int = 0  # turns left out at the front because the context was too short

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """Number of tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)


def start_ids(tokenizer) -> list[int]:
    """The ids that the tokenizer itself puts before a text: [BOS] for Mixtral, [] for OLMoE."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a").input_ids
    return [bos] if bos is not None and ids and ids[0] == bos else []


def _chunk(tokenizer, pieces: Sequence[Segment], loss: str) -> tuple[list[int], list[int]]:
    """Ids and labels of consecutive segments, tokenised as one string."""
    text = "".join(p.text for p in pieces)
    enc = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [p.trained or loss == "all" for p in pieces for _ in p.text]
    labels = []
    for token, (start, end) in zip(enc.input_ids, enc.offset_mapping, strict=True):
        labels.append(token if end > start and trained[end - 1] else IGNORED)
    return enc.input_ids, labels


def encode_segments(pieces: Sequence[Segment], tokenizer, loss: str = "replies", eos: str = "turn") -> Encoded:
    """Ids and labels of segments, in order.

    loss: "replies" (completion mask) or "all" (the card family's practice: every token).
    eos: "turn" (after each reply: the model learns to stop) or "sample" (once at the end: stop strings are needed).
    """
    if loss not in ("replies", "all") or eos not in ("turn", "sample"):
        raise ValueError(f"loss={loss!r}, eos={eos!r}: use loss 'replies' or 'all' and eos 'turn' or 'sample'")
    ids, labels = start_ids(tokenizer), [IGNORED] * len(start_ids(tokenizer))
    end = tokenizer.eos_token_id
    chunk: list[Segment] = []
    for piece in pieces:
        chunk.append(piece)
        if eos == "turn" and piece.kind == "reply":
            more, more_labels = _chunk(tokenizer, chunk, loss)
            ids, labels, chunk = ids + more + [end], labels + more_labels + [end], []
    if chunk:
        more, more_labels = _chunk(tokenizer, chunk, loss)
        ids, labels = ids + more, labels + more_labels
    if eos == "sample":
        ids, labels = [*ids, end], [*labels, end]
    return Encoded(ids, labels)


def encode(
    story: Story, tokenizer, lengths: Lengths = None, context: int | None = None, loss: str = "replies", eos: str = "turn"
) -> Encoded:
    """A story as one training sample of at most `context` tokens.

    A story that is too long loses whole turns right after the instruction block, never a part of a reply; the number is
    kept in `dropped_turns`. A story whose last reply alone does not fit is refused.
    """
    pieces = segments(story, lengths)
    full = encode_segments(pieces, tokenizer, loss, eos)
    if context is None or len(full) <= context:
        return full
    turns = [i for i, p in enumerate(pieces) if p.kind in ("input", "header")]

    def without(dropped: int) -> Encoded:
        return encode_segments([pieces[0], *pieces[turns[dropped] :]], tokenizer, loss, eos)

    # Fewer turns, fewer tokens: search for the first number of dropped turns that fits.
    dropped = bisect_left(range(len(turns)), True, lo=1, key=lambda n: len(without(n)) <= context)
    if dropped < len(turns) and any(p.kind == "reply" for p in pieces[turns[dropped] :]):
        sample = without(dropped)
        return Encoded(sample.input_ids, sample.labels, dropped)
    raise ValueError(f"{story.source or 'story'}: not even the last reply fits in {context} tokens; use a longer context")


def encode_prompt(story: Story, tokenizer, length: str | None = None, history: Lengths = None, eos: str = "turn") -> list[int]:
    """Ids of a generation prompt: a prefix of the ids with which the same conversation is trained."""
    pieces = generation_segments(story, length, history)
    ids = encode_segments(pieces, tokenizer, eos=eos).input_ids
    return ids if eos == "turn" else ids[:-1]  # a prompt does not end the sample


# ---------------------------------------------------------------------------------------------------------- batches


def pack(samples: Sequence[Encoded], context: int) -> list[list[int]]:
    """Bins of sample indices with at most `context` tokens each: first-fit decreasing, then in order of first sample.

    First-fit decreasing needs at most 11/9 of the optimal number of bins (Johnson, 1973).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i])):
        n = len(samples[i])
        if n > context:
            raise ValueError(f"sample {i} has {n} tokens, more than the context of {context}: encode it with context={context}")
        for b, free in enumerate(room):
            if n <= free:
                bins[b].append(i)
                room[b] -= n
                break
        else:
            bins.append([i])
            room.append(context - n)
    return sorted((sorted(b) for b in bins), key=lambda b: b[0])


def packed_row(samples: Iterable[Encoded]) -> dict[str, list[int]]:
    """Samples laid end to end. Positions restart with each, which is how transformers recognises their borders.

    A sample's first token has no predecessor in its own document, so its label is -100 whatever the loss mode.
    """
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for s in samples:
        row["input_ids"] += s.input_ids
        row["labels"] += [IGNORED, *s.labels[1:]]
        row["position_ids"] += range(len(s))
    return row


class Collator:
    """Rows of `packed_row` → tensors (B, T), padded at the right to a multiple of `multiple` tokens.

    There is no attention mask on purpose: transformers isolates packed documents (block-diagonal attention) only when it
    sees restarted positions and no mask. Padding is one more document whose labels are -100; `valid` (B, T) marks the
    real tokens for the router losses and is taken out of the batch before the model sees it.
    """

    def __init__(self, pad_token_id: int, multiple: int = 8):
        self.pad, self.multiple = pad_token_id, multiple

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict:
        import torch

        width = max(len(r["input_ids"]) for r in rows)
        width = math.ceil(width / self.multiple) * self.multiple
        batch: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": [], "valid": []}
        for r in rows:
            n, missing = len(r["input_ids"]), width - len(r["input_ids"])
            batch["input_ids"].append(list(r["input_ids"]) + [self.pad] * missing)
            batch["labels"].append(list(r["labels"]) + [IGNORED] * missing)
            batch["position_ids"].append(list(r["position_ids"]) + list(range(missing)))
            batch["valid"].append([True] * n + [False] * missing)
        return {k: torch.tensor(v) for k, v in batch.items()}
