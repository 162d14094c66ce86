"""What is in a checkpoint on disk, read from the headers alone, and whether it fits a model before anything is loaded.

transformers loads what it finds: a missing tensor is drawn at random with a warning, and a quantised weight of the wrong
shape is not noticed at all. Loading Mixtral takes minutes, so everything that can be known from the headers of the
safetensors files is asked first: are all shards there and whole, does every parameter get a tensor, has it the right shape?
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import cached_file, logging

from helpers.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
REAL = ("F64", "F32", "F16", "BF16")  # safetensors' names
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, unread."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' names: BF16, F32, U8, ...


def check_place(path_or_id: str | Path, subfolder: str = "") -> None:
    """OSError for a folder that is not there, or that holds no weights: of both, the Hub's own words say little."""
    path, text = Path(path_or_id), str(path_or_id)
    path = path / subfolder if path.is_dir() else path
    if path.is_dir():
        if not any((path / name).exists() for name in (SINGLE, INDEX)):
            raise OSError(f"{path} holds no weights ({SINGLE} or {INDEX}): fetch or copy them there")
    elif path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise OSError(f"there is no folder {path}, and a Hub id has the form ORG/NAME")


def read_headers(path_or_id: str | Path, **hub: Any) -> dict[str, Stored]:
    """Name → Stored for every tensor of a folder or Hub id (downloaded if need be; `hub` goes to `cached_file`).

    Raises OSError for a file that is missing or cut off and ValueError for an index that is damaged, or if a shard lacks a tensor
    that it promises. Where there are both, one file and an index, it is the one file, as in transformers.
    """
    single = cached_file(str(path_or_id), SINGLE, _raise_exceptions_for_missing_entries=False, **hub)
    index = None if single else cached_file(str(path_or_id), INDEX, _raise_exceptions_for_missing_entries=False, **hub)
    promised = {}
    if index is not None:
        promised = read_json(Path(index), "fetch it again").get("weight_map")
        if not promised:
            raise ValueError(f"{index} is damaged (no weight_map): fetch it again")
    files = sorted(set(promised.values())) or [SINGLE]
    stored = {}
    for name in files:
        file = Path(cached_file(str(path_or_id), name, **hub))
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                    part = tensors.get_slice(key)
                    stored[key] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            size = file.stat().st_size
            raise OSError(f"{file} is cut off or damaged ({size:,} bytes; safetensors says: {error}): fetch it again") from error
    for key, name in promised.items():
        if key not in stored or stored[key].file.name != name:
            raise ValueError(f"{name} in {path_or_id} lacks {key}, which {INDEX} says it holds")
    return stored


