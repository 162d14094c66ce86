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
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.files import write_json
from helpers.qlora import DROPOUT_FILE


class Naming(NamedTuple):
    """How a family's checkpoints called the layers of a MoE block before its experts were stacked."""

    block: str  # the MoE block; `mlp` in transformers 5
    gate: str
    up: str
    down: str
    router_now: str = "gate"  # in transformers 5; in the checkpoints of all of these it is `gate`


_MIXTRAL = Naming("block_sparse_moe", "w1", "w3", "w2")
_QWEN = Naming("mlp", "gate_proj", "up_proj", "down_proj")
# By transformers' model types. Others have further names of their own (Laguna's shared experts, HY's routers, Jamba's blocks).
NAMINGS = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    "phimoe": _MIXTRAL._replace(router_now="router"),
    **dict.fromkeys(("olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"), _QWEN),
}
Pair = tuple[Tensor, Tensor]  # A (r, in), B (out, r) of one expert's layer
Scaling = tuple[int, float]  # rank and alpha
BLOCK, ROUTER = "mlp", "gate"  # the MoE block in transformers 5, and the router in 4, a linear layer
PREFIX = "base_model.model."
_STACKED = re.compile(rf"(.*\.)({BLOCK})\.experts\.(base_layer\.)?lora_([AB])\.weight")
_SINGLE = re.compile(r"(.*\.)(\w+)\.experts\.(\d+)\.(\w+)\.lora_([AB])\.weight")


def naming(kind: str) -> Naming:
    """Of a model type; ValueError for one whose names are not known here."""
    if kind not in NAMINGS:
        raise ValueError(
            f"how a {kind}'s experts were called before they were stacked is not known here, but of: {', '.join(NAMINGS)}"
        )
    return NAMINGS[kind]


