"""Batched sampling: rows do not see each other, stop strings cut exactly, a stream says what a batch says."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from helpers import generation
from helpers.evaluation import held_out
from helpers.generation import (
    SAMPLERS,
    Prompt,
    Sampling,
    _chunks,
    _decided,
    _reply,
    _Rows,
    generate_replies,
    iterate_replies,
    print_progress,
    reply_stops,
    stream_reply,
    stream_seed,
)
from helpers.profiles import PROFILES
from helpers.tiny import HOME

SHORT = Sampling(max_new_tokens=40)
EOS = {2}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def stories():
    return held_out(PROFILES["tiny"], 4)


@pytest.fixture(scope="module")
def prompts(tokenizer, stories):
    """Four conversations, two of them under two lengths and one with two samples."""
    asked = ((0, None, 0), (0, "tiny", 0), (1, "long", 0), (1, "long", 1), (2, "micro", 0), (3, None, 0))
    return [Prompt.of(stories[i].before_reply(0), tokenizer, length, sample=k) for i, length, k in asked]


def test_a_rows_text_depends_on_nothing_but_its_prompt_sample_and_seed(model, tokenizer, prompts):
    alone = [generate_replies(model, tokenizer, [p], SHORT)[0] for p in prompts]
    assert generate_replies(model, tokenizer, prompts, SHORT, batch_size=6) == alone
    assert generate_replies(model, tokenizer, prompts, SHORT, batch_size=2) == alone
    order = [4, 2, 0, 5, 3, 1]
    assert generate_replies(model, tokenizer, [prompts[i] for i in order], SHORT, batch_size=4) == [alone[i] for i in order]
    assert len({r.text for r in alone}) == len(alone), "two samples of one prompt are two texts"


def test_seeds_change_the_text_and_repeat_it(model, tokenizer, prompts):
    first = generate_replies(model, tokenizer, prompts, SHORT)
    assert first == generate_replies(model, tokenizer, prompts, SHORT)
    assert first != generate_replies(model, tokenizer, prompts, dataclasses.replace(SHORT, seed=1))
    twice = generate_replies(model, tokenizer, [prompts[0]] * 2, SHORT)
    assert twice[0] == first[0] != twice[1], "the same prompt again is the next sample"


def test_greedy_rows_of_a_batch_are_the_librarys_greedy_one_by_one(model, tokenizer, prompts):
    """Left padding, shared prefixes and the rows that leave early change nothing."""
    together = generate_replies(model, tokenizer, prompts, dataclasses.replace(SHORT, temperature=0.0))
    for prompt, reply in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            row = model.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=2, pad_token_id=0)[0, ids.shape[1] :]
        wanted = row.tolist()
        wanted = wanted[: wanted.index(2) + 1] if 2 in wanted else wanted
        assert reply.text == _reply(tokenizer, wanted, prompt, EOS).text


@pytest.mark.parametrize("name", ["cool", "warm"])
def test_filters_are_the_librarys(model, tokenizer, prompts, name):
    """No token that `generate`'s own chain would refuse; the repetition penalty sees the row's own tokens, not the padding."""
    sampling = dataclasses.replace(SAMPLERS[name], max_new_tokens=12)
    replies = generate_replies(model, tokenizer, prompts, sampling, batch_size=6)
    for prompt, reply in zip(prompts[:3], replies, strict=False):
        ids = list(prompt.ids)
        for token in tokenizer(" " + reply.text, add_special_tokens=False).input_ids[:6]:
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[:, -1]
            for processor in sampling.processors():
                scores = processor(torch.tensor([ids]), scores)
            assert scores[0, token] > -torch.inf
            ids.append(token)


def test_every_filter_acts_by_name(model, tokenizer, prompts):
    """At a temperature at which raw samples are noise, each filter alone brings the greedy text back."""
    hot = Sampling(temperature=8.0, max_new_tokens=8)
    greedy = generate_replies(model, tokenizer, prompts[:2], dataclasses.replace(hot, temperature=0.0))
    assert generate_replies(model, tokenizer, prompts[:2], hot) != greedy
    for name, value in {"top_k": 1, "top_p": 1e-4, "min_p": 1.0}.items():
        assert generate_replies(model, tokenizer, prompts[:2], dataclasses.replace(hot, **{name: value})) == greedy, name
    free = generate_replies(model, tokenizer, prompts, SHORT)
    for name, value in {"typical_p": 0.2, "repetition_penalty": 1.8}.items():
        assert generate_replies(model, tokenizer, prompts, dataclasses.replace(SHORT, **{name: value})) != free, name


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"max_new_tokens": 0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match="out of range"):
        Sampling(**bad)


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
    reply = _reply(tokenizer, ids, prompt, EOS)
    assert (reply.text, reply.end, reply.stopped_at) == ('"Yes."', "stop", "\nAna:")
    whole = _reply(tokenizer, [*tokenizer(' "Yes."', add_special_tokens=False).input_ids, 2], prompt, EOS)
    assert (whole.text, whole.end, whole.stopped_at) == ('"Yes."', "eos", None)
    assert _reply(tokenizer, ids[:2], prompt, EOS).end == "limit"


@pytest.mark.parametrize(
    "after",
    [
        "\n\n### Input:\n{user}: No.",
        "\n\n### Input\n{user}",
        "\n{user}: No.",
        "\n{user}\nNo.",
        "\n{user} : No.",
        "\n{user}",
    ],
)
def test_headers_and_names_without_their_colon_end_a_reply_too(stories, tokenizer, after):
    stops, user = reply_stops(stories[0]), stories[0].names.user
    ids = tokenizer(' "Yes," she says.' + after.format(user=user), add_special_tokens=False).input_ids
    assert _reply(tokenizer, ids, Prompt((1,), stops), EOS).text == '"Yes," she says.'
    told = f'"Yes."\n{user} laughs.'
    narrated = tokenizer(" " + told, add_special_tokens=False).input_ids
    assert _reply(tokenizer, narrated, Prompt((1,), stops), EOS).text == told, "narration is no impersonation"


class Parrot(torch.nn.Module):
    """A model that says the given tokens whatever it is asked, through the interface that the sampler uses."""

    def __init__(self, model, said: list[int], prompt: int):
        super().__init__()
        self.config, self.generation_config, self.device, self.inner = model.config, model.generation_config, model.device, model
        self.said, self.prompt = said, prompt
        self.eval()

    def forward(self, input_ids, position_ids, **kwargs):
        out = self.inner(input_ids=input_ids, position_ids=position_ids, **kwargs)
        at = int(position_ids[0, -1]) + 1 - self.prompt
        token = self.said[at] if 0 <= at < len(self.said) else 2
        out.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor([token]), out.logits.shape[-1])
        return out


@pytest.mark.parametrize("split", [0, 1, 2, 3])
def test_a_row_ends_where_its_own_stop_string_is_complete_wherever_tokens_end(model, tokenizer, split):
    """The same text cut into other tokens: the row stops as soon as the string is complete and loses nothing before it."""
    text = ' "Yes," she says.\nNorbert: No, not at all, never.'
    rng = random.Random(split)
    pieces, rest = [], text
    while rest:
        n = rng.randint(1, 4) if split else len(rest)
        pieces.append(rest[:n])
        rest = rest[n:]
    ids = [i for p in pieces for i in tokenizer(p, add_special_tokens=False).input_ids]
    parrot = Parrot(model, ids, prompt=4)
    reply = generate_replies(parrot, tokenizer, [Prompt((1, 5, 6, 7), ("\nNorbert:",))], Sampling(temperature=0.0))[0]
    assert (reply.text, reply.end) == ('"Yes," she says.', "stop")
    assert "No," not in tokenizer.decode(ids[: reply.tokens]), "it did not run on"


def test_rows_end_at_their_own_stop_string(model, tokenizer, prompts):
    """A row whose stop string is a frequent word ends there, the others go on."""
    stopping = dataclasses.replace(prompts[0], stops=("the",))
    replies = generate_replies(model, tokenizer, [stopping, prompts[1]], Sampling(temperature=0.0, max_new_tokens=60))
    assert "the" not in replies[0].text
    assert replies[1].text


def test_the_context_limits_a_reply_and_is_never_passed(model, tokenizer):
    almost = Prompt((1, *[5] * (model.config.max_position_embeddings - 4)), ())
    reply = generate_replies(model, tokenizer, [almost], Sampling(temperature=0.0))[0]
    assert reply.tokens <= 3 and reply.end in ("limit", "eos")
    with pytest.raises(ValueError, match="no room for a reply"):
        generate_replies(model, tokenizer, [Prompt((1, *[5] * 2047), ())], SHORT)


def test_a_stream_says_what_the_batch_says(model, tokenizer, prompts):
    for prompt, whole in zip(prompts, generate_replies(model, tokenizer, prompts, SHORT), strict=True):
        if prompt.sample == 0:
            pieces = list(stream_reply(model, tokenizer, prompt, SHORT))
            assert "".join(pieces) == whole.text and len(pieces) > 1
            assert all(pieces)


def test_a_reply_that_begins_with_a_stop_string_is_empty_in_the_stream_too(model, tokenizer, prompts, monkeypatch):
    """Every stop string begins with a newline, and a reply's leading blanks are not shown: the one must not hide the other."""
    prompt = dataclasses.replace(prompts[0], stops=("\nOrla:", "\n### Input:"))
    written = iter(tokenizer("\nOrla: I see.", add_special_tokens=False).input_ids)
    monkeypatch.setattr(_Rows, "choose", scripted(written))
    assert list(stream_reply(model, tokenizer, prompt, SHORT)) == []


