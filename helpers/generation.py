"""Batched sampling of replies, with stop strings and one random stream per row.

transformers' `generate` does the decoding. Two public extension points add what it lacks: a logits processor that samples
by adding Gumbel noise from each row's own generator (so a row's text does not depend on its batch mates), and a stopping
criterion that ends rows one by one at text, not tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from helpers.lengths import LENGTHS
from helpers.prompts import Lengths, stop_strings
from helpers.stories import Story
from helpers.tokens import encode_prompt


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


@dataclass(frozen=True)
class Prompt:
    """What a reply is asked for: token ids that end with `{char}:`, and the strings that end the reply."""

    ids: tuple[int, ...]
    stops: tuple[str, ...]
    length: str | None = None

    @classmethod
    def of(cls, story: Story, tokenizer, length: str | None = None, history: Lengths = None) -> Prompt:
        return cls(tuple(encode_prompt(story, tokenizer, length, history)), tuple(stop_strings(story)), length)


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int  # generated, the end token included
    end: Literal["eos", "stop", "limit"]  # limit: cut off by max_new_tokens, so longer than measured


class _RowSampler(LogitsProcessor):
    """Adds Gumbel noise: the argmax of logits + noise is a sample of the softmax (Gumbel-max trick)."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
        return scores - noise.log_().to(scores.device)


class _RowStops(StoppingCriteria):
    """Ends each row at its own stop strings, looking at the last few tokens only."""

    TAIL = 24  # tokens; the longest stop string ("\n### Instruction:" or a name) is shorter

    def __init__(self, tokenizer, prompts: Sequence[Prompt], width: int):
        self.tokenizer, self.prompts, self.width = tokenizer, prompts, width
        self.done = [False] * len(prompts)

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        start = max(self.width, input_ids.shape[1] - self.TAIL)
        tails = self.tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
        self.done = [d or any(s in t for s in p.stops) for d, t, p in zip(self.done, tails, self.prompts, strict=True)]
        return torch.tensor(self.done, device=input_ids.device)


@torch.inference_mode()
def _generate_batch(model: PreTrainedModel, tokenizer, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]):
    width = max(len(p.ids) for p in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p.ids)) + list(p.ids) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=model.device)
    chain = sampling.processors()
    if sampling.temperature > 0:
        chain.append(_RowSampler(seeds))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,  # the sampling is in the processors
        max_new_tokens=sampling.max_new_tokens,
        logits_processor=LogitsProcessorList(chain),
        stopping_criteria=StoppingCriteriaList([_RowStops(tokenizer, prompts, width)]),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    return [_reply(tokenizer, row, p, sampling) for row, p in zip(out[:, width:].tolist(), prompts, strict=True)]


def _reply(tokenizer, row: list[int], prompt: Prompt, sampling: Sampling) -> Reply:
    end: Literal["eos", "stop", "limit"] = "limit"
    if tokenizer.eos_token_id in row:
        row, end = row[: row.index(tokenizer.eos_token_id) + 1], "eos"
    text = tokenizer.decode(row, skip_special_tokens=True)
    cuts = [at for s in prompt.stops if (at := text.find(s)) >= 0]
    if cuts:
        text, end = text[: min(cuts)], "stop"
    return Reply(text.strip(), len(row), end)


def generate_replies(
    model: PreTrainedModel,
    tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """One reply a prompt, in the prompts' order. Row i draws from the stream of seed `sampling.seed * 2^20 + i`.

    Batches are made of prompts that ask for similar lengths, so that few rows wait for a long one. `progress` is called
    with (replies done, replies in all).
    """
    sampling = sampling or Sampling()
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: (_expected(prompts[i].length), len(prompts[i].ids)))
    replies: dict[int, Reply] = {}
    try:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            seeds = [sampling.seed * 2**20 + i for i in members]
            batch = _generate_batch(model, tokenizer, [prompts[i] for i in members], sampling, seeds)
            replies.update(zip(members, batch, strict=True))
            if progress:
                progress(len(replies), len(prompts))
    finally:
        model.train(was_training)
    return [replies[i] for i in range(len(prompts))]


def _expected(length: str | None) -> int:
    return LENGTHS.index(length) if length in LENGTHS else len(LENGTHS) // 2
