"""The model card of a run, in the shape of the card that the course reproduces, with metadata that the Hub reads.

Every number, table, setting and version is read from the run's files; nothing is typed by hand.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.conclusions import answer
from helpers.evaluation import LengthTable
from helpers.experiment import finished
from helpers.files import write_text
from helpers.generation import SAMPLERS, Sampling
from helpers.lengths import LENGTHS, word_range
from helpers.profiles import PROFILES, ROOT, Profile
from helpers.prompts import CLOSING, response_header
from helpers.training import OF_PROFILE, arguments

TAGS = ["lora", "qlora", "mixture-of-experts", "router-z-loss", "roleplay", "length-control"]


def evaluations(run_dir: Path) -> list[LengthTable]:
    """The length tables of a run's last evaluation; of one that does not say which (or is not finished), all that are there."""
    folder = run_dir / "evaluation"
    names = _behaviour(run_dir).get("tables")
    files = sorted(folder.glob("*.json")) if names is None else [folder / name for name in names]
    return [LengthTable.load(p) for p in files]


def write_model_card(
    run_dir: str | Path, datasets: Sequence[str] = (), license: str | None = None, base_name: str | None = None
) -> Path:
    """README.md of the adapter folder.

    `datasets`: Hub ids of the training data, if it is there; `license`: a Hub license id; `base_name`: see `shared_profile`.
    """
    run_dir = Path(run_dir)
    result, profile = finished(run_dir)
    profile = shared_profile(profile, base_name)
    # The course's own stories are English; of others nobody has said what they are written in.
    source = json.loads((run_dir / "run.json").read_text(encoding="utf-8")).get("stories")
    language = "en" if source == OF_PROFILE else None
    text = render(profile, result.facts, evaluations(run_dir), _behaviour(run_dir), datasets, license, language)
    card = result.adapter / "README.md"
    write_text(card, text)
    return card


def _behaviour(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "behaviour.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def shared_profile(profile: Profile, base_name: str | None = None) -> Profile:
    """The profile as others should read it: its base under the Hub id `base_name`, or the shipped base by its relative path."""
    if base_name is not None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base_name):
            raise ValueError(f"base name {base_name!r}: give the base model's Hub id, ORG/NAME")
        return dataclasses.replace(profile, base=base_name)
    shipped = PROFILES["tiny"].base
    return dataclasses.replace(profile, base=shipped) if _same_folder(profile.base, shipped) else profile


def _same_folder(base: str, shipped: str) -> bool:
    return (ROOT / base).resolve() == (ROOT / shipped).resolve()


def base_in_words(profile: Profile) -> str:
    if on_the_hub(profile):
        return profile.base
    shipped = _same_folder(profile.base, PROFILES["tiny"].base)
    return f"the course's tiny Mixtral (`{profile.base}`)" if shipped else f"a local base model (`{profile.base}`)"


def on_the_hub(profile: Profile) -> bool:
    return not (ROOT / profile.base).is_dir() and profile.base.count("/") == 1 and not Path(profile.base).exists()


GIVEN = "conversations of the author's own choice, which the training may have seen"


def is_held_out(behaviour: dict[str, Any] | None) -> bool:
    """Whether a run was measured on the course's own held-out conversations (also if its folder does not say)."""
    return (behaviour or {}).get("conversations", {}).get("held out", True)


