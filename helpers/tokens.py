"""Prompt text → token ids and labels, and packed batches.

The loss is taken on the character's replies (completion mask); everything else gets the label -100. Text is tokenised in
chunks from one end-of-sequence token to the next and labels are assigned by character offset, so that a reply's first
token is the one that generation meets after `{char}:`, with its leading space, for BPE and SentencePiece alike. The ids are those
of the whole text with its special tokens written out, which is what a server makes of such a prompt.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from helpers.prompts import CLOSING, Lengths, Segment, generation_segments, segments
from helpers.stories import Story, StoryError

IGNORED = -100  # cross-entropy's default ignore_index


@dataclass(frozen=True)
class Encoded:
    """One sample: `input_ids` and `labels`, both of length T; labels are ids or -100. Lists, or arrays (`compact`)."""

    input_ids: list[int] | np.ndarray
    labels: list[int] | np.ndarray
    dropped_turns: int = 0  # turns left out at the front because the context was too short

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """Number of tokens that carry loss."""
        return len(self) - self.labels.count(IGNORED) if isinstance(self.labels, list) else int((self.labels != IGNORED).sum())

    def compact(self) -> Encoded:
        """The same sample as int32 arrays: 8 bytes per token instead of some 44."""
        return Encoded(np.asarray(self.input_ids, np.int32), np.asarray(self.labels, np.int32), self.dropped_turns)


def trained_spans(labels: Sequence[int]) -> list[range]:
    """The stretches of tokens that carry loss, one a reply."""
    spans, start = [], None
    for i, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and start is None:
            start = i
        elif label == IGNORED and start is not None:
            spans.append(range(start, i))
            start = None
    return spans


def start_ids(tokenizer) -> list[int]:
    """The ids that the tokenizer itself puts before a text: [BOS] for Mixtral, [] for OLMoE, two for GLM."""
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    begins = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[: next(begins, 0)]


def encode_segments(pieces: Sequence[Segment], tokenizer, loss: str = "replies", eos: str = "turn") -> Encoded:
    """Ids and labels of segments, in order.

    loss: "replies" (completion mask) or "all" (the card family's practice: every token).
    eos: "turn" (after each reply: the model learns to stop) or "sample" (once at the end: stop strings are needed).
    """
    return _encode_batch([pieces], tokenizer, loss, eos)[0]


def _encode_batch(
    samples: Sequence[Sequence[Segment]], tokenizer, loss: str, eos: str, names: Sequence[str] = ()
) -> list[Encoded]:
    """`encode_segments` for many samples: one call of the tokenizer, which may use all cores. `names` are for messages."""
    if loss not in ("replies", "all") or eos not in ("turn", "sample"):
        raise ValueError(f"loss={loss!r}, eos={eos!r}: use loss 'replies' or 'all' and eos 'turn' or 'sample'")
    start, end = start_ids(tokenizer), tokenizer.eos_token_id
    if end is None:
        raise ValueError("this tokenizer has no end-of-sequence token: set tokenizer.eos_token, so that replies can end")
    begin = "".join(tokenizer.convert_ids_to_tokens(start))
    chunks: list[_Chunk] = []
    for number, pieces in enumerate(samples):
        chunk = _Chunk(number, begin, len(start), [])
        for piece in pieces:
            chunk.pieces.append(piece)
            if eos == "turn" and piece.kind == "reply":
                chunks.append(chunk)
                chunk = _Chunk(number, tokenizer.eos_token, 1, [])
        if chunk.pieces:
            chunks.append(chunk)
    result = [Encoded([*start], [IGNORED] * len(start)) for _ in samples]
    for chunk, ids, labels in _tokenised(chunks, tokenizer, loss, names):
        into = result[chunk.sample]
        into.input_ids.extend(ids)
        into.labels.extend(labels)
        if eos == "turn" and chunk.pieces[-1].kind == "reply":
            into.input_ids.append(end)
            into.labels.append(end)
    if eos == "sample":
        for sample in result:
            sample.input_ids.append(end)
            sample.labels.append(end)
    return result


@dataclass(frozen=True)
class _Chunk:
    """Text that is tokenised as one string: the segments from one special token to the next."""

    sample: int
    after: str  # the special tokens in front; some tokenizers treat the beginning of a text otherwise than what follows a token
    skip: int  # how many these are
    pieces: list[Segment]


def special_tokens(tokenizer) -> dict[str, int]:
    """Text → id of every token that is a command and no text: the named ones, and those added as special ("<|im_start|>")."""
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**dict(named), **added}


def _tokenised(
    chunks: Sequence[_Chunk], tokenizer, loss: str, names: Sequence[str] = ()
) -> Iterator[tuple[_Chunk, list[int], list[int]]]:
    """Ids and labels of chunks. Special tokens that somebody wrote into a text are spelt out, never obeyed."""
    commands = special_tokens(tokenizer)
    special = re.compile("|".join(map(re.escape, commands)) or r"(?!)")
    texts = ["".join(p.text for p in chunk.pieces) for chunk in chunks]
    written = [special.search(text) is not None for text in texts]
    plain = [chunk.after + text for chunk, text, bad in zip(chunks, texts, written, strict=True) if not bad]
    batch = tokenizer(plain, add_special_tokens=False) if plain else None
    row = 0
    for chunk, text, bad in zip(chunks, texts, written, strict=True):
        if bad:
            single = tokenizer([text], add_special_tokens=False, split_special_tokens=True)
            ids, labels = _labels(single, 0, 0, 0, chunk.pieces, loss)
            obeyed = [token for token, number in commands.items() if token in text and number in ids]
            obeyed = [token for token in obeyed if token != tokenizer.unk_token]  # stands for any unknown character
            if obeyed:
                raise StoryError(
                    f"a text contains {obeyed[0]!r}, which this tokenizer cannot spell out",
                    "remove it",
                    file=names[chunk.sample] if names else "",
                )
        else:
            ids, labels = _labels(batch, row, chunk.skip, len(chunk.after), chunk.pieces, loss)
            row += 1
        yield chunk, ids, labels


def _labels(batch, k: int, skip: int, offset: int, pieces: Sequence[Segment], loss: str) -> tuple[list[int], list[int]]:
    """Ids and labels of text `k` of a tokenised batch, whose first `skip` tokens and `offset` characters are not ours.

    A token is trained if its last character is.
    """
    ids = batch.input_ids[k][skip:]
    if loss == "replies" and pieces[-1].trained and not any(p.trained for p in pieces[:-1]):
        # The usual chunk, one reply at its end: where does its first character, the space, lie?
        first = batch.char_to_token(k, offset + sum(len(p.text) for p in pieces[:-1]))
        if first is not None:
            return ids, [IGNORED] * (first - skip) + ids[first - skip :]
    trained = [p.trained or loss == "all" for p in pieces for _ in p.text]
    places = zip(ids, batch[k].offsets[skip:], strict=True)
    return ids, [token if end > start and trained[end - offset - 1] else IGNORED for token, (start, end) in places]


def encode(
    story: Story,
    tokenizer,
    lengths: Lengths = None,
    context: int | None = None,
    loss: str = "replies",
    eos: str = "turn",
    closing: str = CLOSING,
) -> Encoded:
    """A story as one training sample of at most `context` tokens.

    A story that is too long loses whole turns right after the instruction block, never a part of a reply; the number is
    kept in `dropped_turns`. A story whose last reply alone does not fit is refused.
    """
    return next(encode_all([(story, lengths)], tokenizer, context, loss, eos, closing))


def encode_all(
    labelled: Iterable[tuple[Story, Lengths]],
    tokenizer,
    context: int | None = None,
    loss: str = "replies",
    eos: str = "turn",
    closing: str = CLOSING,
    long: str = "drop",
    batch_size: int = 64,
    unfit: dict[int, StoryError] | None = None,
) -> Iterator[Encoded]:
    """`encode` for many stories, `batch_size` at a time.

    long: what becomes of a story that does not fit. "drop": its first turns go, as in `encode`. "split": it becomes several
    samples, each with the instruction block and the next whole turns, so that a short context still trains on every reply.

    A story of which that cannot be made raises a StoryError; with `unfit`, that is put there under the story's number instead,
    and nothing is yielded for the story.
    """
    if long not in ("drop", "split"):
        raise ValueError(f"long={long!r}: use 'drop' or 'split'")
    shorten = _split if long == "split" else _shortened
    number = -1
    for batch in _batched(labelled, batch_size):
        pieces = [segments(story, lengths, closing) for story, lengths in batch]
        names = [story.source or "this story" for story, _ in batch]
        for (story, _), parts, full in zip(batch, pieces, _encode_batch(pieces, tokenizer, loss, eos, names), strict=True):
            number += 1
            if context is None or len(full) <= context:
                yield full
                continue
            try:
                shorter = list(shorten(story, parts, tokenizer, context, loss, eos))  # all of it, or nothing
            except StoryError as error:
                if unfit is None:
                    raise
                unfit[number] = error
                continue
            yield from shorter


def _batched(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _shortened(story: Story, pieces: Sequence[Segment], tokenizer, context: int, loss: str, eos: str) -> Iterator[Encoded]:
    """The last turns of a story that are no longer than the context."""
    turns = [i for i, p in enumerate(pieces) if p.kind in ("input", "header")]

    def without(dropped: int) -> Encoded:
        return encode_segments([pieces[0], *pieces[turns[dropped] :]], tokenizer, loss, eos)

    # Fewer turns, fewer tokens: search for the first number of dropped turns that fits.
    dropped = bisect_left(range(len(turns)), True, lo=1, key=lambda n: len(without(n)) <= context)
    if dropped < len(turns) and any(p.kind == "reply" for p in pieces[turns[dropped] :]):
        sample = without(dropped)
        yield Encoded(sample.input_ids, sample.labels, dropped)
        return
    raise StoryError(
        f"not even the last reply fits in {context} tokens", "use a longer context", file=story.source or "this story"
    )


def _split(story: Story, pieces: Sequence[Segment], tokenizer, context: int, loss: str, eos: str) -> Iterator[Encoded]:
    """A story's turns in order, as many as fit in each sample; a sample ends with a reply."""
    turns = [i for i, p in enumerate(pieces) if p.kind in ("input", "header")] + [len(pieces)]
    ends = [n for n in range(1, len(turns)) if pieces[turns[n] - 1].kind == "reply"]  # a sample may stop before turn n
    begin = 0
    while begin < (ends[-1] if ends else 0):
        later = [n for n in ends if n > begin]

        def until(n: int, begin: int = begin) -> Encoded:
            return encode_segments([pieces[0], *pieces[turns[begin] : turns[n]]], tokenizer, loss, eos)

        fitting = bisect_left(later, True, key=lambda n: len(until(n)) > context)
        if not fitting:
            raise StoryError(
                f"turn {begin + 1} and its reply do not fit in {context} tokens",
                "use a longer context",
                file=story.source or "this story",
            )
        yield until(later[fitting - 1])
        begin = later[fitting - 1]


def encode_prompt(
    story: Story, tokenizer, length: str | None = None, history: Lengths = None, eos: str = "turn", closing: str = CLOSING
) -> list[int]:
    """Ids of a generation prompt: a prefix of the ids with which the same conversation is trained."""
    pieces = generation_segments(story, length, history, closing)
    ids = encode_segments(pieces, tokenizer, eos=eos).input_ids
    return ids if eos == "turn" else ids[:-1]  # a prompt does not end the sample


# ---------------------------------------------------------------------------------------------------------- batches


def pack(samples: Sequence[Encoded], context: int) -> list[list[int]]:
    """Bins of sample indices with at most `context` tokens each, in order of their first sample.

    Best-fit decreasing: longest first, each into the fullest bin that still has room. That needs at most 11/9 of the optimal
    number of bins, like first-fit decreasing (Johnson 1973). Where it does not reach the lower bound, slightly shuffled orders
    are tried as well (always the same ones), and the fewest bins win.
    """
    sizes = [len(s) for s in samples]
    for i, n in enumerate(sizes):
        if n > context:
            raise ValueError(f"sample {i} has {n} tokens, more than the context of {context}: encode it with context={context}")
    best = _best_fit(sizes, sorted(range(len(sizes)), key=lambda i: -sizes[i]), context)
    rng = random.Random(0)
    for _ in range(PACKING_EFFORT // max(1, len(sizes))):
        if len(best) <= math.ceil(sum(sizes) / context):
            break
        shuffled = sorted(range(len(sizes)), key=lambda i: -sizes[i] * rng.uniform(0.7, 1.3))
        best = min(best, _best_fit(sizes, shuffled, context), key=len)
    return sorted((sorted(b) for b in best), key=lambda b: b[0])


PACKING_EFFORT = 300_000  # samples placed in shuffled orders: about a second


def _best_fit(sizes: Sequence[int], order: Iterable[int], context: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), sorted
    for i in order:
        at = bisect_left(rooms, (sizes[i], -1))
        if at == len(rooms):
            bins.append([])
            room, b = context, len(bins) - 1
        else:
            room, b = rooms.pop(at)
        bins[b].append(i)
        insort(rooms, (room - sizes[i], b))
    return bins


def packed_row(samples: Iterable[Encoded]) -> dict[str, np.ndarray]:
    """Samples laid end to end, as int32 arrays (T,). Positions restart with each: so transformers recognises their borders.

    A sample's first token has no predecessor in its own document, so its label is -100 whatever the loss mode.
    """
    samples = list(samples)
    return {
        "input_ids": np.concatenate([np.asarray(s.input_ids, np.int32) for s in samples]),
        "labels": np.concatenate([np.asarray([IGNORED, *s.labels[1:]], np.int32) for s in samples]),
        "position_ids": np.concatenate([np.arange(len(s), dtype=np.int32) for s in samples]),
    }


class Collator:
    """Rows of `packed_row` → tensors (B, T), padded at the right to a multiple of `multiple` tokens.

    There is no attention mask on purpose: transformers isolates packed documents (block-diagonal attention) only when it
    sees restarted positions, no mask and no cache. Padding is one more document whose labels are -100; `valid` (B, T) marks the
    real tokens for the router losses and is taken out of the batch before the model sees it.
    """

    def __init__(self, pad_token_id: int, multiple: int = 8):
        self.pad, self.multiple = pad_token_id, multiple

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict:
        import torch

        width = max(len(r["input_ids"]) for r in rows)
        width = math.ceil(width / self.multiple) * self.multiple
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, self.pad),
            "labels": torch.full(shape, IGNORED),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "valid": torch.zeros(shape, dtype=torch.bool),
        }
        for b, row in enumerate(rows):
            n = len(row["input_ids"])
            for key in ("input_ids", "labels", "position_ids"):
                batch[key][b, :n] = torch.as_tensor(row[key])
            batch["position_ids"][b, n:] = torch.arange(width - n)
            batch["valid"][b, :n] = True
        return batch


def document_bounds(position_ids) -> dict:
    """Where the documents of a batch (B, T) begin and end, as FlashAttention's keyword arguments for variable lengths.

    transformers finds packed documents by itself for flash attention only in a batch of one row: in a batch of several they
    would see each other, without a warning. Given these, it looks at nothing else. The rows count as laid end to end.
    """
    import torch

    starts = torch.nonzero(position_ids.flatten() == 0).flatten()  # every row begins with a document
    bounds = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    longest = int(position_ids.max()) + 1
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
