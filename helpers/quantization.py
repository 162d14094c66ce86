"""Loading a Mixture-of-Experts model so that its experts really are 4-bit, and the audit that proves it.

Stock `load_in_4bit=True` swaps `nn.Linear` modules. transformers 5 keeps experts as 3-D parameters, so 96.6 % of Mixtral
stays in bf16, without a warning (bitsandbytes issue #1849). Here a quantizer of its own name, "nf4_moe", is registered with
transformers' quantizer registry: each expert stack becomes one `Params4bit` as soon as it is complete in memory, so the
peak is the 4-bit model plus one stack. It saves to safetensors and reloads bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from helpers import checkpoints, experts, nf4

METHOD = "nf4_moe"
NO_EXPERTS = "no experts found: this is not a Mixture-of-Experts model behind transformers' experts interface"
NO_ROUTER = (
    f"transformers {transformers.__version__} does not say which of its modules are routers, so they cannot be kept out of the "
    "quantisation; a newer version may"
)


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
    """Linear weights as in stock transformers; expert stacks, unless `_MergeExperts` has packed them already."""

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        result = {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            if experts.is_experts(module):
                value = value[0] if isinstance(value, list) else value
                config = self.hf_quantizer.quantization_config
                packed = isinstance(value, Params4bit)
                result[name] = value if packed else nf4.quantize_stack(value, config.bnb_4bit_use_double_quant)
                module._is_hf_initialized = True
            else:
                result |= super().convert({name: value}, model=model, full_layer_name=full_layer_name, **kwargs)
        return result


class _MergeExperts(ConversionOps):
    """The matrices of single experts (E × w1 and w3, or E × w2), packed one expert at a time.

    Takes the place of transformers' stacking and concatenating, which holds a layer's experts three times over. What was
    packed is let go at once, so the peak is one stack.
    """

    REPLACES = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])  # with the dimension they work on

    def __init__(self, double_quant: bool):
        self.double_quant = double_quant

    def convert(self, input_dict, source_patterns, target_patterns, model=None, full_layer_name=None, **kwargs):
        lists = [input_dict.pop(pattern) for pattern in source_patterns]  # one list a projection, in order: gate, up
        shape = model.get_parameter_or_buffer(full_layer_name).shape

        def matrices() -> Iterator[torch.Tensor]:
            for e in range(len(lists[0])):
                parts = [tensors[e] for tensors in lists]
                for tensors in lists:
                    tensors[e] = None
                yield parts[0] if len(parts) == 1 else torch.cat(parts)

        return {target_patterns[0]: nf4.pack(matrices(), shape, self.double_quant)}


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

    @staticmethod
    def get_modules_to_not_convert(model, skip_modules=None, keep_in_fp32_modules=None, add_default_skips=False):
        names = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, skip_modules, keep_in_fp32_modules, add_default_skips)
        # routers are ordinary linear layers in some families (Jamba, HunYuan, AFMoE, ...)
        routers = {id(m) for m in router_modules(model)}
        return names + _kept(model) + [name for name, module in model.named_modules() if id(module) in routers]

    def _process_model_before_weight_loading(self, model, device_map, **kwargs):
        stacks = {name: module for name, module in model.named_modules() if experts.is_experts(module)}
        if not stacks:
            raise ValueError(f"{type(model).__name__} cannot be loaded here: {NO_EXPERTS}")
        for name, module in stacks.items():
            if reason := experts.unsupported(module):
                raise ValueError(f"{type(model).__name__} cannot be loaded in 4 bit: {reason} ({name})")
            module.register_state_dict_post_hook(_write_stacks)
        if not router_modules(model):
            raise ValueError(f"{type(model).__name__} cannot be loaded in 4 bit: {NO_ROUTER}")
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        model.set_experts_implementation(experts.NAME)

    def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        if experts.is_experts(module):
            return leaf in experts.STACKS
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self):
        return _QuantizeStacks(self)

    def update_weight_conversions(self, weight_conversions, *model):  # transformers 5.15 does not pass the model
        """Converters that stack one matrix per expert pack it instead. Other layouts (transposed, split) stay as they are."""
        for converter in weight_conversions:
            steps = [(type(op), getattr(op, "dim", None)) for op in getattr(converter, "operations", [])]
            stack = any(converter.target_patterns[0].endswith(f"experts.{name}") for name in experts.STACKS)
            if stack and not self.pre_quantized and steps in _MergeExperts.REPLACES:
                converter.operations = [_MergeExperts(self.quantization_config.bnb_4bit_use_double_quant)]
        return super().update_weight_conversions(weight_conversions, *model)

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
    path_or_id: str | Path, dtype: torch.dtype | str | None = None, double_quant: bool = True, **kwargs
) -> PreTrainedModel:
    """A causal language model with attention and every expert in NF4, its router not; audited before it is returned.

    Loads ordinary checkpoints (quantising while they stream in) and those written by `save_4bit`. `dtype` is the dtype of
    the unquantised parts and of the products: bfloat16 unless it is given, and for a saved 4-bit model the one it was made with.
    Further arguments go to `from_pretrained`. Peak memory: the 4-bit model and about one expert stack in `dtype`.

    Before anything is read, the headers are checked: OSError for a missing or cut-off shard, ValueError for a missing tensor
    or a wrong shape, for a layout that cannot be computed in 4 bit, and for a model without experts. Raises RuntimeError when
    the audit finds experts that are not 4-bit.
    """
    hub = {k: v for k, v in kwargs.items() if k in checkpoints.HUB_OPTIONS}
    checkpoints.check_place(path_or_id)
    config = AutoConfig.from_pretrained(path_or_id, **hub)
    saved = getattr(config, "quantization_config", None)
    saved = saved if saved is None or isinstance(saved, dict) else saved.to_dict()
    stored = checkpoints.read_headers(path_or_id, **hub)
    made_with = None if saved is None else _as_dtype(saved.get("bnb_4bit_compute_dtype"))
    dtype = _as_dtype(dtype) or made_with or torch.bfloat16
    if saved is None:
        kwargs["quantization_config"] = Nf4MoeConfig(dtype, double_quant)
        checkpoints.check_fits(stored, config)
    elif saved.get("quant_method") != METHOD:
        raise ValueError(f"{path_or_id} is already quantised with another method: load the unquantised model instead")
    else:
        checkpoints.check_packed(stored, config)
    model = AutoModelForCausalLM.from_pretrained(path_or_id, dtype=dtype, use_safetensors=True, **kwargs)
    for param in model.parameters() if saved is not None else ():
        if param.dtype == made_with:  # of a quantised model, transformers leaves the others as they were saved
            param.data = param.data.to(dtype)
    return _finish(model, dtype)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch's dtype of a name; None for none and for "auto"."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if dtype in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{dtype!r} is no dtype to compute in: say 'bfloat16', 'float16' or 'float32'")
    return found


def _finish(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model.set_experts_implementation(experts.NAME)
    model.config.quantization_config.bnb_4bit_compute_dtype = dtype  # of a saved model it may have been another
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            # On CPUs with AVX512-BF16 bitsandbytes would repack the weights, in place, at the first forward pass in eval mode.
            # What reads them afterwards (training, merging, saving) would take them for what they were.
            module.support_avx512bf16_for_cpu = False
    for param in model.parameters():
        if isinstance(param, Params4bit) and param.quant_state is not None:
            param.quant_state.dtype = dtype
    audit(model).check()
    return model


def save_4bit(model: PreTrainedModel, folder: str | Path, max_shard_size: str | int = "5GB") -> None:
    """Write a loaded 4-bit model (not its adapters) as safetensors; `load_4bit(folder)` gives the same bits."""
    # The original format has one tensor an expert; a packed stack cannot be taken apart into those.
    model.save_pretrained(folder, save_original_format=False, max_shard_size=max_shard_size)


def empty_4bit(config: PreTrainedConfig, dtype: torch.dtype, double_quant: bool = True) -> tuple[PreTrainedModel, HfQuantizer]:
    """The model on the meta device, prepared for 4-bit weights that it does not have yet, and the quantizer that knows which."""
    quantizer = Nf4MoeQuantizer(Nf4MoeConfig(dtype, double_quant), pre_quantized=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantizer.preprocess_model(model, device_map=None)
    return model, quantizer


@torch.no_grad()
def random_4bit(
    config: PreTrainedConfig,
    dtype: torch.dtype | str = "bfloat16",
    seed: int = 0,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A model of this configuration with random weights, made in 4 bit: what `load_4bit` would give for an untrained one.

    For benchmarks, and for learners without the weights: no unquantised expert or linear layer ever exists, so Mixtral-8x7B
    takes its 23 GiB and not 90. What stays unquantised (embeddings, norms, routers, head) is drawn by the model's own rules.
    On the device "meta" it takes nothing, and has shapes only (`rehearsal`).
    """
    device = torch.device(device)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model, quantizer = empty_4bit(config, dtype, double_quant)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    std = getattr(config.get_text_config(), "initializer_range", 0.02)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for name, param in list(model.named_parameters()):
            module, leaf = get_module_from_name(model, name)
            if quantizer.param_needs_quantization(model, name):
                value = nf4.random_packed(param.shape, std, dtype, generator, double_quant, device)
                if isinstance(module, Linear4bit):
                    value.module, module.quant_state = module, value.quant_state
                value._is_hf_initialized = True  # transformers' initialisation leaves it alone
            else:
                value = nn.Parameter(torch.empty_like(param, device=device), requires_grad=param.requires_grad)
            setattr(module, leaf, value)
        for name, buffer in list(model.named_buffers()):
            module, leaf = get_module_from_name(model, name)
            module.register_buffer(leaf, torch.empty_like(buffer, device=device), leaf not in module._non_persistent_buffers_set)
        model.init_weights()  # draws the rest, fills the buffers and ties embeddings
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return _finish(model.eval(), dtype)


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
        return "\n".join([*lines, *(f"PROBLEM: {p}" for p in self.problems)])


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
    expert_params = {id(p) for m in model.modules() if experts.is_experts(m) for p in m.parameters()}
    kept = tuple(_kept(model))
    linears = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if type(m) is nn.Linear}
    linear_params = {id(m.weight) for n, m in linears.items() if not n.endswith(kept)}
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
    return Audit({p: parts[p] for p in PARTS if p in parts}, tuple(problems))


def _kept(model: nn.Module) -> list[str]:
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