def identity(path_or_id: str | Path, pieces: int = 64, whole: int = 2**28) -> str:
    """Sixteen hex digits that stand for a checkpoint's weights: names, shapes, sizes, and what is in its files.

    Of a file of more than `whole` bytes, `pieces` samples of 4 KiB: seconds for 90 GB. Weights that were trained again differ
    nearly everywhere, so samples tell them apart; a change of a single tensor in a large file may go unseen.
    """
    stored = read_headers(path_or_id)
    names = sorted((name, s.shape, s.dtype) for name, s in stored.items())
    digest = hashlib.sha256(repr(names).encode())
    for file in sorted({s.file for s in stored.values()}, key=lambda f: f.name):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            if size <= whole:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for k in range(pieces):
                stream.seek(max(0, size - 4096) * k // (pieces - 1))
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


def not_finite(stored: dict[str, Stored]) -> str | None:
    """The first tensor with a number that is not finite, and its file. Reads everything: for when loading has failed."""
    for name, tensor in stored.items():
        with safe_open(tensor.file, "pt") as tensors:
            value = tensors.get_tensor(name)
            if value.is_floating_point() and not value.isfinite().all():
                return f"{name} in {tensor.file}"
    return None


def check_fits(stored: dict[str, Stored], config: PreTrainedConfig) -> None:
    """Every parameter of `config`'s model gets a tensor of its shape, of real numbers; otherwise ValueError names them and files.

    transformers' own loader is asked, on the meta device: it renames and fuses tensors of any layout without reading one.
    """
    for name, tensor in stored.items():
        if tensor.dtype not in REAL and (name.endswith("weight") or ".experts." in name):
            raise ValueError(f"the checkpoint is not one of plain weights: {name} in {tensor.file} is {tensor.dtype}, not {REAL}")
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    if isinstance(config.get_text_config(), kind.config_class) and not isinstance(config, kind.config_class):
        config = config.get_text_config()  # of a model that also has pictures, its language model
    shapes = {name: torch.empty(s.shape, device="meta") for name, s in stored.items()}
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # the reasons are given below, with the files
    try:
        _, info = kind.from_pretrained(
            None, config=config, state_dict=shapes, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
        problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
        for name, found, wanted in sorted(info["mismatched_keys"]):
            file = f" in {stored[name].file}" if name in stored else ""
            problems.append(f"{name}{file} has shape {tuple(found)}, the model wants {tuple(wanted)}")
    except RuntimeError as error:  # raised when the experts of a layer cannot be fused
        problems = [str(error).partition(". ")[0]]
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    if problems:
        # a name of the model's own that the checkpoint has not is made of several tensors: which of them is it?
        exact = [p for p in problems if p.partition(" ")[0] in stored]
        raise ValueError("the checkpoint does not fit the model: " + "; ".join((exact or odd_ones(stored) or problems)[:5]))


def check_packed(stored: dict[str, Stored], config: PreTrainedConfig) -> None:
    """The same for a checkpoint of `save_4bit`, whose tensors have the model's own names: packed ones are (n/2, 1) uint8."""
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    nested = settings["bnb_4bit_use_double_quant"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, param in model.named_parameters():
        if name not in stored:
            raise ValueError(f"the checkpoint does not fit the model: {name} is missing")
        found = stored[name]
        packed = found.dtype == "U8" and f"{name}.absmax" in stored
        wanted = {name: (-(-param.numel() // 2), 1) if packed else tuple(param.shape)}
        if packed:
            wanted |= {f"{name}.{part}": shape for part, shape in state_shapes(param.numel(), nested).items()}
        for part, shape in wanted.items():
            if part not in stored:
                raise ValueError(f"the checkpoint does not fit the model: {part} is missing, and without it {name} is noise")
            if stored[part].shape != shape:
                raise ValueError(
                    f"the checkpoint does not fit the model: {part} in {stored[part].file} has shape {stored[part].shape}"
                    f"{' (packed)' if packed else ''}, the model wants {shape}"
                )


def state_shapes(weights: int, nested: bool) -> dict[str, tuple[int, ...]]:
    """Of the tensors that belong to that many packed weights: scales of blocks of 64, themselves in blocks of 256; code books."""
    blocks = -(-weights // 64)
    shapes = {"absmax": (blocks,), "quant_map": (16,)}
    return shapes | ({"nested_absmax": (-(-blocks // 256),), "nested_quant_map": (256,)} if nested else {})


def odd_ones(stored: dict[str, Stored]) -> list[str]:
    """Tensors unlike their numbered siblings (the same name with other numbers): of another shape, or not there at all."""
    series: dict[tuple[str, str], dict[int, Stored]] = defaultdict(dict)
    for name, tensor in stored.items():
        if match := re.fullmatch(r"(.*\.)(\d+)(\..*)", name):  # the last number: the expert's, or else the layer's
            series[match[1], match[3]][int(match[2])] = tensor
    sizes = Counter(len(members) for (head, _), members in series.items() if "expert" in head)
    usual = sizes.most_common(1)[0][0] if sizes else 0
    found = []
    for (head, tail), members in series.items():
        shape, votes = Counter(t.shape for t in members.values()).most_common(1)[0]
        for number, tensor in members.items():
            if tensor.shape != shape and votes > len(members) // 2:
                found.append(f"{head}{number}{tail} in {tensor.file} has shape {tensor.shape}, its siblings have {shape}")
        if "expert" in head and len(members) < usual:
            gaps = sorted(set(range(usual)) - set(members))
            found += [f"{head}{number}{tail} is missing" for number in gaps]
    return found
