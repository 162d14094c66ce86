"""What leaves the house: chat template, presets and model card."""

from __future__ import annotations

import dataclasses
import json

import pytest

from helpers import sharing, training
from helpers.evaluation import held_out
from helpers.lengths import label_replies
from helpers.profiles import PROFILES, ROOT
from helpers.prompts import CHAT_TEMPLATE, chat_messages, generation_prompt
from helpers.stories import load_stories
from helpers.tokens import encode
from tests.test_evaluation import table

STORIES = load_stories(ROOT / "data_samples" / "stories")


@pytest.mark.parametrize("story", STORIES[:4], ids=lambda s: s.names.character)
def test_the_chat_template_gives_the_bytes_of_the_generation_prompt(story, tokenizer):
    before = story.before_reply(2)
    history = label_replies(before)
    text = tokenizer.apply_chat_template(
        chat_messages(before, history), chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True,
        char=story.names.character, user=story.names.user, length="medium",
    )  # fmt: skip
    assert text.replace("</s>", "").removeprefix("<s>") == generation_prompt(before, "medium", history)


def test_the_chat_templates_assistant_mask_is_our_completion_mask(tokenizer):
    story = held_out(PROFILES["tiny"], 1, reply=2)[0]
    lengths = label_replies(story)
    out = tokenizer.apply_chat_template(
        chat_messages(story, lengths), chat_template=CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True,
        char=story.names.character, user=story.names.user,
    )  # fmt: skip
    ours = encode(story, tokenizer, lengths)
    n = len(ours)
    assert out["input_ids"][:n] == ours.input_ids
    assert [bool(m) for m in out["assistant_masks"][:n]] == [label != -100 for label in ours.labels]


def test_sillytavern_presets_say_the_formats_words():
    presets = sharing.sillytavern_presets(length="long")
    assert presets["instruct"]["last_output_sequence"].endswith("### Response: (length = long)")
    assert presets["instruct"]["names_behavior"] == "always"
    assert presets["context"]["story_string"].startswith("### Instruction:\n{{char}}'s Persona: ")
    assert presets["sysprompt"]["content"].startswith("Play the role of {{char}}. Taking the above information")


def test_model_card_and_exports_come_from_the_run(tmp_path):
    profile = dataclasses.replace(PROFILES["tiny"], max_steps=1, lora_r=4, context=512, micro_batch=1)
    stories = held_out(PROFILES["tiny"], 2, reply=1)
    result = training.train(profile, stories, tmp_path, progress=None)
    table(lambda c, i: i + 3).save(tmp_path / "evaluation" / "adapter.json")
    card = sharing.write_model_card(tmp_path).read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name:")
    assert f"| steps | {result.step} |" in card and "| LoRA | r 4, alpha 32" in card
    assert f"torch {result.facts['versions']['torch']}" in card and "| unlimited | 150 or more |" in card
    assert "### Response: (length = medium)\n{char}:" in card
    for target in sharing.TARGETS:
        assert sharing.export(tmp_path, target).exists()
    assert (result.adapter / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    assert (
        json.loads((tmp_path / "export" / "koboldcpp_adapter.json").read_text())["assistant_gen"].count("(length = medium)") == 1
    )
    named = sharing.export(tmp_path, "ollama", "Ferro", "Ana", None).read_text(encoding="utf-8")
    assert "### Response:\nFerro:" in named and "\nAna: " in named and "(length" not in named
    assert "</s>" in named, "the adapter was trained with an end-of-sequence token after each reply"
    with pytest.raises(ValueError, match="unknown target"):
        sharing.export(tmp_path, "fax")


def test_a_missing_run_says_what_to_type(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m helpers train"):
        sharing.write_model_card(tmp_path)