def scripted(tokens):
    def choose(self, scores, alive):
        token = next(tokens)
        self.tokens[0].append(token)
        text = self.tokenizer.decode(self.tokens[0], skip_special_tokens=True)
        self.done[0] = any(s in text for s in self.prompts[0].stops)
        return torch.tensor([[token]])

    return choose


def test_a_prompt_of_one_token_leaves_the_others_their_past(model, tokenizer, prompts):
    short = Prompt((5,), ())
    greedy = dataclasses.replace(SHORT, temperature=0.0)
    together = generate_replies(model, tokenizer, [short, *prompts[:2]], greedy)
    assert together == [generate_replies(model, tokenizer, [p], greedy)[0] for p in (short, *prompts[:2])]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='ab\n:A"é ', max_size=30), st.lists(st.text(alphabet="ab\n:A", min_size=1, max_size=6), max_size=3))
def test_a_stream_never_takes_back_what_it_showed(text, stops):
    shown = 0
    for n in range(len(text) + 1):
        safe = _decided(text[:n], stops)
        assert safe <= n
        shown = max(shown, safe)
    cut = min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))
    assert text[:shown] == text[:cut][:shown], "nothing behind a stop string was shown"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=60).map(tuple), min_size=1, max_size=12))
def test_groups_hold_every_prompt_once_and_share_a_true_prefix(rows):
    prompts = [Prompt(ids, ()) for ids in rows]
    members = []
    for chunk in _chunks(prompts):
        for prefix, group in chunk:
            members += group
            assert bool(prefix) == bool(chunk[0][0]), "a prompt without a past shares no cache"
            assert all(prompts[i].ids[: len(prefix)] == prefix and len(prompts[i].ids) > len(prefix) for i in group)
    assert sorted(members) == list(range(len(rows)))


