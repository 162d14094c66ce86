"""The format for other programs, all from the words in `prompts`: SillyTavern, KoboldCpp, Ollama, Axolotl, TRL.

`end` is what follows each of the character's finished replies: the tokenizer's end-of-sequence token for a model that was
trained with one after every reply (ours are), nothing for the card family's practice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from helpers.lengths import rank
from helpers.profiles import Profile
from helpers.prompts import (
    CLOSING,
    Lengths,
    Segment,
    chat_arguments,
    chat_messages,
    instruction,
    response_header,
    segments,
    stop_strings_of,
)
from helpers.schema import Message, Pair, Story
from helpers.tokens import Encoded, encode_all, encode_segments, start_ids, trained_spans

# ------------------------------------------------------------------------------------------------------------- chatting


def _blocks(names: Pair, length: str | None) -> tuple[str, str, str]:
    """(before a user's text, before a finished reply, end of a prompt) as the formatter writes them."""
    story = Story(names, Pair("p", "p"), "s", (Message("user", "TEXT"), Message("character", "TEXT")))
    pieces = segments(story)
    before_user = pieces[1].text.removesuffix("TEXT")
    before_reply = pieces[2].text + pieces[3].text.removesuffix("TEXT")
    return before_user, before_reply, "\n\n" + response_header(names.character, length)


def sillytavern_presets(
    name: str = "Length-controlled Alpaca", length: str | None = "medium", end: str = "", closing: str = CLOSING
) -> dict[str, dict[str, Any]]:
    """The three preset files: context, instruct, system prompt. Only the last response line carries the modifier.

    Old and new field names stand side by side, because each version from 1.10 on reads the ones that it knows. The instruction
    header stands in the story string: 1.13 and later drop `system_sequence_prefix`. `wrap` must stay on: the last newline of the
    story string comes from it. Import context, then instruct, then sysprompt, and switch instruct mode on.
    """
    if length is not None:
        rank(length)
    names = Pair("{{char}}", "{{user}}")
    setting = Pair("{{description}}{{#if personality}} {{personality}}{{/if}}", "{{persona}}")
    said = closing.format(char=names.character, user=names.user)
    # instruction() checks its texts as a story's; the macros are plain text to it
    head = instruction(Story(names, setting, "{{scenario}}", ()), closing)
    assert head.endswith(said)
    header = "\n### Response:" + (f" (length = {length})" if length else "")
    return {
        "context": {
            "name": name,
            "story_string": head.removesuffix(said) + "{{system}}\n",
            "chat_start": "",
            "example_separator": "",
            "use_stop_strings": False,
            "always_force_name2": True,
            "trim_sentences": False,
            "single_line": False,
        },
        "instruct": {
            "name": name,
            "input_sequence": "\n### Input:",
            "output_sequence": "\n### Response:",
            "first_output_sequence": "",
            "last_output_sequence": header,
            "system_sequence": "",
            "system_sequence_prefix": "",
            "system_sequence_suffix": "",
            "stop_sequence": end,
            "separator_sequence": end + "\n",  # versions that know `output_suffix` overwrite it with this, if it is there
            "input_suffix": "\n",
            "output_suffix": end + "\n",
            "system_suffix": "",
            "wrap": True,
            "macro": True,
            "names": True,
            "names_force_groups": True,
            "names_behavior": "always",
            "activation_regex": "",
            "system_prompt": said,  # before 1.12.6 there was no file for it
            "skip_examples": False,
            "user_alignment_message": "",
            "sequences_as_stop_strings": True,
        },
        "sysprompt": {"name": name, "content": said},
    }


def koboldcpp_adapter(
    char: str = "Character", user: str = "User", length: str | None = "medium", end: str = ""
) -> dict[str, str]:
    """Chat-completions adapter. `assistant_gen` replaces the last assistant tag only, which is where the modifier belongs.

    The server knows no names, so they stand in the tags: one adapter for each pair of people.
    """
    before_user, before_reply, prompt_end = _blocks(Pair(char, user), length)
    return {
        "system_start": "### Instruction:\n",
        "system_end": "",
        "user_start": before_user,
        "user_end": "",
        "assistant_start": before_reply,
        "assistant_end": end,
        "assistant_gen": prompt_end,
    }


def ollama_modelfile(
    char: str = "Character",
    user: str = "User",
    length: str | None = "medium",
    end: str = "",
    system: str | None = None,
    model: str = "./model.gguf",
) -> str:
    """Template, system block and stop strings; FROM names a GGUF file of the merged model. One Modelfile a pair of people.

    `system` is everything of the instruction block below its header (`instruction(story)`); by default the client sends it.
    """
    before_user, before_reply, prompt_end = _blocks(Pair(char, user), length)
    for text in (before_user, before_reply, prompt_end, end, system or ""):
        if '"""' in text or "{{" in text:
            raise ValueError(f'{text[:40]!r}: a Modelfile cannot hold """ or {{{{ in a text')
    template = (
        "{{ if .System }}### Instruction:\n{{ .System }}{{ end }}{{ range .Messages }}"
        f'{{{{ if eq .Role "user" }}}}{before_user}{{{{ .Content }}}}'
        f'{{{{ else if eq .Role "assistant" }}}}{before_reply}{{{{ .Content }}}}{end}{{{{ end }}}}'
        f"{{{{ end }}}}{prompt_end}"
    )
    lines = [f"FROM {model}", f'TEMPLATE """{template}"""']
    if system:
        lines.append(f'SYSTEM """{system.removeprefix("### Instruction:" + chr(10))}"""')
    # Ollama takes a text between quotes as it stands: \n would be two letters, while a line break and a " are themselves.
    stops = [*stop_strings_of(user), *([end] if end else [])]
    return "\n".join([*lines, *(f'PARAMETER stop """{stop}"""' for stop in stops)]) + "\n"


# ------------------------------------------------------------------------------------------------------------- training


def axolotl_rows(
    labelled: Iterable[tuple[Story, Lengths]], tokenizer, context: int | None = None, long: str = "drop"
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Rows for Axolotl's `type: input_output`: {"segments": [{"label": trained?, "text": …}]}.

    With a `context`, the samples of the training itself: a story beyond it is shortened or split as `tokens.encode_all` does.
    Axolotl would cut the end off, wherever it lies.

    Axolotl tokenises each segment by itself, where a SentencePiece tokenizer may put a space in front that is none in the
    running text. So each row is checked: its ids and labels, made the way Axolotl makes them, must be those of `tokens.encode`.
    """
    bos = tokenizer.convert_ids_to_tokens(start_ids(tokenizer))
    for story, pieces, ours in _samples(labelled, tokenizer, context, long):
        row: list[dict[str, Any]] = []
        text = "".join(bos)
        for piece in pieces:
            if piece.kind == "reply":
                row.append({"label": False, "text": text})
                row.append({"label": True, "text": _apart(text, piece.text, tokenizer) + tokenizer.eos_token})
                text = ""
            else:
                text += piece.text
        if text:
            row.append({"label": False, "text": text})
        ids: list[int] = []
        labels: list[int] = []
        for part in row:
            more = tokenizer(part["text"], add_special_tokens=False).input_ids
            ids += more
            labels += more if part["label"] else [-100] * len(more)
        if (ids, labels) != (ours.input_ids, ours.labels):
            at = next((i for i, (a, b) in enumerate(zip(ids, ours.input_ids, strict=False)) if a != b), min(len(ids), len(ours)))
            raise ValueError(
                f"{story.source or 'a story'}: this tokenizer cuts segments otherwise than running text (token {at}: "
                f"{tokenizer.convert_ids_to_tokens(ids[at : at + 3])} for "
                f"{tokenizer.convert_ids_to_tokens(ours.input_ids[at : at + 3])}); train with `python -m helpers train` instead"
            )
        yield {"segments": row}


def _samples(labelled, tokenizer, context: int | None, long: str) -> Iterator[tuple[Story, list[Segment], Encoded]]:
    """(story, pieces of its text, ids and labels) of each training sample."""
    for story, lengths in labelled:
        pieces = segments(story, lengths)
        turns = [i for i, p in enumerate(pieces) if p.kind in ("input", "header")]
        samples = list(encode_all([(story, lengths)], tokenizer, context, long=long))
        whole = len(samples) == 1 and samples[0] == encode_segments(pieces, tokenizer)
        begin = 1
        for sample in samples:
            if whole:
                yield story, pieces, sample
            elif long == "drop":
                yield story, [pieces[0], *pieces[turns[sample.dropped_turns] :]], sample
            else:  # the parts follow each other, and each ends with a reply: it is over when its last reply is
                replies = len(trained_spans(sample.labels))
                ends = [i + 1 for i, p in enumerate(pieces) if p.kind == "reply" and i >= begin]
                yield story, [pieces[0], *pieces[begin : ends[replies - 1]]], sample
                begin = ends[replies - 1]


def _apart(before: str, reply: str, tokenizer) -> str:
    """The reply's text such that, tokenised alone, it gives the tokens that it has after `before`."""
    ids = tokenizer(before + reply, add_special_tokens=False).input_ids
    for text in (reply, reply.removeprefix(" ")):
        alone = tokenizer(text, add_special_tokens=False).input_ids
        if ids[-len(alone) :] == alone and tokenizer(before, add_special_tokens=False).input_ids == ids[: -len(alone)]:
            return text
    return reply


def axolotl_config(profile: Profile, data: str = "stories-axolotl.jsonl") -> dict[str, Any]:
    """The profile's recipe as an Axolotl configuration, but for what `axolotl_yaml` names."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] * profile.lora_experts
    targets += ["mlp.gate.weight"] * profile.lora_router
    return {
        "base_model": profile.base,
        "load_in_4bit": True,
        "adapter": "qlora",
        "quantize_moe_experts": True,  # without it transformers 5 leaves the experts in bf16
        "lora_r": profile.lora_r,
        "lora_alpha": profile.lora_alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "lora_target_parameters": targets,
        "datasets": [{"path": data, "ds_type": "json", "type": "input_output"}],
        "train_on_inputs": False,
        "sequence_len": profile.context,
        # Packed stories see each other without FlashAttention, which needs bf16's generation of GPUs: a T4 cannot run it.
        "sample_packing": profile.dtype != "float16",
        "attn_implementation": "sdpa" if profile.dtype == "float16" else "flash_attention_2",
        "micro_batch_size": profile.micro_batch,
        "gradient_accumulation_steps": profile.accumulation,
        "num_epochs": profile.epochs,
        **({"max_steps": profile.max_steps} if profile.max_steps > 0 else {}),
        "optimizer": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "learning_rate": profile.learning_rate,
        "lr_scheduler": "cosine",
        "warmup_steps": profile.warmup_steps,
        "weight_decay": 0.0,
        "seed": profile.seed,
        "bf16": profile.dtype == "bfloat16",
        "fp16": profile.dtype == "float16",
        "gradient_checkpointing": profile.gradient_checkpointing,
        "output_dir": f"./{profile.name}",
    }


def axolotl_yaml(profile: Profile, data: str = "stories-axolotl.jsonl") -> str:
    """`axolotl_config` as a file, headed by the parts of the recipe that Axolotl cannot express."""
    missing = [
        *([f"router z-loss, coefficient {profile.z_coef}"] if profile.z_coef else []),
        *([f"router balancing loss, coefficient {profile.balance_coef} (1.0 at balance)"] if profile.balance_coef else []),
        *([f"dropout of {profile.lora_dropout} on the adapters (those on experts take none)"] if profile.lora_dropout else []),
    ]
    head = "".join(f"# Not in this recipe, unlike in the course's run: {part}\n" for part in missing)
    return head + yaml.safe_dump(axolotl_config(profile, data), sort_keys=False)


def trl_rows(labelled: Iterable[tuple[Story, Lengths]], setting: bool = False) -> Iterator[dict[str, Any]]:
    """Rows for TRL's SFTTrainer: `messages` in plain text, and the names as `chat_template_kwargs`.

    Give the tokenizer `prompts.CHAT_TEMPLATE` and train with `assistant_only_loss=True`.
    """
    for story, lengths in labelled:
        arguments = chat_arguments(story, setting)
        messages = chat_messages(story, lengths, system=not setting)
        # one schema for all rows: Arrow wants every message to have every key
        yield {
            "messages": [{"length": None, **m} for m in messages],
            "chat_template_kwargs": arguments,
        }