def metadata(
    profile: Profile,
    tables: Sequence[LengthTable],
    datasets: Sequence[str] = (),
    license: str | None = None,
    language: str | None = "en",
    held_out: bool = True,
):
    """huggingface_hub.ModelCardData with the length metrics of the adapter's own tables as evaluation results.

    `held_out`: the conversations are those that no training saw; of others nobody knows.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for table in (t for t in tables if t.label.startswith("adapter")):
        s, place = table.statistics, f"reply {table.reply + 1}"
        shared = {
            "task_type": "text-generation",
            "task_name": "Length-controlled role-play",
            "dataset_type": "held-out-conversations" if held_out else "conversations",
            "dataset_name": f"{s['conversations']} {'held-out conversations' if held_out else GIVEN}, {place}",
            "dataset_args": {"reply": table.reply, **table.sampling},
        }
        for kind, name, key in (
            ("spearmanr", "Spearman, class asked for and words of single replies", "spearman"),
            ("accuracy", "Replies in the class asked for", "in_class"),
            ("accuracy", "Replies within one class of it", "within_one"),
            ("mutual_information", "Bits that the obtained class tells about the asked one", "information"),
        ):
            results.append(EvalResult(metric_type=kind, metric_name=name, metric_value=round(s[key], 4), **shared))
    return ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        language=language,
        license=license,
        base_model=profile.base if on_the_hub(profile) else None,
        tags=TAGS,
        datasets=list(datasets) or None,
        model_name=f"{profile.name} adapter",
        eval_results=results or None,
    )


def render(
    profile: Profile,
    facts: dict[str, Any],
    tables: Sequence[LengthTable],
    behaviour: dict[str, Any] | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    language: str | None = "en",
) -> str:
    held_out = is_held_out(behaviour)
    parts = [
        f"---\n{metadata(profile, tables, datasets, license, language, held_out).to_yaml()}\n---",
        f"# {profile.name} adapter: role-play chat with length control",
        f"A LoRA adapter for {base_in_words(profile)}, trained on multi-turn two-person chats in an extended Alpaca format. "
        "`### Response: (length = medium)` asks for a reply of that length; without it the model chooses.",
        "## Prompt format\n\n```\n### Instruction:\n{char}'s Persona: …\n\n{user}'s Persona: …\n\nScenario: …\n\n"
        + CLOSING
        + "\n\n### Input:\n{user}: …\n\n"
        + response_header("{char}", "medium")
        + "\n```\n\nThe chat template in the tokenizer writes it. With `transformers` and `peft` alone:\n\n```python\n"
        + usage(profile.base, sampling=measured_with(tables))
        + "```\n\nThe template puts a backslash before lines of a message that imitate `### Input:` or `### Response:`. "
        "Look-alike characters (as in `＃＃＃ Input:`) and names pass: a server for strangers has to check those itself.",
        "## Message length control\n\nLengths hold on average, not to the word. The classes were defined by words:\n\n"
        "| length | words |\n|---|---|\n" + "\n".join(f"| {n} | {_range(n)} |" for n in LENGTHS),
        *([] if held_out or not tables else [f"Measured on {GIVEN}."]),
    ]
    for table in tables:
        parts.append(f"### Measured: {table.label}, reply {table.reply + 1}\n\n" + _markdown(table))
    if behaviour and behaviour.get("conclusions"):
        cells = ((c["claim"], c["measured"], c["goal"], answer(c["reached"])) for c in behaviour["conclusions"])
        lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
        head = "## What holds and what does not\n\n| claim | measured | goal | reached |\n|---|---|---|---|\n"
        parts.append(head + "\n".join(lines))
    settings = "\n".join(f"- {k}: {v}" for k, v in _hyperparameters(profile, facts))
    quantised = facts.get("quantization") or {}
    config = "\n".join(f"- {k}: {v}" for k, v in quantised.items() if v is not None)
    parts += [
        "## Training procedure\n\n### Training hyperparameters\n\n" + settings,
        *(["### bitsandbytes quantization config\n\n" + config] if config else []),
        "### What was 4-bit\n\n| part | weights | in 4 bit | bits per weight | dtypes |\n|---|---|---|---|---|\n" + _audit(facts),
        "### Framework versions\n\n" + "\n".join(f"- {k} {v}" for k, v in facts["versions"].items()),
        f"Trained on {facts['hardware']['name']} in {facts['seconds'] / 60:.1f} minutes, {facts['tokens_per_second']:,} tokens "
        "per second.",
    ]
    return "\n\n".join(parts) + "\n"


def measured_with(tables: Sequence[LengthTable]) -> Sampling:
    """The settings of the adapter's own table, so that who follows the card gets what the card measured."""
    return next((Sampling(**t.sampling) for t in tables if t.label.startswith("adapter")), SAMPLERS["course"])


def usage(base: str, folder: str = "path/to/this/folder", sampling: Sampling = SAMPLERS["course"]) -> str:
    """A few lines that chat, without this course. The base is loaded in 16 bit, on whatever devices have room for it."""
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(folder)})\n"
        f'base = AutoModelForCausalLM.from_pretrained({_quoted(base)}, device_map="auto")\n'
        f"model = PeftModel.from_pretrained(base, {_quoted(folder)})\n" + _ask(sampling)
    )


