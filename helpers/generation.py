"""Batched sampling of replies: stop strings that cut exactly, one random stream a row, streaming for a chat.

The loop is our own because an experiment asks one conversation for eleven lengths several times. It reads the text that such
prompts share once, deals the key-value cache out to the rows, and takes finished rows out of the batch, which
`transformers.generate` does not. The filters are transformers' own logits processors.

A row's text follows from its prompt, its sample number and the seed alone: each row draws from its own random stream, so
neither batch mates nor batch size nor order matter (but for rounding: sums in another order differ in the last bits, and a
draw that lies that close to a border falls to the other side).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from helpers.lengths import LENGTHS, word_range
from helpers.losses import without_dropout
from helpers.prompts import Lengths, stop_strings
from helpers.stories import Story
from helpers.tokens import encode_prompt

PREFILL_TOKENS = 32768  # prompt tokens read in one forward pass
Progress = Callable[[int, int, float], None]  # replies done, replies in all, seconds left
_RANGES = {
    "temperature": "at least 0 (0: always the likeliest token; 1: the model's own distribution)",
    "top_k": "a whole number of at least 0 (0 switches it off)",
    "top_p": "above 0 and at most 1 (1 switches it off)",
    "min_p": "from 0 to 1 (0 switches it off)",
    "typical_p": "above 0 and at most 1 (1 switches it off)",
    "repetition_penalty": "above 0 (1 switches it off)",
    "max_new_tokens": "at least 1",
}


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. A neutral value switches a filter off; temperature 0 is greedy decoding."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 420
    seed: int = 0

    def __post_init__(self):
        for name, ok in {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "typical_p": 0 < self.typical_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "max_new_tokens": self.max_new_tokens >= 1,
        }.items():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: {_RANGES[name]}")

    def processors(self) -> list[LogitsProcessor]:
        chain: list[LogitsProcessor] = []
        if self.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0.0, 1.0):
            chain.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            chain.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            chain.append(MinPLogitsWarper(self.min_p))
        if self.typical_p < 1.0:
            chain.append(TypicalLogitsWarper(self.typical_p))
        return chain


# As model cards of this family recommend them. Tail-free sampling, which the older ones name (temperature 0.7 to 0.85, tail
# cut at 0.9 to 0.95), is not in transformers; top-p cuts the same tail.
SAMPLERS = {
    "greedy": Sampling(temperature=0.0),
    "course": Sampling(temperature=0.8, top_p=0.95),
    "plain": Sampling(temperature=1.0),
    "cool": Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1),
    "warm": Sampling(temperature=1.25, min_p=0.05, repetition_penalty=1.05),
}


def reply_stops(story: Story) -> tuple[str, ...]:
    """Text at which a reply is over: the format's stop strings, and the ways in which a model slips past them.

    A header or the user's name without its colon on a line of its own would evade strings that end in a colon.
    """
    user = story.names.user
    return (*stop_strings(story), "\n### Input", "\n### Response", "\n### Instruction", f"\n{user}\n", f"\n{user} :")


@dataclass(frozen=True)
class Prompt:
    """What a reply is asked for: token ids that end with `{char}:`, and the strings that end the reply.

    `sample` tells several replies to one prompt apart: each number is a random stream of its own.
    """

    ids: tuple[int, ...]
    stops: tuple[str, ...]
    length: str | None = None
    sample: int = 0

    @classmethod
    def of(cls, story: Story, tokenizer, length: str | None = None, history: Lengths = None, sample: int = 0) -> Prompt:
        return cls(tuple(encode_prompt(story, tokenizer, length, history)), reply_stops(story), length, sample)


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int  # generated, the end token included
    end: Literal["eos", "stop", "limit"]  # limit: cut off by max_new_tokens or the context, so longer than measured
    stopped_at: str | None = None  # the stop string that ended it


def generate_replies(
    model: PreTrainedModel,
    tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[Reply]:
    """One reply a prompt, in the prompts' order. The same prompt given twice counts as two samples."""
    replies = dict(iterate_replies(model, tokenizer, prompts, sampling, batch_size, progress))
    return [replies[i] for i in range(len(prompts))]


