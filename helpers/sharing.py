"""From a finished run to a folder that others can use and trust: card, chat template, presets, checksums, upload.

Nothing leaves the machine unless it is asked for twice: `push_to_hub` shows the list of files, and sends that list and
nothing else when it is called with `send=True`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from helpers import adapters_convert
from helpers.audit import audit
from helpers.environment import host_memory_gib
from helpers.experiment import finished
from helpers.files import sha256, write_json, write_lines, write_text
from helpers.interchange import axolotl_yaml, koboldcpp_adapter, ollama_modelfile, sillytavern_presets
from helpers.model_card import evaluations, shared_profile, write_model_card
from helpers.profiles import ROOT
from helpers.prompts import CHAT_TEMPLATE
from helpers.training import TrainingResult

__all__ = [
    "TARGETS",
    "bundle",
    "check_request",
    "checksums",
    "evaluations",
    "export",
    "merge_run",
    "push_to_hub",
    "write_model_card",
]

TARGETS = ("chat_template", "sillytavern", "koboldcpp", "ollama", "axolotl")
SUMS = "SHA256SUMS"
# What belongs to an adapter, beside the presets. Anything else that lies in the folder is named, and stays here.
SENT = (
    *("README.md", SUMS, "adapter_config.json", "adapter_model.safetensors", "training_dropout.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
)


def check_request(
    run_dir: str | Path,
    targets: Sequence[str] = TARGETS,
    char: str = "Character",
    user: str = "User",
    length: str | None = "medium",
    base_name: str | None = None,
    merged: str | Path | None = None,
    repo_id: str | None = None,
    per_expert: str | Path | None = None,
) -> None:
    """Everything that can be wrong with what is asked for, before anything is written: ValueError or OSError."""
    result, profile = finished(run_dir)
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}: use one of {', '.join(TARGETS)}")
    koboldcpp_adapter(char, user, length)
    if "ollama" in targets:
        ollama_modelfile(char, user, length)
    profile = shared_profile(profile, base_name)
    if Path(profile.base).is_absolute():
        print(f"note: {profile.base} stands in the files as the base model; --base-name ORG/NAME puts its Hub id there")
    if merged is not None:
        _check_merge(result, Path(merged))
    if repo_id is not None:
        _check_repository(repo_id)
    if per_expert is not None and Path(per_expert).exists():
        raise FileExistsError(f"{per_expert} exists: write the adapter into another folder")


def bundle(
    run_dir: str | Path,
    datasets: Sequence[str] = (),
    license: str | None = None,
    length: str | None = "medium",
    char: str = "Character",
    user: str = "User",
    targets: Sequence[str] = TARGETS,
    base_name: str | None = None,
) -> list[Path]:
    """Make the adapter folder complete; returns its files: card, chat template, presets, base model's name, checksums.

    `char`, `user`, `length`: as in `export`. `targets`: which presets are written; the chat template always is. `base_name`: the
    Hub id under which others find the base model, if it was trained from a folder.
    """
    run_dir = Path(run_dir)
    check_request(run_dir, targets, char, user, length, base_name)
    result, profile = finished(run_dir)
    adapter, profile = result.adapter, shared_profile(profile, base_name)
    write_model_card(run_dir, datasets, license, base_name)
    presets = adapter / "presets"
    for target in dict.fromkeys(("chat_template", *targets)):
        made = export(run_dir, target, char, user, length, base_name)
        if target != "chat_template":
            if made.is_dir():
                shutil.copytree(made, presets / made.name, dirs_exist_ok=True)
            else:
                presets.mkdir(exist_ok=True)
                shutil.copy(made, presets / made.name)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = profile.base  # PEFT writes the path on this machine
    write_json(adapter / "adapter_config.json", config)
    checksums(adapter)
    return sorted(p for p in adapter.rglob("*") if p.is_file())


def checksums(folder: str | Path) -> Path:
    """SHA256SUMS over all files of a folder, in the form that `sha256sum --check` reads."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    lines = [f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    write_lines(folder / SUMS, lines)
    return folder / SUMS


