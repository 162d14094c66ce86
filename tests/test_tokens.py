"""Ids, labels and packed batches: what is trained, and that packed stories do not see each other."""

import copy
import dataclasses
import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoModelForCausalLM

from helpers import tokens
from helpers.data import build_corpus
from helpers.profiles import ROOT
from helpers.prompts import CHAT_TEMPLATE, chat_messages, format_story, generation_prompt, segments
from helpers.stories import Message, Pair, Story, StoryError, StoryErrors, load_story
from helpers.tiny_stories import make_story
from helpers.tokens import (
    IGNORED,
    Collator,
    Encoded,
    encode,
    encode_all,
    encode_prompt,
    encode_segments,
    pack,
    packed_row,
    start_ids,
)
from tests.make_tokenizers import KINDS, make_tokenizer

BASE = ROOT / "data_samples" / "tiny_base"
SAMPLE = load_story(ROOT / "data_samples" / "stories" / "salt_road.yaml")
STORY = Story(
    names=Pair("Ferro", "Ana"),
    personas=Pair("Ferro repairs clocks.", "Ana owns one."),
    scenario="A shop — on a rainy day.",
    messages=(
        Message("user", '"Can it be saved?" Ana asks.'),
        Message("character", "Ferro opens the case. 修理 🦉\n\n### Input: he hums."),
        Message("user", "Ana waits."),
        Message("character", '"Yes."'),
    ),
)
LENGTHS = ["short", None]


@pytest.fixture(scope="module")
def tiny():
    return make_tokenizer("tiny")


@pytest.fixture(scope="module", params=KINDS[:-1])
def tokenizer(request):
    return make_tokenizer(request.param)


def runs(sample: Encoded) -> list[list[int]]:
    """Maximal runs of trained labels."""
    return [list(group) for trained, group in itertools.groupby(sample.labels, lambda x: x != IGNORED) if trained]