def test_replies_arrive_as_batches_finish_with_the_time_left(model, tokenizer, prompts, capsys):
    seen = []
    stream = iterate_replies(model, tokenizer, prompts, SHORT, 2, lambda *a: (seen.append(a), print_progress(*a)))
    first = next(stream)
    stream.close()  # an interruption keeps what was there
    assert first[1].text and not seen
    assert not model.training
    generate_replies(model, tokenizer, prompts, SHORT, 2, progress=lambda *a: (seen.append(a), print_progress(*a)))
    assert [d for d, *_ in seen] == [2, 4, 6] and seen[-1][2] == 0.0 and seen[0][2] > 0
    assert "6/6 replies" in capsys.readouterr().out


def test_the_model_is_left_as_it_was(model, tokenizer, prompts):
    model.train()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        inside = []
        generate_replies(model, tokenizer, prompts[:1], SHORT, progress=lambda *a: inside.append(torch.get_num_threads()))
        assert model.training and torch.get_num_threads() == 2 and inside == [1], "small products are not shared out"
    finally:
        torch.set_num_threads(threads)
        model.eval()


def some_prompts(tokenizer):
    return [
        Prompt.of(s.before_reply(0), tokenizer, length)
        for s, length in zip(held_out(PROFILES["tiny"], 3), (None, "tiny", "long"), strict=True)
    ]


def test_a_repetition_penalty_is_the_librarys_over_prompt_and_reply(model, tokenizer):
    prompts = some_prompts(tokenizer)
    replies = generate_replies(model, tokenizer, prompts, Sampling(temperature=0.0, repetition_penalty=1.8, max_new_tokens=30))
    for p, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([p.ids])
        row = model.generate(ids, do_sample=False, repetition_penalty=1.8, max_new_tokens=30, eos_token_id=2, pad_token_id=0)
        assert reply.text == generation._reply(tokenizer, row[0, ids.shape[1] :].tolist(), p, {2}).text


def test_every_end_token_of_the_model_ends_a_reply(model, tokenizer, monkeypatch):
    (p, *_) = some_prompts(tokenizer)
    greedy = Sampling(temperature=0.0, max_new_tokens=12)
    free = tokenizer(" " + generate_replies(model, tokenizer, [p], greedy)[0].text, add_special_tokens=False).input_ids
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, free[3]])
    reply = generate_replies(model, tokenizer, [p], greedy)[0]
    assert reply.end == "eos" and reply.tokens == 1 + free.index(free[3])


def test_half_a_letter_is_not_shown():
    assert _decided("caf\ufffd", ()) == 3


def test_the_time_left_goes_by_the_work_that_is_left(model, tokenizer, monkeypatch):
    (p, *_) = some_prompts(tokenizer)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(generation.time, "monotonic", lambda: next(clock))
    left = []
    generate_replies(model, tokenizer, [p] * 6, Sampling(max_new_tokens=2), 2, lambda done, total, seconds: left.append(seconds))
    assert left == [20.0, 10.0, 0.0]


def test_padding_repeats_a_rows_own_token():
    ids, mask = generation._left_padded([(5,), (6, 7, 8)], "cpu")
    assert ids.tolist() == [[5, 5, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_every_prompt_sample_and_seed_has_a_stream_of_its_own():
    cases = [(Prompt(ids, (), sample=k), seed) for ids in ((1,), (1, 2)) for k in (0, 1) for seed in (0, 1)]
    assert len({stream_seed(p, s) for p, s in cases}) == len(cases)
    assert stream_seed(Prompt((1,), ("x",), "long"), 0) == stream_seed(Prompt((1,), ()), 0), "of nothing else"