def no_room_for_merged(model, folder: str | Path, memory: bool = True) -> str | None:
    """Why a model, merged into plain bf16 weights, would not fit here, or None: on disk, and (`memory`) loaded into the host."""
    weights = sum(part.weights for name, part in audit(model).parts.items() if name != "adapters")
    return _no_room(weights, Path(folder), memory)


def _no_room(weights: int, folder: Path, memory: bool) -> str | None:
    needed = 2 * weights / 2**30
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())  # the disk that it will be on
    disk, host = shutil.disk_usage(there).free / 2**30, host_memory_gib() if memory else None
    if needed * 1.1 > disk:
        return f"merged, it takes {needed:.1f} GiB of disk, and {disk:.1f} GiB are free"
    if host and needed * 1.3 > host:
        return f"merged, it takes {needed:.1f} GiB of memory and something to work with, and this machine has {host:.1f} GiB"
    return None


def _check_merge(result: TrainingResult, folder: Path) -> None:
    """OSError if a merged model cannot be written there; known before the model is loaded, which takes minutes."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists: merge into another folder, or delete it first")
    weights = sum(r["weights"] for r in result.facts["audit"] if r["part"] not in ("adapters", "all"))
    if problem := _no_room(weights, folder, memory=False):
        raise OSError(f"{folder} cannot be written: {problem}")


def merge_run(
    run_dir: str | Path, folder: str | Path | None = None, max_shard_bytes: int = 5 * 10**9, loaded: tuple | None = None
) -> Path:
    """Base and adapter as one plain bf16 checkpoint, shard by shard, with tokenizer, chat template and checksums.

    `loaded`: (model, tokenizer) of the run, if they are at hand; a GPU may have no room for a second one. The folder appears
    when all of it is there. OSError if the disk is too small, or if there is such a folder already.
    """
    from helpers.experiment import load_run
    from helpers.merging import save_merged

    run_dir = Path(run_dir)
    folder = Path(folder) if folder else run_dir / "merged"
    _check_merge(finished(run_dir)[0], folder)
    model, tokenizer = loaded or load_run(run_dir)[1:]
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an interruption
    save_merged(model, unfinished, max_shard_bytes=max_shard_bytes)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(unfinished)
    checksums(unfinished)
    unfinished.rename(folder)
    return folder


def export_per_expert(run_dir: str | Path, folder: str | Path) -> Path:
    """The adapter in the layout of transformers 4, one LoRA per expert's layer, as vLLM and llama.cpp's converters read it.

    With tokenizer and checksums. FileExistsError if there is such a folder; ValueError for an adapter without experts, or on a
    family whose old names are not known.
    """
    result, profile = finished(run_dir)
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: write the adapter into another folder")
    kind = AutoConfig.from_pretrained(profile.base_path).model_type
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an interruption
    adapters_convert.to_per_expert(result.adapter, unfinished, kind)
    AutoTokenizer.from_pretrained(result.adapter).save_pretrained(unfinished)
    checksums(unfinished)
    unfinished.rename(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- upload


@dataclass(frozen=True)
class Sending:
    """One file of an upload."""

    path: str  # in the repository
    size: int
    sha256: str


def push_to_hub(run_dir: str | Path, repo_id: str, send: bool = False, private: bool = True, api: Any = None) -> list[Sending]:
    """Show what an upload of the adapter folder would send; with `send=True`, send exactly that, as one commit.

    Files that are no part of an adapter are named and left out. Raises ValueError if a text file holds a path of this machine,
    FileNotFoundError before `bundle` was called, and OSError if the Hub cannot be reached or refuses.
    """
    _check_repository(repo_id)
    result, profile = finished(run_dir)
    folder = result.adapter
    if not (folder / SUMS).is_file():
        raise FileNotFoundError(f"{folder} has no {SUMS}: call sharing.bundle(run_dir) (or `python -m helpers share`) first")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    named = {p: p.relative_to(folder).as_posix() for p in files}
    chosen = [p for p in files if named[p] in SENT or named[p].startswith("presets/")]
    for path in chosen:
        if path.suffix != ".safetensors":
            _refuse_paths(path, profile.base)
    plan = [Sending(named[p], p.stat().st_size, sha256(p)) for p in chosen]
    print(f"{'sending to' if send else 'would send to'} {repo_id} ({'private' if private else 'public'}):")
    for item in plan:
        print(f"  {item.size:>12,} bytes  {item.sha256[:12]}  {item.path}")
    for path in (p for p in files if p not in chosen):
        print(f"  {'stays here':>18}  {'':<12}  {named[path]}")
    if not send:
        print("nothing was sent; call it again with send=True (--send) to send this list")
        return plan
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = []
    for path, item in zip(chosen, plan, strict=True):
        content = path.read_bytes()  # what was shown is what is sent, whatever happens to the folder meanwhile
        if hashlib.sha256(content).hexdigest() != item.sha256:
            raise ValueError(f"{path} changed since it was listed: nothing was sent, call it again")
        operations.append(CommitOperationAdd(path_in_repo=item.path, path_or_fileobj=content))
    api = api or HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        # A repository that existed before keeps what it was, whatever was asked for.
        exposed = private and not api.repo_info(repo_id, repo_type="model").private
        if not exposed:
            api.create_commit(repo_id, operations, commit_message="Adapter, card and presets", repo_type="model")
    except Exception as error:  # of the network, the Hub or the token: each library has classes of its own
        why = (str(error).splitlines() or [""])[0]
        raise OSError(
            f"the upload to {repo_id} failed, no commit was made ({type(error).__name__}: {why}): look at the network, the name "
            "and the token (`hf auth login`), then send again"
        ) from error
    if exposed:
        raise ValueError(f"{repo_id} exists and is public: nothing was sent; take another name, or private=False (--public)")
    return plan


def _check_repository(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository on the Hub ({error}): give USER/NAME") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no name of a repository on the Hub: give USER/NAME")


def _refuse_paths(path: Path, base: str = "") -> None:
    """ValueError if a text file holds the course's folder, the user's own, or the absolute path of the base model."""
    text = path.read_text(encoding="utf-8", errors="replace")
    bases = [kind(base) for kind in (PurePosixPath, PureWindowsPath) if kind(base).is_absolute()]
    for place in (*bases, ROOT, Path.home()):
        # in JSON and Python, and with the other slashes: on Windows three spellings of one place
        spellings = (str(place), json.dumps(str(place), ensure_ascii=False)[1:-1], place.as_posix())
        if (place in bases or len(str(place)) > 4) and any(spelling in text for spelling in spellings):
            again = "share it again with --base-name ORG/NAME (bundle(run_dir, base_name=…)), the base model's id on the Hub"
            again = again if place in bases else "call sharing.bundle(run_dir) again, or edit it"
            raise ValueError(f"{path.name} holds the path {place} of this machine: {again}")


# ---------------------------------------------------------------------------------------------------------- exports


def export(
    run_dir: str | Path,
    target: str,
    char: str = "Character",
    user: str = "User",
    length: str | None = "medium",
    base_name: str | None = None,
) -> Path:
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
        write_text(path, CHAT_TEMPLATE)
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
        write_text(path, ollama_modelfile(char, user, length, end))
    else:
        path = folder / "axolotl.yaml"
        write_text(path, axolotl_yaml(shared_profile(finished(run_dir)[1], base_name)))
    return path


def _end_of_reply(adapter: Path) -> str:
    """The end-of-sequence token that this adapter was trained to put after each reply; nothing before it is trained."""
    file = adapter / "tokenizer_config.json"
    if not file.is_file():
        return ""
    token = json.loads(file.read_text(encoding="utf-8")).get("eos_token") or ""
    return token["content"] if isinstance(token, dict) else token