def test_trained_tokens_decode_to_the_replies(tokenizer):
    for story, lengths in ((STORY, LENGTHS), (make_story(7), None)):
        sample = encode(story, tokenizer, lengths)
        assert len(sample.input_ids) == len(sample.labels)
        assert all(label in (IGNORED, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
        replies = [m.text.replace("### Input:", "\\### Input:") for m in story.replies]
        assert [tokenizer.decode(run[:-1]).strip() for run in runs(sample)] == replies
        assert all(run[-1] == tokenizer.eos_token_id for run in runs(sample))
        assert sample.input_ids.count(tokenizer.eos_token_id) == len(replies)
        assert sample.trained == sum(map(len, runs(sample)))


def test_every_id_decodes_to_the_whole_text(tiny):
    ids = encode(STORY, tiny, LENGTHS).input_ids
    pieces = tiny.decode(ids).removeprefix("<s>").split("</s>")
    assert "".join(pieces) == format_story(STORY, LENGTHS)


def test_the_space_after_the_colon_belongs_to_the_reply(tiny):
    sample = encode(STORY, tiny)
    assert [tiny.decode(run)[:2] for run in runs(sample)] == [" F", ' "']
    for i, label in enumerate(sample.labels):
        if label != IGNORED and sample.labels[i - 1] == IGNORED:
            assert tiny.decode(sample.input_ids[:i]).endswith("\nFerro:")


def test_begins_as_the_tokenizer_begins(tokenizer):
    assert start_ids(tokenizer) == [1]
    sample = encode(STORY, tokenizer)
    assert sample.input_ids[0] == 1 and sample.labels[0] == IGNORED and 1 not in sample.input_ids[1:]


def test_no_begin_token_where_the_tokenizer_has_none():
    tokenizer = make_tokenizer("no-bos")
    assert start_ids(tokenizer) == [] and 1 not in encode(STORY, tokenizer).input_ids


def test_one_end_token_a_sample(tokenizer):
    sample = encode(STORY, tokenizer, eos="sample")
    end = tokenizer.eos_token_id
    assert sample.input_ids.count(end) == 1 and sample.input_ids[-1] == sample.labels[-1] == end
    replies = [m.text.replace("### Input:", "\\### Input:") for m in STORY.replies]
    after = [i for i in range(1, len(sample)) if sample.labels[i] == IGNORED != sample.labels[i - 1]]
    for run, reply, place in zip(runs(sample), replies, [*after, None], strict=True):
        said = tokenizer.decode([t for t in run if t != end]).strip()
        assert reply.startswith(said)
        if said != reply:  # where a token reaches from the reply's last word into the next header, it is not trained
            assert "\n" in tokenizer.decode([sample.input_ids[place]]) and len(reply) - len(said) <= 2


def test_loss_on_everything(tokenizer):
    for eos in ("turn", "sample"):
        masked, everything = encode(STORY, tokenizer, LENGTHS, eos=eos), encode(STORY, tokenizer, LENGTHS, loss="all", eos=eos)
        assert everything.input_ids == masked.input_ids
        assert everything.trained > 3 * masked.trained
    text_tokens = tokenizer(format_story(STORY, LENGTHS), add_special_tokens=False, return_offsets_mapping=True)
    spans = sum(end > start for start, end in text_tokens.offset_mapping)
    assert everything.trained == spans + 1


def test_unknown_modes_are_refused(tiny):
    for mode in ({"loss": "user"}, {"eos": "never"}):
        with pytest.raises(ValueError, match="use loss 'replies' or 'all' and eos 'turn' or 'sample'"):
            encode(STORY, tiny, **mode)


@pytest.mark.parametrize("eos", ["turn", "sample"])
def test_generation_ids_begin_the_training_ids_of_every_reply(tokenizer, eos):
    for story in (STORY, SAMPLE, make_story(3)):
        classes = ("micro", None, "huge", "medium")
        lengths = [classes[i % 4] for i in range(len(story.replies))]
        trained = encode(story, tokenizer, lengths, eos=eos)
        for i in range(len(story.replies)):
            ids = encode_prompt(story.before_reply(i), tokenizer, lengths[i], lengths[:i], eos=eos)
            assert ids == trained.input_ids[: len(ids)]
            assert trained.labels[len(ids)] != IGNORED and trained.labels[len(ids) - 1] == IGNORED


def test_generation_ids_decode_to_the_prompt(tiny):
    ids = encode_prompt(STORY.before_reply(1), tiny, "long", [None])
    assert tiny.decode(ids).replace("</s>", "") == "<s>" + generation_prompt(STORY.before_reply(1), "long", [None])


def test_chat_template_gives_the_same_ids_and_mask(tiny):
    rendered = tiny.apply_chat_template(
        chat_messages(STORY, LENGTHS),
        chat_template=CHAT_TEMPLATE,
        char="Ferro",
        user="Ana",
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    sample = encode(STORY, tiny, LENGTHS)
    assert rendered["input_ids"] == sample.input_ids
    assert [bool(m) for m in rendered["assistant_masks"]] == [label != IGNORED for label in sample.labels]


# ---------------------------------------------------------------------------------------------------------- context


def test_a_short_context_drops_whole_turns_from_the_front(tiny):
    lengths = ["medium"] * len(SAMPLE.replies)
    full = encode(SAMPLE, tiny, lengths)
    assert full.dropped_turns == 0
    for context in (len(full), len(full) - 1, len(full) // 2, len(full) // 4):
        cut = encode(SAMPLE, tiny, lengths, context)
        assert len(cut) <= context
        shorter = Story(SAMPLE.names, SAMPLE.personas, SAMPLE.scenario, SAMPLE.messages[cut.dropped_turns :])
        assert cut.input_ids == encode(shorter, tiny, lengths[: len(shorter.replies)]).input_ids
        if cut.dropped_turns:  # one turn more would not have fitted
            longer = Story(SAMPLE.names, SAMPLE.personas, SAMPLE.scenario, SAMPLE.messages[cut.dropped_turns - 1 :])
            assert len(encode(longer, tiny, lengths[: len(longer.replies)])) > context
    assert encode(SAMPLE, tiny, lengths, len(full) - 1).dropped_turns == 1


def test_a_context_too_short_for_the_last_reply_is_refused(tiny):
    last = Story(STORY.names, STORY.personas, STORY.scenario, STORY.messages[-1:], "here.yaml")
    smallest = len(encode(last, tiny))
    assert encode(STORY, tiny, context=smallest).dropped_turns == 3
    with pytest.raises(ValueError, match=f"not even the last reply fits in {smallest - 1} tokens"):
        encode(STORY, tiny, context=smallest - 1)
    ends_with_user = Story(
        STORY.names, STORY.personas, STORY.scenario, (*STORY.messages, Message("user", "Thanks.")), "here.yaml"
    )
    with pytest.raises(ValueError, match=r"^here\.yaml: not even the last reply fits"):
        encode(ends_with_user, tiny, context=smallest)


def test_a_split_story_keeps_every_reply(tiny):
    lengths = [None, *["long"] * (len(SAMPLE.replies) - 1)]
    whole = encode(SAMPLE, tiny, lengths)
    assert [s.input_ids for s in encode_all([(SAMPLE, lengths)], tiny, len(whole), long="split")] == [whole.input_ids]
    head = tiny.decode(encode_segments(segments(SAMPLE)[:1], tiny).input_ids)
    for context in (len(whole) - 1, len(whole) // 2, 1500):
        parts = list(encode_all([(SAMPLE, lengths)], tiny, context, long="split"))
        assert len(parts) > 1 and all(len(p) <= context for p in parts)
        assert [run for p in parts for run in runs(p)] == runs(whole)
        assert all(tiny.decode(p.input_ids).startswith(head) for p in parts) and all(p.dropped_turns == 0 for p in parts)
        # greedy: the first two turns of the next part would not have fitted
        for part, after in itertools.pairwise(parts):
            first_exchange = after.input_ids[: after.input_ids.index(tiny.eos_token_id) + 1]
            assert len(part) + len(first_exchange) - len(encode_segments(segments(SAMPLE)[:1], tiny)) > context - 2
    with pytest.raises(ValueError, match=r"turn 1 and its reply do not fit in 40 tokens"):
        list(encode_all([(SAMPLE, None)], tiny, 40, long="split"))
    with pytest.raises(ValueError, match="use 'drop' or 'split'"):
        list(encode_all([(SAMPLE, None)], tiny, 40, long="cut"))


def test_many_at_once_are_as_one_by_one(tokenizer):
    stories = [make_story(k) for k in range(5)] + [STORY]
    batch = list(encode_all([(s, None) for s in stories], tokenizer, 900, batch_size=4))
    assert batch == [encode(s, tokenizer, context=900) for s in stories]


@pytest.mark.parametrize("eos", ["turn", "sample"])
@pytest.mark.parametrize("loss", ["replies", "all"])
def test_ids_are_those_of_the_whole_text_and_labels_those_of_its_characters(tokenizer, loss, eos):
    """An independent way to the same sample: the text with its special tokens written out, tokenised as one string."""
    end, text, mask = tokenizer.eos_token, tokenizer.bos_token, "0" * len(tokenizer.bos_token)
    for piece in segments(STORY, LENGTHS):
        text += piece.text
        mask += ("1" if piece.trained or loss == "all" else "0") * len(piece.text)
        if eos == "turn" and piece.kind == "reply":
            text, mask = text + end, mask + "1" * len(end)
    if eos == "sample":
        text, mask = text + end, mask + "1" * len(end)
    enc = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    sample = encode(STORY, tokenizer, LENGTHS, loss=loss, eos=eos)
    assert sample.input_ids == enc.input_ids
    trained = [stop > start and mask[stop - 1] == "1" for start, stop in enc.offset_mapping]
    assert [label != IGNORED for label in sample.labels] == trained


def test_special_tokens_in_a_text_are_spelt_out(tokenizer):
    said = tuple(Message(m.speaker, f"a{tokenizer.eos_token}b {m.text}{tokenizer.bos_token}") for m in STORY.messages)
    story = Story(STORY.names, STORY.personas, STORY.scenario, said)
    if tokenizer.backend_tokenizer.get_vocab_size() == 900 and "Unigram" in str(tokenizer.backend_tokenizer.model):
        with pytest.raises(
            ValueError, match=r"^this story: a text contains '</?s>', which this tokenizer cannot spell out; remove it"
        ):
            encode(story, tokenizer)
        return
    sample = encode(story, tokenizer)
    assert sample.input_ids.count(tokenizer.eos_token_id) == len(story.replies)
    assert sample.input_ids.count(tokenizer.bos_token_id) == 1
    prompt = encode_prompt(story.before_reply(1), tokenizer)
    assert sample.input_ids[: len(prompt)] == prompt


# ---------------------------------------------------------------------------------------------------------- packing

quick = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(quick, max_examples=200)
@given(st.integers(1, 60), st.data())
def test_packing(context, data):
    sizes = data.draw(st.lists(st.integers(1, context), max_size=40))
    samples = [Encoded([1] * n, [IGNORED] * n) for n in sizes]
    bins = pack(samples, context)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in b) for b in bins]
    assert all(n <= context for n in filled)
    if len(filled) > 1:  # no two bins could have been one
        assert sum(sorted(filled)[:2]) > context
    assert [b[0] for b in bins] == sorted(b[0] for b in bins) and all(b == sorted(b) for b in bins)


@quick
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 50))
def test_packing_equal_samples_needs_the_fewest_bins(size, context, count):
    samples = [Encoded([1] * size, [IGNORED] * size)] * count
    if size > context and count:
        with pytest.raises(ValueError, match=f"sample 0 has {size} tokens, more than the context of {context}"):
            pack(samples, context)
    else:
        assert len(pack(samples, context)) == -(-count // max(1, context // size))


def test_packing_puts_the_largest_first():
    samples = [Encoded([1] * n, [IGNORED] * n) for n in (2, 5, 4, 7, 1, 3, 8)]  # 30 places: three bins of 10 are enough
    assert pack(samples, 10) == [[0, 6], [1, 2, 4], [3, 5]]


def test_packing_fills_rows_of_real_stories(tiny):
    samples = [encode(make_story(k), tiny) for k in range(120)]
    context = 4 * max(map(len, samples))
    assert sum(map(len, samples)) / (len(pack(samples, context)) * context) > 0.9
    with pytest.raises(ValueError, match="more than the context of 50"):
        pack(samples, 50)


def test_packed_row_restarts_positions_and_masks_first_labels():
    row = packed_row([Encoded([5, 6, 7], [5, 6, 7]), Encoded([8, 9], [IGNORED, 9])])
    assert {key: value.tolist() for key, value in row.items()} == {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [IGNORED, 6, 7, IGNORED, 9],
        "position_ids": [0, 1, 2, 0, 1],
    }


def test_collator_pads_to_a_multiple_and_says_what_is_real():
    rows = [packed_row([Encoded([5, 6, 7], [5, 6, 7]), Encoded([8, 9], [8, 9])]), packed_row([Encoded([4], [4])])]
    batch = Collator(pad_token_id=3, multiple=4)(rows)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 3, 3, 3], [4, 3, 3, 3, 3, 3, 3, 3]],
        "labels": [[-100, 6, 7, -100, 9, -100, -100, -100], [-100] * 8],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]],
        "valid": [[True] * 5 + [False] * 3, [True] + [False] * 7],
    }
    assert {k: v.dtype for k, v in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "valid": torch.bool,
    }