def usage_merged(folder: str = "path/to/merged", sampling: Sampling = SAMPLERS["course"]) -> str:
    """The same for merged weights, which need transformers only."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(folder)})\n"
        f'model = AutoModelForCausalLM.from_pretrained({_quoted(folder)}, device_map="auto")\n' + _ask(sampling)
    )


def _quoted(path: str) -> str:
    """As a Python string: the backslashes of a Windows path would be escapes."""
    return json.dumps(path, ensure_ascii=False)


def _ask(sampling: Sampling) -> str:
    return (
        'setting = {"char": "Ferro", "user": "Ana", "persona": "Ferro is a miller.", "user_persona": "Ana is a nurse.",\n'
        '           "scenario": "Ana visits the mill.", "length": "short"}\n'
        'prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Is anyone there?"}], add_generation_prompt=True,\n'
        '                                       return_tensors="pt", return_dict=True, **setting).to(model.device)\n'
        f"reply = model.generate(**prompt, {_settings(sampling)})[0]\n"
        'print(tokenizer.decode(reply[prompt["input_ids"].shape[1]:], skip_special_tokens=True).strip())\n'
    )


def _settings(sampling: Sampling) -> str:
    """As arguments of `generate`, which has a top_k of its own unless it is told 0."""
    given = [f"max_new_tokens={sampling.max_new_tokens}"]
    if sampling.temperature == 0:
        return ", ".join(["do_sample=False", *given])
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"):
        value, neutral = getattr(sampling, name), 0 if name in ("top_k", "min_p") else 1
        if value != neutral or name in ("temperature", "top_k"):
            given.insert(-1, f"{name}={value}")
    return ", ".join(["do_sample=True", *given])


def _hyperparameters(profile: Profile, facts: dict[str, Any]) -> list[tuple[str, Any]]:
    micro, steps = facts.get("micro_batch", profile.micro_batch), facts.get("accumulation", profile.accumulation)
    processes = facts.get("processes", 1)
    args = arguments(profile, Path("of this run"))  # as the trainer got them; nothing is written there
    return [
        ("learning_rate", profile.learning_rate),
        ("train_batch_size", f"{micro} rows of {profile.context} tokens, packed"),
        ("gradient_accumulation_steps", steps),
        *([("processes", processes)] if processes > 1 else []),
        ("total_train_batch_size", micro * steps * processes),
        ("seed", profile.seed),
        ("optimizer", f"Adam with betas=({args.adam_beta1},{args.adam_beta2}) and epsilon={args.adam_epsilon}"),
        ("lr_scheduler_type", args.lr_scheduler_type.value),
        ("lr_scheduler_warmup_steps", profile.warmup_steps),
        ("training_steps", facts["steps"]),
        ("tokens in an epoch (trained)", f"{facts['corpus']['tokens']:,} ({facts['corpus']['trained']:,})"),
        ("LoRA", f"r {profile.lora_r}, alpha {profile.lora_alpha}, dropout {profile.lora_dropout}"),
        ("trained on", ", ".join(["attention", *["experts"] * profile.lora_experts, *["router"] * profile.lora_router])),
        ("trainable parameters", f"{facts['trainable']:,}"),
        ("router z-loss coefficient", f"{profile.z_coef} (mean over tokens and layers)"),
        ("router balancing coefficient", f"{profile.balance_coef} (1.0 at balance)"),
        ("replies without modifier", f"{profile.omit:.0%}"),
        ("base in 4 bit", f"NF4, double quantisation, compute {profile.dtype}"),
    ]


def _range(name: str) -> str:
    low, high = word_range(name)
    return f"{low}–{high}" if high else f"{low} or more"


def _markdown(table: LengthTable) -> str:
    lines = [
        "| length | mean words | 95 % interval | median | tokens | in class | within one class | cut off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in table.rows:
        shares = " | ".join("" if r[k] is None else f"{r[k]:.0%}" for k in ("in class", "within one"))
        median = "cut off" if r["median"] is None else f"{r['median']:.0f}"
        lines.append(
            f"| {r['length']} | {r['mean']:.1f} | {r['low']:.1f}–{r['high']:.1f} | {median} | {r['tokens']:.0f} | {shares} | "
            f"{r['cut off']:.0%} |"
        )
    s, how = table.statistics, table.sampling
    lines.append(
        f"\nSpearman {s['spearman']:+.2f} [{s['spearman_low']:+.2f}, {s['spearman_high']:+.2f}] over {s['replies']} single "
        f"replies to {s['conversations']} conversations; temperature {how['temperature']}, top-p {how['top_p']}, seed "
        f"{how['seed']}."
    )
    return "\n".join(lines)


def _audit(facts: dict[str, Any]) -> str:
    return "\n".join(
        f"| {r['part']} | {r['weights']:,} | {r['4-bit']:.1%} | {r['bits/weight']:.3f} | {r['dtypes']} |" for r in facts["audit"]
    )