def is_per_expert(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an adapter in the naming of transformers 4."""
    return any(_SINGLE.fullmatch(name) for name in names)


def to_per_expert(folder: str | Path, out: str | Path, kind: str) -> Path:
    """Write a saved adapter (`qlora.save_lora`, stock PEFT) in the naming of transformers 4; returns `out`.

    `kind` is the model type, one of `NAMINGS`. The product B·A of every expert is the same, bit for bit, and so is its scaling.
    The training dropout stays beside the files (see `qlora.save_lora`). Raises ValueError for an adapter without expert stacks.
    """
    names, config = naming(kind), _config(folder)
    tensors, stacks, scalings = {}, defaultdict(dict), {}
    for key, value in load_file(Path(folder) / WEIGHTS).items():
        if match := _STACKED.fullmatch(key):
            stacks[match[1], "gate_up_proj" if match[3] else "down_proj"][match[4]] = value
            continue
        new = key.replace(f".{BLOCK}.", f".{names.block}.") if ".experts." not in key else key
        new = new.replace(f".{names.block}.{names.router_now}.lora_", f".{names.block}.{ROUTER}.lora_")
        tensors[new] = value
        if ".lora_A." in key:
            scalings[_layer(new)] = _scaling(config, _target(config, _layer(key)))
    if not stacks:
        other = any(".experts." in key and ".lora_" in key for key in tensors)
        what = f"its expert stacks are not in a block called {BLOCK}" if other else "it holds no adapter on expert stacks"
        raise ValueError(f"{folder}: {what}, so there is nothing to convert")
    targets = {t.rpartition(".")[2] for t in config.target_parameters or ()}
    if "gate_up_proj" in targets and "down_proj" not in targets:  # the only wrapper, so also the outer one
        stacks = {(prefix, "gate_up_proj"): pair for (prefix, _), pair in stacks.items()}
    known = {key: _scaling(config, f"{key[0]}{BLOCK}.experts.{key[1]}".removeprefix(PREFIX)) for key in stacks}
    split = {key: _unstack(pair, known[key][0]) for key, pair in stacks.items()}
    if len(counts := {len(experts) for experts in split.values()}) > 1:
        raise ValueError(f"{folder}: by their ranks its stacks have {sorted(counts)} experts; is its rank_pattern right?")
    halves = all(_is_block_diagonal(b) for (_, stack), pairs in split.items() if stack == "gate_up_proj" for _, b in pairs)
    for (prefix, stack), experts in split.items():
        scaling = known[prefix, stack]
        if halves and stack == "gate_up_proj":
            scaling = _with_rank(config, scaling, scaling[0] // 2)
        for e, (a, b) in enumerate(experts):
            layers = {names.down: (a, b)}
            if stack == "gate_up_proj":
                r, inner = a.shape[0] // 2, b.shape[0] // 2
                gate = (a[:r], b[:inner, :r]) if halves else (a, b[:inner])
                up = (a[r:], b[inner:, r:]) if halves else (a, b[inner:])
                layers = {names.gate: gate, names.up: up}
            for layer, pair in layers.items():
                name = f"{prefix}{names.block}.experts.{e}.{layer}"
                _put(tensors, name, pair)
                scalings[name.removeprefix(PREFIX)] = scaling
    adapted = {stack for _, stack in split}
    modules = {*(config.target_modules or ()), *([names.down] if "down_proj" in adapted else [])}
    modules |= {names.gate, names.up} if "gate_up_proj" in adapted else set()
    modules |= {ROUTER} if _has_router(tensors, names.block, ROUTER) else set()
    modules |= {target.removesuffix(".weight").rpartition(".")[2] for target in _linear_parameters(config, names.router_now)}
    config.target_modules, config.target_parameters = sorted(modules), None
    _set_patterns(config, scalings)
    return _write(config, tensors, out, _dropout(folder, config))


def from_per_expert(folder: str | Path, out: str | Path, kind: str | None = None) -> Path:
    """Write an adapter in the naming of transformers 4 as stock PEFT has it on transformers 5.

    `kind`: the model type, one of `NAMINGS`; it is only needed where a router has another name now (PhiMoE's). Exact: see the
    module's text. The training dropout is kept beside the files, for `qlora.load_lora(..., trainable=True)`. Raises ValueError
    if experts are missing, gate without up, or if what becomes one stack has several ranks or alphas.
    """
    config = _config(folder)
    tensors, found = {}, defaultdict(dict)
    for key, value in load_file(Path(folder) / WEIGHTS).items():
        if match := _SINGLE.fullmatch(key):
            prefix, _, expert, layer, factor = match.groups()
            found[prefix, layer].setdefault(int(expert), {})[factor] = value
        else:
            tensors[key] = value
    candidates = (_MIXTRAL, _QWEN) if kind is None else (naming(kind),)
    names = next((n for n in candidates if {layer for _, layer in found} <= {n.gate, n.up, n.down}), None)
    if not found or names is None:
        raise ValueError(f"{folder} holds no adapter on single experts in a known naming ({', '.join(NAMINGS)})")
    count = 1 + max(e for experts in found.values() for e in experts)
    layers: dict[tuple[str, str], list[Pair]] = {}
    of_stack: dict[str, set[Scaling]] = defaultdict(set)  # by the name of the stack
    for (prefix, layer), experts in found.items():
        if lacking := [e for e in range(count) if set(experts.get(e, ())) != {"A", "B"}]:
            raise ValueError(f"{folder}: {prefix}{names.block}.experts has no {layer} adapter for experts {lacking}")
        layers[prefix, layer] = [(experts[e]["A"], experts[e]["B"]) for e in range(count)]
        stack = f"{prefix}{BLOCK}.experts.{'down_proj' if layer == names.down else 'gate_up_proj'}".removeprefix(PREFIX)
        for e, (a, _) in enumerate(layers[prefix, layer]):
            scaling = _scaling(config, f"{prefix}{names.block}.experts.{e}.{layer}".removeprefix(PREFIX))
            if a.shape[0] != scaling[0]:
                raise ValueError(f"{folder}: {layer} has rank {a.shape[0]}, its configuration says {scaling[0]}")
            of_stack[stack].add(scaling)
    for stack, several in of_stack.items():
        if len(several) > 1:
            texts = ", ".join(f"rank {rank} and alpha {alpha}" for rank, alpha in sorted(several))
            raise ValueError(f"{folder}: the experts that become {stack} have different scalings ({texts}); a stack has one")
    prefixes = sorted({prefix for prefix, layer in layers if layer in (names.gate, names.up)})
    if any((prefix, layer) not in layers for prefix in prefixes for layer in (names.gate, names.up)):
        raise ValueError(f"{folder}: gate and up are one matrix in transformers 5, so both need an adapter or neither")
    pairs = {prefix: list(zip(layers[prefix, names.gate], layers[prefix, names.up], strict=True)) for prefix in prefixes}
    shared = all(torch.equal(gate[0], up[0]) for experts in pairs.values() for gate, up in experts)
    scalings = {stack: next(iter(one)) for stack, one in of_stack.items()}
    if not shared:
        for stack in (s for s in scalings if s.endswith("gate_up_proj")):
            scalings[stack] = _with_rank(config, scalings[stack], 2 * scalings[stack][0])
    renamed = {}
    for key in tensors:
        new = key.replace(f".{names.block}.", f".{BLOCK}.")
        renamed[key] = new.replace(f".{BLOCK}.{ROUTER}.lora_", f".{BLOCK}.{names.router_now}.lora_")
    old_scalings = {renamed[key]: _scaling(config, _target(config, _layer(key))) for key in tensors if ".lora_A." in key}
    tensors = {renamed[key]: value for key, value in tensors.items()}
    downs = {prefix: experts for (prefix, layer), experts in layers.items() if layer == names.down}
    parameters = [f"{BLOCK}.experts.gate_up_proj"] * bool(pairs) + [f"{BLOCK}.experts.down_proj"] * bool(downs)
    gone = {names.gate, names.up, names.down}
    router = f"{BLOCK}.{names.router_now}"
    if _has_router(tensors, BLOCK, names.router_now):
        parameters.append(f"{router}.weight")
        gone.add(ROUTER)
    # adapters left on layers of the same names: shared experts and dense layers (the path begins after the layer's number)
    modules = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key and ".experts." not in key}
    others = {m for m in modules if m.rpartition(".")[2] in gone and not m.endswith(f".{router}")}
    parameters += sorted({re.sub(r"^(.*\.\d+|base_model\.model)\.", "", m) + ".weight" for m in others})
    for prefix, experts in pairs.items():
        if shared:
            joined = [(gate[0], torch.cat([gate[1], up[1]])) for gate, up in experts]
        else:
            joined = [(torch.cat([gate[0], up[0]]), torch.block_diag(gate[1], up[1])) for gate, up in experts]
        inner = "base_layer." if downs else ""  # PEFT nests wrappers: the first parameter's is the inner one
        _put(tensors, f"{prefix}{BLOCK}.experts.{inner}".rstrip("."), _stack(joined))
    for prefix, experts in downs.items():
        _put(tensors, f"{prefix}{BLOCK}.experts", _stack(experts))
    dropout = _dropout(folder, config)
    config.target_modules = sorted(m for m in config.target_modules or () if m.rpartition(".")[2] not in gone)
    config.target_parameters = parameters
    config.lora_dropout = 0.0  # stock PEFT refuses dropout on parameters
    scalings |= {_target(config, _layer(key)): scaling for key, scaling in old_scalings.items()}
    _set_patterns(config, scalings)
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


def _linear_parameters(config: LoraConfig, router: str) -> list[str]:
    """Target parameters that are weights of linear layers, and not a router's or an expert stack's."""
    return [t for t in config.target_parameters or () if t.endswith(".weight") and t.split(".")[-2] != router]


def _has_router(tensors: dict[str, Tensor], block: str, router: str) -> bool:
    return any(f".{block}.{router}.lora_" in key for key in tensors)


def _layer(key: str) -> str:
    """The adapted layer's name in the base model."""
    return key.removeprefix(PREFIX).partition(".lora_")[0]


def _target(config: LoraConfig, layer: str) -> str:
    """The name by which PEFT looks up a layer's rank and alpha: its weight's, where that was named as a parameter."""
    weight = f"{layer}.weight"
    return weight if any(weight == t or weight.endswith(f".{t}") for t in config.target_parameters or ()) else layer


def _scaling(config: LoraConfig, name: str) -> Scaling:
    """Rank and alpha of a layer by PEFT's own rule."""
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    return rank, alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)


def _with_rank(config: LoraConfig, scaling: Scaling, rank: int) -> Scaling:
    """Another rank with the alpha that leaves alpha / r as it is, or alpha / √r for rank-stabilised LoRA."""
    alpha = round(scaling[1] * (rank / scaling[0]) ** (0.5 if config.use_rslora else 1), 9)  # so that √2 · 1/√2 is 1
    return rank, int(alpha) if alpha == int(alpha) else alpha


def _set_patterns(config: LoraConfig, scalings: dict[str, Scaling]) -> None:
    """Write down what differs from the adapter's own r and alpha: by the last part of the name where that is enough."""
    by_leaf = defaultdict(set)
    for name, scaling in scalings.items():
        by_leaf[name.rpartition(".")[2]].add(scaling)
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name, (rank, alpha) in sorted(scalings.items()):
        leaf = name.rpartition(".")[2]
        pattern = leaf if len(by_leaf[leaf]) == 1 else re.escape(name)
        if rank != config.r:
            config.rank_pattern[pattern] = rank
        if alpha != config.lora_alpha:
            config.alpha_pattern[pattern] = alpha


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
