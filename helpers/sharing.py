"""From a finished run to something that others can use and trust: model card, chat template, presets.

Every number, setting and version of the card is read from the run's files; nothing is typed by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from helpers.evaluation import LengthTable
from helpers.interchange import axolotl_config, koboldcpp_adapter, ollama_modelfile, sillytavern_presets
from helpers.lengths import LENGTHS, word_range
from helpers.profiles import ROOT
from helpers.prompts import CHAT_TEMPLATE, CLOSING, response_header
from helpers.training import load_result, profile_of, write_json

TARGETS = ("chat_template", "sillytavern", "koboldcpp", "ollama", "axolotl")


def evaluations(run_dir: Path) -> list[LengthTable]:
    return [LengthTable.load(p) for p in sorted((run_dir / "evaluation").glob("*.json"))]


def write_model_card(run_dir: str | Path) -> Path:
    """README.md of the adapter folder, in the shape that the Hugging Face Hub reads."""
    run_dir = Path(run_dir)
    result, profile = load_result(run_dir), profile_of(run_dir)
    facts, tables = result.facts, evaluations(run_dir)
    base = profile.base if not (ROOT / profile.base).is_dir() else "the course's tiny Mixtral"
    metadata = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "tags": ["lora", "mixture-of-experts", "qlora", "router-z-loss", "roleplay", "length-control"],
    }
    if base == profile.base:
        metadata["base_model"] = base
    rows: list[tuple[str, Any]] = [
        ("learning rate", profile.learning_rate),
        ("schedule", f"cosine, {profile.warmup_steps} warm-up steps"),
        ("optimizer", "Adam, betas (0.9, 0.999), eps 1e-8"),
        ("rows x accumulation x context", f"{profile.micro_batch} x {profile.accumulation} x {profile.context} tokens"),
        ("steps", facts["steps"]),
        ("tokens in an epoch (trained)", f"{facts['corpus']['tokens']:,} ({facts['corpus']['trained']:,})"),
        ("LoRA", f"r {profile.lora_r}, alpha {profile.lora_alpha}, dropout {profile.lora_dropout}"),
        ("trained on", ", ".join(["attention", *["experts"] * profile.lora_experts, *["router"] * profile.lora_router])),
        ("trainable parameters", f"{facts['trainable']:,}"),
        ("router z-loss coefficient", f"{profile.z_coef} (mean over tokens and layers)"),
        ("router balancing coefficient", f"{profile.balance_coef} (1.0 at balance)"),
        ("base in 4 bit", f"NF4, double quantisation, compute {profile.dtype}"),
        ("seed", profile.seed),
    ]
    parts = [
        "---\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in metadata.items()) + "\n---",
        f"# {profile.name} adapter: role-play chat with length control",
        f"A LoRA adapter for {base}, trained on multi-turn two-person chats in an extended Alpaca format. "
        "`### Response: (length = medium)` asks for a reply of that length; without it the model chooses.",
        "## Prompt format\n\n```\n"
        + "### Instruction:\n{char}'s Persona: …\n\n{user}'s Persona: …\n\nScenario: …\n\n"
        + CLOSING
        + "\n\n### Input:\n{user}: …\n\n"
        + response_header("{char}", "medium")
        + "\n```",
        "## Lengths\n\n| length | words |\n|---|---|\n" + "\n".join(f"| {n} | {_range(n)} |" for n in LENGTHS),
    ]
    for table in tables:
        parts.append(f"## Measured: {table.label}, reply {table.reply + 1}\n\n" + _markdown(table))
    parts.append("## Training\n\n| setting | value |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows))
    parts.append(
        "## What was 4-bit\n\n| part | weights | in 4 bit | bits a weight | dtypes |\n|---|---|---|---|---|\n" + _audit(facts)
    )
    where = f"{facts['hardware']['name']}, {facts['seconds'] / 60:.1f} minutes, {facts['tokens_per_second']:,} tokens/s"
    parts.append("## Made with\n\n" + where + "; " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".")
    card = result.adapter / "README.md"
    card.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return card


def _range(name: str) -> str:
    low, high = word_range(name)
    return f"{low}–{high}" if high else f"{low} or more"


def _markdown(table: LengthTable) -> str:
    lines = ["| length | mean words | 95 % interval | median | in class | within one class |", "|---|---|---|---|---|---|"]
    for r in table.rows:
        shares = " | ".join("" if r[k] is None else f"{r[k]:.0%}" for k in ("in class", "within one"))
        lines.append(f"| {r['length']} | {r['mean']:.1f} | {r['low']:.1f}–{r['high']:.1f} | {r['median']:.0f} | {shares} |")
    s, how = table.statistics, table.sampling
    lines.append(
        f"\nSpearman {s['spearman']:+.2f} over {s['replies']} single replies (p = {s['spearman_p']:.1g}); "
        f"temperature {how['temperature']}, top-p {how['top_p']}, seed {how['seed']}."
    )
    return "\n".join(lines)


def _audit(facts: dict[str, Any]) -> str:
    return "\n".join(
        f"| {r['part']} | {r['weights']:,} | {r['4-bit']:.1%} | {r['bits/weight']:.3f} | {r['dtypes']} |" for r in facts["audit"]
    )


# ---------------------------------------------------------------------------------------------------------- exports


def export(run_dir: str | Path, target: str, char: str = "Character", user: str = "User", length: str | None = "medium") -> Path:
    """Write what another program needs to speak this format into `run_dir/export/`; returns the file or folder.

    `char` and `user` stand in the tags of the KoboldCpp and Ollama files, whose servers know no names; `length` is the modifier
    that all presets ask with, or None.

    chat_template: Jinja for transformers. sillytavern: context, instruct and system-prompt presets. koboldcpp: a chat
    adapter whose last assistant tag carries the modifier. ollama: a Modelfile. axolotl: the run's recipe as YAML. The presets put
    the end-of-sequence token after each finished reply, where training put it.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: use one of {', '.join(TARGETS)}")
    run_dir = Path(run_dir)
    folder = run_dir / "export"
    folder.mkdir(parents=True, exist_ok=True)
    end = _end_of_reply(run_dir / "adapter")
    if target == "chat_template":
        path = folder / "chat_template.jinja"
        path.write_text(CHAT_TEMPLATE, encoding="utf-8")
        if (run_dir / "adapter").is_dir():  # transformers reads it from the tokenizer's folder
            shutil.copy(path, run_dir / "adapter" / path.name)
    elif target == "sillytavern":
        path = folder / "sillytavern"
        path.mkdir(exist_ok=True)
        for kind, preset in sillytavern_presets(length=length, end=end).items():
            write_json(path / f"{kind}.json", preset)
    elif target == "koboldcpp":
        path = folder / "koboldcpp_adapter.json"
        write_json(path, koboldcpp_adapter(char, user, length, end))
    elif target == "ollama":
        path = folder / "Modelfile"
        path.write_text(ollama_modelfile(char, user, length, end), encoding="utf-8")
    else:
        path = folder / "axolotl.yaml"
        path.write_text(yaml.safe_dump(axolotl_config(profile_of(run_dir)), sort_keys=False), encoding="utf-8")
    return path


def _end_of_reply(adapter: Path) -> str:
    """The end-of-sequence token that this adapter was trained to put after each reply; nothing before it is trained."""
    file = adapter / "tokenizer_config.json"
    if not file.is_file():
        return ""
    token = json.loads(file.read_text(encoding="utf-8")).get("eos_token") or ""
    return token["content"] if isinstance(token, dict) else token