def iterate_replies(
    model: PreTrainedModel,
    tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Reply]]:
    """(number of the prompt, reply) as batches finish: whoever writes them down loses at most one batch.

    Batches are made of prompts that ask for similar lengths, so that few rows wait for a long one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one row has to be sampled at once")
    sampling = sampling or Sampling()
    prompts = numbered(prompts)
    work = [_expected_words(p.length) + 4 for p in prompts]
    done, worked, began = 0, 0, time.monotonic()
    with steady(model):
        for chunk in _chunks(prompts):
            cache, mask = _prefill(model, [prefix for prefix, _ in chunk])
            members = sorted((work[i], len(prompts[i].ids), i, row) for row, (_, group) in enumerate(chunk) for i in group)
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                rows = _Rows(tokenizer, [prompts[i] for *_, i, _ in batch], sampling, model)
                places = [row for *_, row in batch]
                lengths = [len(chunk[row][0]) for row in places]
                for _ in _decode(model, cache, mask, places, lengths, rows):
                    pass
                done, worked = done + len(batch), worked + sum(w for w, *_ in batch)
                for (*_, i, _), reply in zip(batch, rows.replies(), strict=True):
                    yield i, reply
                if progress:
                    progress(done, len(prompts), (time.monotonic() - began) * (sum(work) - worked) / worked)


def stream_reply(model: PreTrainedModel, tokenizer, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
    """One reply in pieces as they are made; joined they are the text that `generate_replies` returns.

    What may turn out to be the beginning of a stop string is held back until it is decided.
    """
    sampling = sampling or Sampling()
    rows = _Rows(tokenizer, [prompt], sampling, model)
    shown = 0
    with steady(model):
        cache, mask = _prefill(model, [prompt.ids[:-1]])
        for _ in _decode(model, cache, mask, [0], [len(prompt.ids) - 1], rows):
            text = tokenizer.decode(rows.tokens[0], skip_special_tokens=True)
            safe = text[: _decided(text, prompt.stops)].lstrip()  # a stop string may begin with the first newline
            if len(safe) > shown:
                yield safe[shown:]
                shown = len(safe)
        rest = rows.replies()[0].text[shown:]
        if rest:
            yield rest


def numbered(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with sample numbers that tell repeated ones apart."""
    taken: set[tuple] = set()
    result = []
    for p in prompts:
        sample = p.sample
        while (p.ids, sample) in taken:
            sample += 1
        taken.add((p.ids, sample))
        result.append(p if sample == p.sample else replace(p, sample=sample))
    return result


def stream_seed(prompt: Prompt, seed: int) -> int:
    """The seed of a row's random stream, from its prompt, its sample number and the run's seed."""
    digest = hashlib.blake2b(repr((seed, prompt.ids, prompt.sample)).encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "little")


@contextlib.contextmanager
def steady(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and one thread for a small model on a CPU; both as before afterwards.

    Products of small matrices are too short to be shared out: two threads mostly wait for each other, and for every other
    program on the machine.
    """
    threads = torch.get_num_threads()
    try:
        if model.device.type == "cpu" and model.config.hidden_size < 1024:
            torch.set_num_threads(1)
        with without_dropout(model):
            yield
    finally:
        torch.set_num_threads(threads)


def print_progress(done: int, total: int, seconds_left: float) -> None:
    """A progress function: one line that overwrites itself, with the time left."""
    end = "\n" if done == total else ""
    minutes, seconds = divmod(round(seconds_left), 60)
    print(f"\r{done:>6}/{total} replies, {minutes}:{seconds:02} left ", end=end, flush=True)


# ----------------------------------------------------------------------------------------------------------- plumbing


def _expected_words(length: str | None) -> int:
    low, high = word_range(length) if length in LENGTHS else (20, 40)
    return (low + (high or 2 * low)) // 2


def _chunks(prompts: Sequence[Prompt], apart: int = 32) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Groups of prompts that differ in their last `apart` tokens only, as (shared prefix, members), in chunks of one prefill.

    Each prompt keeps at least one token of its own: the logits of the first reply token come from it.
    """
    groups: list[list] = []  # [first ids, length of the shared prefix, members]
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i].ids):
        ids = prompts[i].ids
        if groups:
            first, shared, members = groups[-1]
            same = next((k for k, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b), min(len(first), len(ids)))
            shared = min(shared, same, len(ids) - 1)
            if shared >= max(len(ids), *(len(prompts[m].ids) for m in members)) - apart:
                groups[-1][1] = shared
                members.append(i)
                continue
        groups.append([ids, len(ids) - 1, [i]])
    chunk: list[tuple[tuple[int, ...], list[int]]] = []
    for ids, shared, members in sorted(groups, key=lambda g: g[1]):  # so the last prefix is the longest
        if chunk and ((len(chunk) + 1) * shared > PREFILL_TOKENS or (shared and not chunk[-1][0])):  # nothing and something
            yield chunk
            chunk = []
        chunk.append((ids[:shared], members))
    if chunk:
        yield chunk


