"""Loading a Mixture-of-Experts model so that its experts really are 4-bit, and the audit that proves it.

Stock `load_in_4bit=True` swaps `nn.Linear` modules. transformers 5 keeps experts as 3-D parameters, so 96.6 % of Mixtral
stays in bf16, without a warning (bitsandbytes issue #1849). Here a quantizer of its own name, "nf4_moe", is registered with
transformers' quantizer registry: each expert stack becomes one `Params4bit` as soon as it is complete in memory, so the
peak is the 4-bit model plus one stack. It saves to safetensors and reloads bit for bit.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from helpers import checkpoints, experts, nf4
from helpers.audit import NO_EXPERTS, NO_ROUTER, audit, kept_layers, router_modules

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

        return {target_patterns[0]: nf4.quantize_matrices(matrices(), shape, self.double_quant)}


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
        return names + kept_layers(model) + [name for name, module in model.named_modules() if id(module) in routers]

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
    Further arguments go to `from_pretrained`; how to quantise is not among them. Peak memory: the 4-bit model and about one
    expert stack in `dtype`.

    Before anything is read, the headers are checked: OSError for a missing or cut-off shard, ValueError for a missing tensor
    or a wrong shape or dtype, for a layout that cannot be computed in 4 bit, and for a model without experts. Raises RuntimeError
    when the audit finds experts that are not 4-bit; a warning names what else is large and stays in 16 bit.
    """
    dtype = kwargs.pop("torch_dtype", dtype)
    if unwanted := {"quantization_config", "load_in_4bit", "load_in_8bit"} & set(kwargs):
        raise ValueError(f"{unwanted.pop()}: load_4bit always quantises to NF4; double_quant and dtype are what can be chosen")
    if kwargs.pop("use_safetensors", True) is not True:
        raise ValueError("use_safetensors=False: load_4bit reads safetensors only")
    hub = {k: v for k, v in kwargs.items() if k in checkpoints.HUB_OPTIONS}
    checkpoints.check_place(path_or_id, kwargs.get("subfolder", ""))
    config = AutoConfig.from_pretrained(path_or_id, **hub)
    saved = getattr(config, "quantization_config", None)
    saved = saved if saved is None or isinstance(saved, dict) else saved.to_dict()
    stored = checkpoints.read_headers(path_or_id, **hub)
    made_with = None if saved is None else as_dtype(saved.get("bnb_4bit_compute_dtype"))
    dtype = as_dtype(dtype) or made_with or torch.bfloat16
    if saved is None:
        kwargs["quantization_config"] = Nf4MoeConfig(dtype, double_quant)
        checkpoints.check_fits(stored, config)
    elif saved.get("quant_method") != METHOD:
        raise ValueError(f"{path_or_id} is already quantised with another method: load the unquantised model instead")
    else:
        checkpoints.check_packed(stored, config)
    try:
        model = AutoModelForCausalLM.from_pretrained(path_or_id, dtype=dtype, use_safetensors=True, **kwargs)
    except RuntimeError as error:  # transformers tells what happened to a tensor only in its log
        if bad := checkpoints.not_finite(stored):
            raise ValueError(f"{bad} holds numbers that are not finite, so it cannot be quantised: fetch it again") from error
        raise
    for param in model.parameters() if saved is not None else ():
        if param.dtype == made_with:  # of a quantised model, transformers leaves the others as they were saved
            param.data = param.data.to(dtype)
    return _finish(model, dtype)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch's dtype of a name; None for none and for "auto". ValueError for what is no floating-point dtype."""
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
    for note in audit(model).check().notes:
        warnings.warn(note, stacklevel=3)
    return model


def save_4bit(model: PreTrainedModel, folder: str | Path, max_shard_size: str | int = "5GB") -> None:
    """Write a loaded 4-bit model as safetensors; `load_4bit(folder)` gives the same bits.

    Only when all is written, it gets its name. FileExistsError for a folder that holds something: of two models in one, the
    loader may take either. ValueError for a model with adapters, whose weights have other names.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: write the model into another folder")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("this model has adapters: save those with qlora.save_lora, and a base that was loaded without any")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interruption
    # The original format has one tensor an expert; a packed stack cannot be taken apart into those.
    model.save_pretrained(partial, save_original_format=False, max_shard_size=max_shard_size)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


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
    dtype = as_dtype(dtype)
    model, quantizer = empty_4bit(config, dtype, double_quant)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    std = getattr(config.get_text_config(), "initializer_range", 0.02)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        saved = set(model.state_dict())
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
            module.register_buffer(leaf, torch.empty_like(buffer, device=device), persistent=name in saved)
        model.init_weights()  # draws the rest, fills the buffers and ties embeddings
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return _finish(model.eval(), dtype)