def token_losses(model, **batch) -> torch.Tensor:
    """Loss of each trained token, in order."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses[labels[:, 1:].flatten() != IGNORED]


def test_packed_stories_do_not_see_each_other(tiny):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    samples = [encode(make_story(k, max_words=60), tiny) for k in (1, 2, 3)]
    alone = [token_losses(model, input_ids=torch.tensor([s.input_ids]), labels=torch.tensor([s.labels])) for s in samples]
    assert [len(a) for a in alone] == [s.trained for s in samples]
    rows = [packed_row(samples[:2]), packed_row(samples[2:])]  # the second one is padded
    batch = Collator(tiny.pad_token_id)(rows)
    batch.pop("valid")
    packed = token_losses(model, **batch)
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=0)
    assert packed.mean().item() == pytest.approx(torch.cat(alone).mean().item(), abs=1e-5)
    # the check can fail: without restarted positions the second story does see the first
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    assert (token_losses(model, **batch) - torch.cat(alone)).abs().max() > 1e-2


def test_tokens_added_as_special_are_spelt_out_too():
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    command = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert command in tokenizer("<|im_start|>").input_ids, "obeyed, unless it is spelt out"
    said = (*STORY.messages[:3], Message("character", "He types <|im_start|>system and laughs."))
    sample = encode(Story(STORY.names, STORY.personas, STORY.scenario, said), tokenizer)
    assert command not in sample.input_ids and "<|im_start|>system" in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize("long", ["drop", "split"])
def test_all_stories_that_do_not_fit_are_named_in_one_error_or_left_out(tiny, long):
    def story(name, reply):
        return Story(STORY.names, STORY.personas, STORY.scenario, (*STORY.messages[:1], Message("character", reply)), name)

    stories = [story("a", ("Yes. " * 400).strip()), story("b", "Yes."), story("c", ("No. " * 400).strip()), story("d", "No.")]
    labelled = [(s, None) for s in stories]
    with pytest.raises(StoryErrors, match=r"^2 of 4 stories do not fit the context of 300 tokens:\n  a: .*\n  c: "):
        build_corpus(labelled, tiny, 300, long=long)
    problems = []
    corpus = build_corpus(labelled, tiny, 300, long=long, too_long=problems)
    assert corpus.stories == 2 and [p.file for p in problems] == ["a", "c"]
    assert sorted(name for names in corpus.names for name in names) == ["b", "d"]
    assert corpus == build_corpus([labelled[1], labelled[3]], tiny, 300, long=long)
    with pytest.raises(ValueError, match=r"no story is left: all 2 are longer than the context of 300 tokens"):
        build_corpus([labelled[0], labelled[2]], tiny, 300, long=long, too_long=[])


def test_all_ids_that_a_tokenizer_puts_in_front_are_kept():
    """GLM's puts two, neither of which is a bos_token."""
    tokenizer = copy.deepcopy(make_tokenizer("no-bos"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    first = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("[gMASK]", "<sop>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=first)
    tokenizer.bos_token = None
    start = [number for _, number in first]
    assert start_ids(tokenizer) == start
    sample = encode(STORY, tokenizer, LENGTHS, eos="sample")
    assert sample.input_ids[:2] == start and sample.labels[:2] == [IGNORED] * 2
    whole = tokenizer(format_story(STORY, LENGTHS)).input_ids
    assert sample.input_ids == [*whole, tokenizer.eos_token_id]
    prompt = encode_prompt(STORY.before_reply(0), tokenizer, "short")
    assert prompt == sample.input_ids[: len(prompt)]


def test_compact_samples_are_the_same(tokenizer):
    sample = Encoded([1, 2, 3], [IGNORED, 2, 3], dropped_turns=4)
    small = sample.compact()
    assert small.dropped_turns == 4 and small.trained == 2 and small.input_ids.tolist() == [1, 2, 3]


def test_a_lot_is_packed_into_the_fewest_rows_where_decreasing_order_fails():
    rng, context = random.Random(0), 20
    while True:  # full rows, cut into pieces, of which decreasing order needs one row too many
        rows, sizes = rng.randint(2, 4), []
        for _ in range(rows):
            cuts = sorted(rng.sample(range(1, context), rng.randint(2, 4)))
            sizes += [b - a for a, b in itertools.pairwise([0, *cuts, context])]
        if len(tokens._best_fit(sizes, sorted(range(len(sizes)), key=lambda i: -sizes[i]), context)) > rows:
            break
    assert len(pack([Encoded([1] * n, [IGNORED] * n) for n in sizes], context)) == rows


def test_the_story_with_a_special_token_is_named():
    good = dataclasses.replace(STORY, source="good.yaml")
    refused = 0
    for kind in KINDS:
        tokenizer = make_tokenizer(kind)
        typed = (Message("user", f"a{tokenizer.eos_token}b"), *STORY.messages[1:])
        bad = dataclasses.replace(STORY, messages=typed, source="bad.yaml")
        try:
            list(encode_all([(good, None), (bad, None)], tokenizer))
        except StoryError as error:
            assert str(error).startswith("bad.yaml")
            refused += 1
    assert refused, "no tokenizer here refuses"


def test_shuffled_orders_are_always_the_same():
    rng, context = random.Random(0), 100
    while True:  # full rows, cut into pieces, of which decreasing order needs one row too many
        sizes = []
        for _ in range(6):
            cuts = sorted(rng.sample(range(1, context), 5))
            sizes += [b - a for a, b in zip([0, *cuts], [*cuts, context], strict=True)]
        if len(tokens._best_fit(sizes, sorted(range(len(sizes)), key=lambda i: -sizes[i]), context)) > 6:
            break
    samples = [Encoded([1] * n, [IGNORED] * n) for n in sizes]
    first = pack(samples, context)
    print(sizes, len(first))
    assert all(pack(samples, context) == first for _ in range(3))
