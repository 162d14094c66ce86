"""The loss on stories that no training saw: which stories, and whose loss it is."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.evaluation import held_out
from helpers.held_out import HeldOutLoss, held_out_stories
from helpers.lengths import length_class
from helpers.profiles import PROFILES
from helpers.stories import Message, Story
from helpers.tokens import encode
from tests import small_runs
from tests.moe_families import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_runs.make_base(tmp_path_factory.mktemp("base"))


def test_a_shortened_storys_replies_keep_their_classes(base, tokenizer):
    first = held_out_stories(PROFILES["tiny"], 1)[0][0]
    say = lambda who, n: Message(who, ("word " * n).strip() + ".")  # noqa: E731
    story = Story(
        first.names, first.personas, first.scenario, (say("user", 9), say("character", 120), say("user", 9), say("character", 3))
    )
    labels = [length_class(m.text) for m in story.replies]
    last = Story(first.names, first.personas, first.scenario, story.messages[2:])
    context = len(encode(last, tokenizer, labels[1:]))
    assert encode(story, tokenizer, labels, context).dropped_turns == 2
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert list(HeldOutLoss([(story, labels)], tokenizer, context, pad=0)(model)) == ["all", labels[1]]


@pytest.mark.parametrize("name", ["tiny", "a100-80"])
def test_every_held_out_reply_has_the_modifier_of_its_class(name):
    for story, lengths in held_out_stories(PROFILES[name]):
        assert lengths == [length_class(m.text) for m in story.replies]


def test_held_out_stories_are_not_those_of_the_experiment():
    measured = {s.source for s in held_out(PROFILES["tiny"], 40)} | {s.source for s in held_out(PROFILES["tiny"], 40, reply=3)}
    assert not measured & {s.source for s, _ in held_out_stories(PROFILES["tiny"])}


def test_a_head_that_is_more_than_a_product_gives_its_own_loss(tokenizer):
    """Granite divides its logits: against the loss that transformers computes from labels."""
    config = tiny("granitemoe")
    config.vocab_size, config.logits_scaling, config.max_position_embeddings = len(tokenizer), 8.0, 2048
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    ((story, lengths),) = held_out_stories(PROFILES["tiny"], 1)
    sample = encode(story, tokenizer, lengths)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss.item()
    assert HeldOutLoss([(story, lengths)], tokenizer, 2048, pad=0)(model)["all"] == pytest.approx(wanted, rel=1e-4)


def test_without_a_story_that_fits_there_is_no_loss(base, tokenizer):
    (labelled,) = held_out_stories(PROFILES["tiny"], 1)
    measure = HeldOutLoss([labelled], tokenizer, context=8, pad=0)
    assert measure.left_out == 1 and measure(AutoModelForCausalLM.from_pretrained(base)) == {}
