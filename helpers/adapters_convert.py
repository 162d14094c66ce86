"""Adapters between two layouts: one LoRA an expert stack (transformers 5) and one LoRA an expert (transformers 4).

Up to transformers 4 every expert was three linear layers and an adapter held `…experts.3.w1.lora_A.weight`. That is what the
card's adapter looks like, and what vLLM and llama.cpp's converters read. transformers 5 has two stacks a layer, and PEFT
writes their factors flattened, in two different orders (E experts, r rank, H hidden size, I intermediate size):

    …experts.base_layer.lora_A.weight  (E·r, H)    gate_up_proj, the inner wrapper; experts one after the other
    …experts.base_layer.lora_B.weight  (2I, r·E)   expert number changes fastest: B.view(2I, r, E)
    …experts.lora_A.weight             (E·r, I)    down_proj, the outer wrapper
    …experts.lora_B.weight             (H, r·E)

A shared expert's or a dense layer's adapter stays what it is, but PEFT takes a module name like `gate_proj` for that of a single
expert. In the layout of transformers 5 such layers are therefore named by their parameter (`mlp.shared_expert.gate_proj.weight`).

Gate and up are one matrix in the stack. A pair of old adapters with different A becomes one of twice the rank, with a
block-diagonal B; a stack's adapter becomes a pair that shares its A. Both are exact, and each undoes the other. Loaded in
transformers 4, a stack's adapter raises nothing and gives wrong logits: convert it first.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.files import write_json
from helpers.qlora import DROPOUT_FILE

WEIGHTS = "adapter_model.safetensors"


class Naming(NamedTuple):
    """How a family's checkpoints called one expert's layers before they were stacked."""

    block: str  # the MoE block; `mlp` in transformers 5
    gate: str
    up: str
    down: str


NAMINGS = {
    "mixtral": Naming("block_sparse_moe", "w1", "w3", "w2"),  # Mixtral, MiniMax
    "qwen": Naming("mlp", "gate_proj", "up_proj", "down_proj"),  # OLMoE, Qwen2/3-MoE, DeepSeek, GLM-4-MoE, ...
}
Pair = tuple[Tensor, Tensor]  # A (r, in), B (out, r) of one expert's layer
BLOCK, ROUTER = "mlp", "gate"  # the MoE block and its router in transformers 5; the router was a linear layer in 4
_STACKED = re.compile(rf"(.*\.)({BLOCK})\.experts\.(base_layer\.)?lora_([AB])\.weight")
_SINGLE = re.compile(r"(.*\.)(\w+)\.experts\.(\d+)\.(\w+)\.lora_([AB])\.weight")


def to_per_expert(folder: str | Path, out: str | Path, naming: str = "mixtral") -> Path:
    """Write a saved adapter (`qlora.save_lora`, stock PEFT) in the naming of transformers 4; returns `out`.

    `naming` is one of `NAMINGS`. The product B·A of every expert is the same, bit for bit. For families whose MoE block is called
    `mlp` in transformers 5. The training dropout stays beside the files (see `qlora.save_lora`). Raises ValueError for an adapter
    without expert stacks there.
    """
    names, config = NAMINGS[naming], _config(folder)
    tensors, stacks = {}, defaultdict(dict)
    for key, value in load_file(Path(folder) / WEIGHTS).items():
        if match := _STACKED.fullmatch(key):
            stacks[match[1], "gate_up_proj" if match[3] else "down_proj"][match[4]] = value
        else:
            tensors[key.replace(f".{BLOCK}.", f".{names.block}.") if ".experts." not in key else key] = value
    if not stacks:
        raise ValueError(f"{folder} holds no adapter on expert stacks: nothing to convert")
    targets = {t.rpartition(".")[2] for t in config.target_parameters or ()}
    if "gate_up_proj" in targets and "down_proj" not in targets:  # the only wrapper, so also the outer one
        stacks = {(prefix, "gate_up_proj"): pair for (prefix, _), pair in stacks.items()}
    split = {key: _unstack(pair, _rank(config, key[1])) for key, pair in stacks.items()}
    halves = all(_is_block_diagonal(b) for (_, stack), pairs in split.items() if stack == "gate_up_proj" for _, b in pairs)
    for (prefix, stack), experts in split.items():
        for e, (a, b) in enumerate(experts):
            layers = {names.down: (a, b)}
            if stack == "gate_up_proj":
                r, inner = a.shape[0] // 2, b.shape[0] // 2
                gate = (a[:r], b[:inner, :r]) if halves else (a, b[:inner])
                up = (a[r:], b[inner:, r:]) if halves else (a, b[inner:])
                layers = {names.gate: gate, names.up: up}
            for layer, pair in layers.items():
                _put(tensors, f"{prefix}{names.block}.experts.{e}.{layer}", pair)
    adapted = {stack for _, stack in split}
    modules = {*(config.target_modules or ()), *([names.down] if "down_proj" in adapted else [])}
    modules |= {names.gate, names.up} if "gate_up_proj" in adapted else set()
    modules |= {ROUTER} if _has_router(tensors, names.block) else set()
    modules |= {target.removesuffix(".weight").rpartition(".")[2] for target in _linear_parameters(config)}
    config.target_modules, config.target_parameters = sorted(modules), None
    _move_rank(config, ["gate_up_proj"], [names.gate, names.up], 0.5 if halves else 1)
    _move_rank(config, ["down_proj"], [names.down], 1)
    return _write(config, tensors, out, _dropout(folder, config))


def from_per_expert(folder: str | Path, out: str | Path) -> Path:
    """Write an adapter in the naming of transformers 4 (any of `NAMINGS`) as stock PEFT has it on transformers 5.

    Exact: see the module's text. The training dropout is kept beside the files, for `qlora.load_lora(..., trainable=True)`.
    Raises ValueError if experts are missing, or gate without up.
    """
    config = _config(folder)
    tensors, found = {}, defaultdict(dict)
    for key, value in load_file(Path(folder) / WEIGHTS).items():
        if match := _SINGLE.fullmatch(key):
            prefix, _, expert, layer, factor = match.groups()
            found[prefix, layer].setdefault(int(expert), {})[factor] = value
        else:
            tensors[key] = value
    names = next((n for n in NAMINGS.values() if {layer for _, layer in found} <= {n.gate, n.up, n.down}), None)
    if not found or names is None:
        raise ValueError(f"{folder} holds no adapter on single experts in a known naming ({', '.join(NAMINGS)})")
    tensors = {key.replace(f".{names.block}.", f".{BLOCK}."): value for key, value in tensors.items()}
    count = 1 + max(e for experts in found.values() for e in experts)
    layers: dict[tuple[str, str], list[Pair]] = {}
    for (prefix, layer), experts in found.items():
        if lacking := [e for e in range(count) if set(experts.get(e, ())) != {"A", "B"}]:
            raise ValueError(f"{folder}: {prefix}{names.block}.experts has no {layer} adapter for experts {lacking}")
        layers[prefix, layer] = [(experts[e]["A"], experts[e]["B"]) for e in range(count)]
        if odd := {a.shape[0] for a, _ in layers[prefix, layer]} - {_rank(config, layer)}:
            raise ValueError(f"{folder}: {layer} has rank {sorted(odd)}, its configuration says {_rank(config, layer)}")
    prefixes = sorted({prefix for prefix, layer in layers if layer in (names.gate, names.up)})
    if any((prefix, layer) not in layers for prefix in prefixes for layer in (names.gate, names.up)):
        raise ValueError(f"{folder}: gate and up are one matrix in transformers 5, so both need an adapter or neither")
    pairs = {prefix: list(zip(layers[prefix, names.gate], layers[prefix, names.up], strict=True)) for prefix in prefixes}
    shared = all(torch.equal(gate[0], up[0]) for experts in pairs.values() for gate, up in experts)
    downs = {prefix: experts for (prefix, layer), experts in layers.items() if layer == names.down}
    for prefix, experts in pairs.items():
        if shared:
            joined = [(gate[0], torch.cat([gate[1], up[1]])) for gate, up in experts]
        else:
            joined = [(torch.cat([gate[0], up[0]]), torch.block_diag(gate[1], up[1])) for gate, up in experts]
        inner = "base_layer." if downs else ""  # PEFT nests wrappers: the first parameter's is the inner one
        _put(tensors, f"{prefix}{BLOCK}.experts.{inner}".rstrip("."), _stack(joined))
    for prefix, experts in downs.items():
        _put(tensors, f"{prefix}{BLOCK}.experts", _stack(experts))
    parameters = [f"{BLOCK}.experts.gate_up_proj"] * bool(pairs) + [f"{BLOCK}.experts.down_proj"] * bool(downs)
    gone = {names.gate, names.up, names.down}
    if _has_router(tensors, BLOCK):
        parameters.append(f"{BLOCK}.{ROUTER}.weight")
        gone.add(ROUTER)
    # adapters left on layers of the same names: shared experts and dense layers (the path begins after the layer's number)
    modules = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key and ".experts." not in key}
    others = {m for m in modules if m.rpartition(".")[2] in gone and not m.endswith(f".{BLOCK}.{ROUTER}")}
    parameters += sorted({re.sub(r"^(.*\.\d+|base_model\.model)\.", "", m) + ".weight" for m in others})
    config.target_modules = sorted(m for m in config.target_modules or () if m.rpartition(".")[2] not in gone)
    config.target_parameters = parameters
    _move_rank(config, [names.gate, names.up], ["gate_up_proj"], 1 if shared else 2)
    _move_rank(config, [names.down], ["down_proj"], 1)
    dropout = _dropout(folder, config)
    config.lora_dropout = 0.0  # stock PEFT refuses dropout on parameters
    return _write(config, tensors, out, dropout)


def _config(folder: str | Path) -> LoraConfig:
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_dora or config.lora_bias:
        raise ValueError(f"{folder}: only plain LoRA adapters can be converted")
    if isinstance(config.target_modules, str):
        raise ValueError(f"{folder}: its target_modules is the pattern {config.target_modules!r}, not a list of names")
    return config


def _dropout(folder: str | Path, config: LoraConfig) -> float:
    """What an adapter was trained with: `save_lora` keeps it beside a configuration that says 0."""
    kept = Path(folder) / DROPOUT_FILE
    return json.loads(kept.read_text(encoding="utf-8"))["lora_dropout"] if kept.is_file() else config.lora_dropout


def _linear_parameters(config: LoraConfig) -> list[str]:
    """Target parameters that are weights of linear layers, and not a router's or an expert stack's."""
    return [t for t in config.target_parameters or () if t.endswith(".weight") and t.split(".")[-2] != ROUTER]


def _has_router(tensors: dict[str, Tensor], block: str) -> bool:
    return any(f".{block}.{ROUTER}.lora_" in key for key in tensors)


def _rank(config: LoraConfig, name: str) -> int:
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), f"experts.{name}"), config.r)


def _move_rank(config: LoraConfig, old: list[str], new: list[str], factor: float) -> None:
    """Carry layers' rank over to their new names, times `factor`, and alpha such that the scaling stays the same."""
    rank = int(_rank(config, old[0]) * factor)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), f"experts.{old[0]}"), config.lora_alpha)
    alpha *= factor ** (0.5 if config.use_rslora else 1)  # the scaling is alpha / r, or alpha / √r
    for pattern, value, usual in ((config.rank_pattern, rank, config.r), (config.alpha_pattern, alpha, config.lora_alpha)):
        for name in old:
            pattern.pop(get_pattern_key(list(pattern), f"experts.{name}"), None)
        if value != usual:
            pattern.update(dict.fromkeys(new, value))