def _left_padded(rows: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask. Padding repeats a token of the row itself: a repetition penalty must not see a foreign one."""
    width = max(map(len, rows))
    ids = torch.tensor([[r[0] if len(r) else 0] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


@torch.inference_mode()
def _prefill(model, prefixes: Sequence[Sequence[int]]):
    """Key-value cache and attention mask (B, T) of prompts read up to their own last tokens; all have such a prefix, or none."""
    if not any(prefixes):  # a prompt of one token has nothing before it
        return None, torch.zeros(len(prefixes), 0, dtype=torch.long, device=model.device)
    ids, mask = _left_padded(prefixes, model.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    return out.past_key_values, mask


@torch.inference_mode()
def _decode(model, cache, mask: Tensor, places: Sequence[int], lengths: Sequence[int], rows: _Rows) -> Iterator[None]:
    """Continue row k from prefix `places[k]` of the cache, of `lengths[k]` tokens; yields after every token."""
    device = model.device
    ids, own = _left_padded([p.ids[n:] for p, n in zip(rows.prompts, lengths, strict=True)], device)
    index = torch.tensor(places, device=device)
    cache = copy.deepcopy(cache)  # the other batches of this prefill start from it too
    if cache is not None:
        cache.batch_select_indices(index)
    mask = torch.cat([mask[index], own], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    alive = list(range(len(places)))
    while alive:
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        ids = rows.choose(out.logits[:, -1].float(), alive)
        yield
        kept = [k for k, row in enumerate(alive) if not rows.done[row]]
        if len(kept) < len(alive):
            index = torch.tensor(kept, device=device, dtype=torch.long)
            alive = [alive[k] for k in kept]
            if not alive:
                return
            cache.batch_select_indices(index)
            ids, mask, positions = ids[index], mask[index], positions[index]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        positions = positions[:, -1:] + 1


class _Rows:
    """The replies of a batch while they are made: chosen tokens, and which rows are done."""

    def __init__(self, tokenizer, prompts: Sequence[Prompt], sampling: Sampling, model):
        self.tokenizer, self.prompts, self.sampling = tokenizer, prompts, sampling
        context = model.config.get_text_config().max_position_embeddings
        self.room = [min(sampling.max_new_tokens, context - len(p.ids)) for p in prompts]
        if min(self.room) < 1:
            longest = max(len(p.ids) for p in prompts)
            raise ValueError(f"a prompt has {longest} tokens, the model's context {context}: no room for a reply; shorten it")
        eos = model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.done = [False] * len(prompts)
        # A token stands for one byte or more, so this many tokens hold the longest stop string, wherever tokens end.
        self.tail = max((len(s.encode()) for p in prompts for s in p.stops), default=0) + 1
        self.chain = sampling.processors()
        self.seen, _ = _left_padded([p.ids for p in prompts], model.device)
        if sampling.temperature > 0:
            draws = [torch.Generator().manual_seed(stream_seed(p, sampling.seed)) for p in prompts]
            self.draws = torch.stack([torch.rand(max(self.room), generator=g, dtype=torch.float64) for g in draws])
        self.step = 0

    def choose(self, scores: Tensor, alive: Sequence[int]) -> Tensor:
        """The next token (B, 1) of the rows `alive` from their logits (B, V)."""
        if len(alive) < len(self.prompts) or self.chain:
            index = torch.tensor(alive, device=scores.device)
        for processor in self.chain:
            scores = processor(self.seen[index], scores)
        if self.sampling.temperature > 0:  # the place where the cumulative distribution passes the row's own number
            total = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
            aim = self.draws[list(alive), self.step].to(scores.device).unsqueeze(1) * total[:, -1:]
            chosen = torch.searchsorted(total, aim, right=True).clamp_max(scores.shape[1] - 1)
        else:
            chosen = scores.argmax(-1, keepdim=True)
        if any(isinstance(p, RepetitionPenaltyLogitsProcessor) for p in self.chain):
            more = self.seen[:, :1].clone()
            more[index] = chosen
            self.seen = torch.cat([self.seen, more], 1)
        self.step += 1
        values = chosen.squeeze(1).tolist()
        for row, token in zip(alive, values, strict=True):
            self.tokens[row].append(token)
        tails = self.tokenizer.batch_decode([self.tokens[row][-self.tail :] for row in alive], skip_special_tokens=True)
        for row, token, text in zip(alive, values, tails, strict=True):
            stopped = any(s in text for s in self.prompts[row].stops)
            self.done[row] = stopped or token in self.ends or len(self.tokens[row]) >= self.room[row]
        return chosen

    def replies(self) -> list[Reply]:
        return [_reply(self.tokenizer, t, p, self.ends) for t, p in zip(self.tokens, self.prompts, strict=True)]


def _reply(tokenizer, row: Sequence[int], prompt: Prompt, ends: set[int]) -> Reply:
    """A reply from its tokens: cut at the first stop string, wherever token borders lie."""
    text = tokenizer.decode(row, skip_special_tokens=True)
    cut, stopped_at = min(((at, s) for s in prompt.stops if (at := (text + "\n").find(s)) >= 0), default=(None, None))
    if stopped_at is not None:
        return Reply(text[:cut].strip(), len(row), "stop", stopped_at)
    return Reply(text.strip(), len(row), "eos" if row and row[-1] in ends else "limit")


def _decided(text: str, stops: Sequence[str]) -> int:
    """How much of a growing text is sure to be in the reply: up to a stop string, a beginning of one, or trailing blanks."""
    cut = min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))
    for s in stops:
        for n in range(min(len(s) - 1, len(text)), 0, -1):
            if text.endswith(s[:n]):
                cut = min(cut, len(text) - n)
                break
    return len(text[:cut].rstrip().rstrip("\ufffd"))
