"""What a model is made of: bytes and dtypes by part, and what deviates from "experts and attention in 4 bit, the router not"."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import transformers
from bitsandbytes.nn import Params4bit
from torch import nn

from helpers.experts import is_experts

LEAST_BYTES, LEAST_SHARE = 2**26, 0.02  # of what stays in 16 bit: worth a note
NO_EXPERTS = "no experts found: this is not a Mixture-of-Experts model behind transformers' experts interface"
NO_ROUTER = (
    f"transformers {transformers.__version__} does not say which of its modules are routers, so they cannot be kept out of the "
    "quantisation; a newer version may"
)


@dataclass
class Part:
    """Totals of one part of a model."""

    weights: int = 0  # logical numbers, not packed bytes
    bytes: int = 0  # storage, with quantisation scales
    four_bit: int = 0  # weights that are NF4
    dtypes: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Audit:
    """What is and what is not 4-bit. `ok` is False when a part deviates from the recipe; `problems` says how."""

    parts: dict[str, Part]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what stays in 16 bit for want of a way to pack it, if it is much

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row a part and a total: part, weights, share in 4 bit, bits per weight, MiB, dtypes."""
        total = Part()
        rows = []
        for name, part in [*self.parts.items(), ("all", total)]:
            if part is not total:
                total.weights, total.bytes = total.weights + part.weights, total.bytes + part.bytes
                total.four_bit, total.dtypes = total.four_bit + part.four_bit, total.dtypes | part.dtypes
            rows.append(
                {
                    "part": name,
                    "weights": part.weights,
                    "4-bit": part.four_bit / max(1, part.weights),
                    "bits/weight": 8 * part.bytes / max(1, part.weights),
                    "MiB": part.bytes / 2**20,
                    "dtypes": ", ".join(sorted(part.dtypes)),
                }
            )
        return rows

    def check(self) -> Audit:
        if not self.ok:
            raise RuntimeError("4-bit audit failed: " + "; ".join(self.problems) + f"\n{self}")
        return self

    def __str__(self) -> str:
        lines = [f"{'part':<12}{'weights':>14}{'in 4 bit':>10}{'bits/weight':>13}{'MiB':>11}  dtypes"]
        for r in self.table:
            lines.append(
                f"{r['part']:<12}{r['weights']:>14,}{r['4-bit']:>10.1%}{r['bits/weight']:>13.3f}{r['MiB']:>11.2f}  {r['dtypes']}"
            )
        return "\n".join([*lines, *(f"PROBLEM: {p}" for p in self.problems), *(f"NOTE: {n}" for n in self.notes)])


PARTS = ("experts", "attention", "router", "other linear", "norms", "embeddings", "head", "adapters")