def _unstack(pair: dict[str, Tensor], r: int) -> list[Pair]:
    """PEFT's flattened factors of a stack → (A, B) of every expert."""
    a, b = pair["A"], pair["B"]
    if a.shape[0] % r or a.shape[0] != b.shape[1]:
        raise ValueError(f"factors {tuple(a.shape)} and {tuple(b.shape)} are not those of experts with rank {r}")
    experts = a.shape[0] // r
    return list(zip(a.view(experts, r, -1), b.view(-1, r, experts).unbind(2), strict=True))


def _stack(experts: list[Pair]) -> Pair:
    """(A, B) of every expert → PEFT's flattened factors: A expert after expert, B with the expert number changing fastest."""
    return torch.cat([a for a, _ in experts]), torch.stack([b for _, b in experts], 2).flatten(1)


def _is_block_diagonal(b: Tensor) -> bool:
    """Whether gate and up use different halves of the rank: what `from_per_expert` makes of two separate adapters."""
    inner, r = b.shape[0] // 2, b.shape[1] // 2
    odd = b.shape[1] % 2
    return not odd and bool(b.any()) and not b[:inner, r:].any() and not b[inner:, :r].any()


def _put(tensors: dict[str, Tensor], name: str, pair: Pair) -> None:
    for factor, value in zip("AB", pair, strict=True):
        tensors[f"{name}.lora_{factor}.weight"] = value.contiguous()


def _write(config: LoraConfig, tensors: dict[str, Tensor], out: str | Path, dropout: float) -> Path:
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # cloned: safetensors refuses tensors that share memory, as the common A of gate and up does
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, partial / WEIGHTS, metadata={"format": "pt"})
    write_json(partial / DROPOUT_FILE, {"lora_dropout": dropout})
    config.save_pretrained(str(partial))
    out.mkdir(exist_ok=True)
    (out / CONFIG_NAME).unlink(missing_ok=True)  # without it, nobody takes new weights for old ones
    for file in sorted(partial.iterdir(), key=lambda p: p.name == CONFIG_NAME):
        file.replace(out / file.name)
    partial.rmdir()
    return out
