"""Batched sampling: rows do not see each other, stop strings cut exactly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.evaluation import held_out
from helpers.generation import Prompt, Sampling, _reply, generate_replies
from helpers.profiles import PROFILES
from helpers.tiny import HOME


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    stories = held_out(PROFILES["tiny"], 4)
    return [
        Prompt.of(s.before_reply(0), tokenizer, length) for s, length in zip(stories, (None, "tiny", "long", None), strict=True)
    ]


SHORT = Sampling(max_new_tokens=40)


def test_a_rows_text_does_not_depend_on_its_batch(model, tokenizer, prompts):
    one_by_one = generate_replies(model, tokenizer, prompts, SHORT, batch_size=1)
    together = generate_replies(model, tokenizer, prompts, SHORT, batch_size=4)
    assert [r.text for r in one_by_one] == [r.text for r in together]
    assert len({r.text for r in together}) > 1


def test_seeds_change_the_text_and_repeat_it(model, tokenizer, prompts):
    first = generate_replies(model, tokenizer, prompts, SHORT)
    assert first == generate_replies(model, tokenizer, prompts, SHORT)
    assert first != generate_replies(model, tokenizer, prompts, dataclasses.replace(SHORT, seed=1))


def test_greedy_is_the_librarys_greedy(model, tokenizer, prompts):
    ids = torch.tensor([prompts[0].ids])
    with torch.no_grad():
        wanted = model.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=2, pad_token_id=0)[0, ids.shape[1] :]
    reply = generate_replies(model, tokenizer, prompts[:1], dataclasses.replace(SHORT, temperature=0.0))[0]
    assert reply.text == _reply(tokenizer, wanted.tolist(), prompts[0], SHORT).text


def test_samples_follow_the_models_distribution(model, tokenizer, prompts):
    """First tokens of 400 rows against the softmax at the same temperature (total variation distance)."""
    sampling = Sampling(temperature=0.8, max_new_tokens=1)
    replies = generate_replies(model, tokenizer, [prompts[0]] * 400, sampling, batch_size=400)
    with torch.no_grad():
        p = (model(torch.tensor([prompts[0].ids])).logits[0, -1].double() / 0.8).softmax(-1)
    texts = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
    expected: dict[str, float] = {}
    for text, q in zip(texts, p.tolist(), strict=False):
        expected[text] = expected.get(text, 0.0) + q
    seen = {t: sum(r.text == t for r in replies) / 400 for t in {r.text for r in replies}}
    distance = 0.5 * sum(abs(expected.get(t, 0) - seen.get(t, 0)) for t in set(expected) | set(seen))
    assert distance < 0.15


def test_stop_strings_cut_the_text_and_are_reported(tokenizer):
    prompt = Prompt((1,), ("\n### Input:", "\nAna:"))
    ids = tokenizer(' "Yes."\nAna: "No."', add_special_tokens=False).input_ids
    reply = _reply(tokenizer, ids, prompt, SHORT)
    assert (reply.text, reply.end) == ('"Yes."', "stop")
    whole = _reply(tokenizer, [*tokenizer(' "Yes."', add_special_tokens=False).input_ids, 2, 0, 0], prompt, SHORT)
    assert (whole.text, whole.end) == ('"Yes."', "eos")
    assert _reply(tokenizer, ids[:2], prompt, SHORT).end == "limit"


def test_rows_end_at_their_own_stop_string(model, tokenizer, prompts):
    """A row whose stop string is a frequent word ends there, the others go on."""
    stopping = dataclasses.replace(prompts[0], stops=("the",))
    replies = generate_replies(model, tokenizer, [stopping, prompts[1]], Sampling(temperature=0.0, max_new_tokens=60))
    assert "the" not in replies[0].text
    assert replies[1].text


def test_the_model_is_left_as_it_was(model, tokenizer, prompts):
    model.train()
    generate_replies(model, tokenizer, prompts[:1], SHORT)
    assert model.training
    model.eval()