def router_recorders(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """(router, place of its logits in its output): the library's own answer to 'what routes here?'"""
    for module in model.modules():
        spec = getattr(type(module), "_can_record_outputs", None)
        if isinstance(spec, dict) and "router_logits" in spec:
            recorders = spec["router_logits"] if isinstance(spec["router_logits"], list) else [spec["router_logits"]]
            places = {getattr(r, "target_class", r): getattr(r, "index", 0) for r in recorders}
            found = {m: place for m in model.modules() for target, place in places.items() if isinstance(m, target)}
            # JetMoE's attention reports once more what the router inside of it reports.
            doubled = {m for m in found if any(inner in found for inner in m.modules() if inner is not m)}
            return [(m, place) for m, place in found.items() if m not in doubled]
    return []


def router_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose logits transformers records as `router_logits`."""
    return [router for router, _ in router_recorders(model)]


def audit(model: nn.Module) -> Audit:
    """Bytes and dtypes by part, and every deviation from: experts and attention 4-bit, router not."""
    parts: dict[str, Part] = defaultdict(Part)
    problems = []
    router_params = {id(p) for m in router_modules(model) for p in m.parameters()}
    expert_params = {id(p) for m in model.modules() if is_experts(m) for p in m.parameters()}
    kept = tuple(kept_layers(model))
    linears = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if type(m) is nn.Linear}
    linear_params = {id(m.weight) for n, m in linears.items() if not n.endswith(kept)}
    seen: set[int] = set()
    loose: dict[str, int] = defaultdict(int)
    unpacked: list[tuple[int, str]] = []
    for name, param in model.named_parameters():
        if id(param) in seen:
            continue
        seen.add(id(param))
        part = _part_of(name, param, router_params, expert_params)
        packed = isinstance(param, Params4bit) and param.quant_state is not None
        weights = param.quant_state.shape.numel() if packed else param.numel()
        entry = parts[part]
        entry.weights += weights
        entry.bytes += param.numel() * param.element_size() + (_state_bytes(param.quant_state) if packed else 0)
        entry.four_bit += weights if packed else 0
        kind = param.quant_state.quant_type if packed else str(param.dtype)[6:]
        entry.dtypes.add(kind + ("+double quant" if packed and param.quant_state.nested else ""))
        if packed and kind != "nf4":
            problems.append(f"{name} is {kind}, not nf4")
        if packed and not _finite_scales(param.quant_state):
            problems.append(f"{name} has scales that are not finite")
        if part in ("attention", "other linear") and not packed and param.ndim >= 2:
            unpacked.append((param.nbytes, name))
        # What attention has beside linear layers (short convolutions, position tables) is shown but cannot be quantised.
        wanted = (part == "experts" and param.ndim >= 2) or (part == "attention" and id(param) in linear_params)
        if wanted and not packed:
            loose[part] += weights
        if part == "router" and packed:
            problems.append(f"the router is 4-bit ({name}); its argmax decides which expert runs, so keep it unquantised")
    for part, weights in loose.items():
        problems.append(f"{weights:,} of {parts[part].weights:,} weights of {part} are not 4-bit")
    if "experts" not in parts:
        problems.append(NO_EXPERTS)
    elif not router_params:
        problems.append(NO_ROUTER)
    notes = []
    held, left = sum(part.bytes for part in parts.values()), sum(size for size, _ in unpacked)
    if not problems and left > max(LEAST_BYTES, LEAST_SHARE * held):
        names = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for _, name in unpacked})[:4])
        notes.append(f"{left / 2**30:.2f} GiB ({left / held:.0%} of the model) are matrices that cannot be packed here: {names}")
    return Audit({p: parts[p] for p in PARTS if p in parts}, tuple(problems), tuple(notes))


def _finite_scales(state) -> bool:
    scales = (state.state2.absmax, state.offset) if state.nested else (state.absmax,)
    return all(t.is_meta or bool(t.isfinite().all()) for t in scales)


def kept_layers(model: nn.Module) -> list[str]:
    """Endings of names of linear layers that must not be packed, by the architecture's own word or because it would break."""
    kept = {f".{name}" for which in ("", "_strict") for name in getattr(model, f"_keep_in_fp32_modules{which}", None) or ()}
    # DeepSeek-like indexers cast their input to this weight's dtype. Of a packed weight that is uint8: the numbers would be
    # rounded to whole ones, without an error.
    return sorted(kept | {".indexer.weights_proj"})


def _part_of(name: str, param: nn.Parameter, router_params: set[int], expert_params: set[int]) -> str:
    words = name.split(".")
    if any(w.startswith("lora_") for w in words):
        return "adapters"
    if id(param) in router_params:
        return "router"
    if id(param) in expert_params or "experts" in words:
        return "experts"
    if "lm_head" in words:
        return "head"
    if any("embed" in w for w in words):
        return "embeddings"
    if any("norm" in w for w in words):
        return "norms"
    return "attention" if any("attn" in w or "attention" in w for w in words) else "other linear"


def _state_bytes(state) -> int:
    """Bytes of a quantisation state: scales, their second-level scales and code books."""
    tensors = [state.absmax, state.code, state.offset]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
