"""Loading a Mixture-of-Experts model so that its experts really are 4-bit, and the audit that proves it.

Stock `load_in_4bit=True` swaps `nn.Linear` modules. transformers 5 keeps experts as 3-D parameters, so 96.6 % of Mixtral
stays in bf16, without a warning (bitsandbytes issue #1849). Here a quantizer of its own name, "nf4_moe", is registered with
transformers' quantizer registry: each expert stack becomes one `Params4bit` as soon as it is complete in memory, so the
peak is the 4-bit model plus one stack. It saves to safetensors and reloads bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from helpers import experts

METHOD = "nf4_moe"


@register_quantization_config(METHOD)
class Nf4MoeConfig(BitsAndBytesConfig):
    """The card's quantisation (NF4, double quantisation, blocks of 64), for linear layers and expert stacks alike."""

    def __init__(self, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_use_double_quant: bool = True, **kwargs: Any):
        for fixed in ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "quant_method"):
            kwargs.pop(fixed, None)
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=bnb_4bit_compute_dtype,
            bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
            **kwargs,
        )
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        # With "load_in_4bit" in a saved config, transformers would pick its own quantizer and read the experts as noise.
        return {k: v for k, v in super().to_dict().items() if not k.lstrip("_").startswith("load_in")}


class _QuantizeStacks(Bnb4bitQuantize):
    """Linear weights as in stock transformers, expert stacks whole."""

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        result = {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            if experts.is_experts(module):
                value = value[0] if isinstance(value, list) else value
                config = self.hf_quantizer.quantization_config
                result[name] = experts.quantize_stack(value, config.bnb_4bit_use_double_quant)
                module._is_hf_initialized = True
            else:
                result |= super().convert({name: value}, model=model, full_layer_name=full_layer_name, **kwargs)
        return result


class _ReadStacks(ConversionOps):
    """Packed stacks and their quantisation state, from a checkpoint that this module wrote."""

    def __init__(self, hf_quantizer: HfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, source_patterns=None, target_patterns=None, model=None, full_layer_name=None, **kwargs):
        tensors = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        packed = tensors.pop(source_patterns[0])
        module, _ = get_module_from_name(model, full_layer_name)
        weight = Params4bit.from_prequantized(packed, quantized_stats=tensors, requires_grad=False, device=packed.device)
        module._is_hf_initialized = True
        return {target_patterns[0]: weight}


@register_quantizer(METHOD)
class Nf4MoeQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer plus expert stacks."""

    _STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")

    def _process_model_before_weight_loading(self, model, device_map, **kwargs):
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        for name, module in model.named_modules():
            if experts.is_experts(module):
                if reason := experts.unsupported(module):
                    raise ValueError(f"{type(model).__name__} cannot be loaded in 4 bit: {reason} ({name})")
                module.register_state_dict_post_hook(_write_stacks)
        model.set_experts_implementation(experts.NAME)

    def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        if experts.is_experts(module):
            return leaf in experts.STACKS
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self):
        return _QuantizeStacks(self)

    def get_weight_conversions(self):
        conversions = super().get_weight_conversions()
        if self.pre_quantized:
            for stack in experts.STACKS:
                name = f"experts.{stack}"
                sources = [f"{name}$", *(f"{name}.{state}" for state in self._STATE)]
                conversions.insert(0, WeightConverter(sources, name, [_ReadStacks(self)]))
        return conversions


def _write_stacks(module: nn.Module, state_dict: dict, prefix: str, _metadata) -> None:
    """state_dict hook: a packed stack is nothing without its scales."""
    for stack in experts.STACKS:
        weight = getattr(module, stack, None)
        if isinstance(weight, Params4bit) and weight.quant_state is not None and prefix + stack in state_dict:
            for key, value in weight.quant_state.as_dict(packed=True).items():
                state_dict[f"{prefix}{stack}.{key}"] = value


# ---------------------------------------------------------------------------------------------------------- loading


def load_4bit(
    path_or_id: str | Path, dtype: torch.dtype | str = "bfloat16", double_quant: bool = True, **kwargs
) -> PreTrainedModel:
    """A causal language model with attention and every expert in NF4, its router not; audited before it is returned.

    Loads ordinary checkpoints (quantising while they stream in) and those written by `save_4bit`. `dtype` is the dtype of
    the unquantised parts and of the products; a saved 4-bit model keeps the one it was made with unless `dtype` is given.
    Further arguments go to `from_pretrained`. Raises RuntimeError when the audit finds experts that are not 4-bit.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config = AutoConfig.from_pretrained(path_or_id)
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        kwargs["quantization_config"] = Nf4MoeConfig(dtype, double_quant)
    elif (saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method) != METHOD:
        raise ValueError(f"{path_or_id} is already quantised with another method: load the unquantised model instead")
    model = AutoModelForCausalLM.from_pretrained(path_or_id, dtype=dtype, **kwargs)
    model.set_experts_implementation(experts.NAME)
    if dtype == torch.float32:
        for module in model.modules():
            if isinstance(module, Linear4bit):
                # On CPUs with AVX512-BF16 bitsandbytes would repack the weights in eval mode and multiply in bf16: not what
                # was asked for, and other numbers than on the next machine.
                module.support_avx512bf16_for_cpu = False
    audit(model).check()
    return model


def save_4bit(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a loaded 4-bit model (not its adapters) as safetensors; `load_4bit(folder)` gives the same bits."""
    # The original format has one tensor an expert; a packed stack cannot be taken apart into those.
    model.save_pretrained(folder, save_original_format=False)


# ------------------------------------------------------------------------------------------------------------ audit


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

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row a part and a total: part, weights, share in 4 bit, bits a weight, MiB, dtypes."""
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
                    "4-bit": part.four_bit / part.weights,
                    "bits/weight": 8 * part.bytes / part.weights,
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
        return "\n".join([*lines, *(f"PROBLEM: {p}" for p in self.problems)])


PARTS = ("experts", "attention", "router", "other linear", "norms", "embeddings", "head", "adapters")


def router_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose logits transformers records as `router_logits`: the library's own answer to 'what routes here?'"""
    for module in model.modules():
        spec = getattr(type(module), "_can_record_outputs", None)
        if isinstance(spec, dict) and "router_logits" in spec:
            recorder = spec["router_logits"]
            target = getattr(recorder, "target_class", recorder)
            return [m for m in model.modules() if isinstance(m, target)]
    return []


def audit(model: nn.Module) -> Audit:
    """Bytes and dtypes by part, and every deviation from: experts and attention 4-bit, router not."""
    parts: dict[str, Part] = defaultdict(Part)
    problems = []
    router_params = {id(p) for m in router_modules(model) for p in m.parameters()}
    expert_params = {id(p) for m in model.modules() if experts.is_experts(m) for p in m.parameters()}
    seen: set[int] = set()
    loose: dict[str, int] = defaultdict(int)
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
        entry.dtypes.add(
            "nf4" + ("+double quant" if packed and param.quant_state.nested else "") if packed else str(param.dtype)[6:]
        )
        if part in ("experts", "attention") and not packed and param.ndim >= 2:
            loose[part] += weights
        if part == "router" and packed:
            problems.append(f"the router is 4-bit ({name}); its argmax decides which expert runs, so keep it unquantised")
    for part, weights in loose.items():
        problems.append(f"{weights:,} of {parts[part].weights:,} weights of {part} are not 4-bit")
    if "experts" not in parts:
        problems.append("no experts found: this is not a Mixture-of-Experts model behind transformers' experts interface")
    return Audit({p: parts[p] for p in PARTS if p in parts}, tuple(problems))


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
