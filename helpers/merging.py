"""Adapters into the weights: in memory, shard by shard into a plain checkpoint, or back into 4 bits.

Sums are formed in fp32 and rounded once. A merged model needs no adapter, no PEFT and none of this package. In memory it takes 93
GB for Mixtral-8x7B; written shard by shard, never more than one shard: each parameter is dequantised, gets its adapter added,
goes into the current shard under the family's own names (transformers' conversion, run backwards), and is forgotten.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import bitsandbytes.functional as bnbf
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from helpers import experts, nf4
from helpers.qlora import ParamWrapper, plain_name
from helpers.quantization import as_dtype

INDEX = "model.safetensors.index.json"

Deltas = dict[str, list[experts.Factors]]


def _trained(model: PeftModel) -> tuple[Deltas, dict[str, nn.Module]]:
    """What the active adapters bring, under the names of the plain model.

    Returns the factors of each adapted parameter, with a leading expert dimension, and the trained copies of whole modules
    (PEFT's `modules_to_save`). ValueError if merging them would lose something, or add it twice.
    """
    deltas: Deltas = defaultdict(list)
    copies = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
            continue
        if module.disable_adapters:
            raise ValueError(f"{name}: its adapters are disabled, so there is nothing to merge: enable them first")
        if module.merged_adapters:
            raise ValueError(f"{name}: PEFT has merged {module.merged_adapters} into it already: load the model again")
        if isinstance(module, ModulesToSaveWrapper):
            copies |= {plain_name(name): module.modules_to_save[a] for a in module.active_adapters}
        elif isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                if any(adapter in getattr(module, kind) for kind in module.adapter_layer_names):
                    own = getattr(module, "parameter_name", "weight")
                    deltas[f"{plain_name(name)}.{own}"].append(_factors(name, module, adapter))
        else:
            raise ValueError(f"{name}: {type(module).__name__} cannot be merged here: train without it")
    if not deltas and not copies:
        raise ValueError("the model has no active adapter, so there is nothing to merge: call set_adapter first")
    return deltas, copies


def active_factors(model: PeftModel) -> list[experts.Factors]:
    """A (E, r, in) and B (E, out, r) of every adapter that is active, as views; E is 1 for a linear layer.

    ValueError for adapters that `merge` refuses.
    """
    return [factors for of_one in _trained(model)[0].values() for factors in of_one]


def _factors(name: str, module: LoraLayer, adapter: str) -> experts.Factors:
    kinds = {kind for kind in module.adapter_layer_names if adapter in getattr(module, kind)}
    if isinstance(module, StockParamWrapper) and not isinstance(module, ParamWrapper):
        raise ValueError(f"{name}: its adapter is one of stock PEFT: make it with helpers.qlora's add_lora or load_lora")
    if module.use_dora.get(adapter) or module.lora_bias.get(adapter) or adapter in module.lora_variant:
        raise ValueError(f"{name}: DoRA, adapter biases and other variants of LoRA cannot be merged here")
    base = module.get_base_layer()
    if kinds != {"lora_A", "lora_B"} or not (isinstance(module, ParamWrapper) or isinstance(base, nn.Linear)):
        raise ValueError(f"{name}: only LoRA on linear layers and on parameters can be merged here, not on {type(base).__name__}")
    if isinstance(module, ParamWrapper) and module._param_ndim == 3:
        return module.factors(adapter)
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return experts.Factors(a.unsqueeze(0), b.unsqueeze(0), scale=module.scaling[adapter])


def merge_plan(model: PeftModel, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, torch.Tensor], Deltas]:
    """(the plain model on the meta device, the tensor that now holds each of its values, what is to be added), by name.

    ValueError if something that the active adapters bring would have no place there. Takes no memory.
    """
    base, (deltas, copies) = model.get_base_model(), _trained(model)
    settings = base.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(type(base.config).from_dict(settings), dtype=dtype)
    sources = {}
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        if ".lora_" not in name and ".modules_to_save." not in name:
            sources[plain_name(name)] = tensor
    for place, module in copies.items():
        sources |= {f"{place}.{name}": t for name, t in chain(module.named_parameters(), module.named_buffers())}
    names = {name for name, _ in plain.named_parameters()}
    if homeless := sorted(set(deltas) - names):
        raise ValueError(f"adapters on {homeless} have no parameter of their own to be merged into")
    if unknown := sorted((names | {name for name, _ in plain.named_buffers()}) - set(sources)):
        raise ValueError(f"the adapted model has no values for {unknown}")
    for one, other in plain.all_tied_weights_keys.items():
        if sources[one] is not sources[other]:
            raise ValueError(f"{one} and {other} are one tensor in the plain model, but were trained apart: adapt neither")
    return plain, sources, deltas


def _merged(weight: torch.Tensor, factors: list[experts.Factors]) -> Iterator[torch.Tensor]:
    """W_e + Σ s·B_e·A_e in fp32, (out, in) expert by expert; a plain matrix counts as one expert."""
    if isinstance(weight, Params4bit) and len(weight.quant_state.shape) == 2:
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32  # not that of the run, which would round before anything is added
        matrices = iter([bnbf.dequantize_4bit(weight.data, state)])
    elif len(nf4.stack_shape(weight)) == 3:
        unpack = nf4.Unpacker(weight, torch.float32)
        matrices = (unpack(e) for e in range(nf4.stack_shape(weight)[0]))
    else:
        matrices = iter([weight.detach().float()])
    for e, matrix in enumerate(matrices):
        for f in factors:
            matrix = matrix + f.scale * (f.B[e].float() @ f.A[e].float())
        yield matrix


def merged_value(empty: torch.Tensor, source: torch.Tensor, factors: list) -> torch.Tensor:
    """One parameter, packed or not, with the adapters on it added in fp32, in the shape and type of `empty`."""
    value = torch.empty(empty.shape, dtype=empty.dtype, device=source.device)
    if factors or isinstance(source, Params4bit):
        rows = value if value.ndim == 3 else value.unsqueeze(0)
        for e, matrix in enumerate(_merged(source, factors)):
            rows[e].copy_(matrix)
    else:
        value.copy_(source)
    return value


@torch.no_grad()
def merge(model: PeftModel, dtype: torch.dtype | str = torch.bfloat16) -> PreTrainedModel:
    """A plain model of the same class in `dtype`: every weight dequantised, with its active adapters added.

    Sums are formed in fp32 and rounded once, so each weight is off by at most 2⁻⁸ of itself in bf16 (2⁻¹¹ in fp16, nothing
    in fp32), and so are the logits of most tokens; a router that is nearly undecided can be tipped by it. Needs the memory of
    the unquantised model beside the 4-bit one: 93 GB for Mixtral-8x7B. `model` stays as it is; `save_pretrained` of the result
    writes the family's ordinary checkpoint. Modules that were trained whole (PEFT's `modules_to_save`) replace the old ones.

    Raises ValueError, before anything is computed, for what cannot be merged: other adapters than LoRA on linear layers and
    parameters, disabled ones, and those that PEFT has merged already.
    """
    plain, sources, deltas = merge_plan(model, as_dtype(dtype))
    for name, empty in list(plain.named_parameters()):
        value = merged_value(empty, sources[name], deltas.get(name, []))
        _set(plain, name, nn.Parameter(value, requires_grad=False))
    for name, _ in list(plain.named_buffers()):
        _set(plain, name, sources[name].clone())
    plain.tie_weights()
    plain.generation_config = model.get_base_model().generation_config
    return plain.eval()


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


@torch.no_grad()
def save_merged(
    model: PeftModel, folder: str | Path, dtype: torch.dtype | str = torch.bfloat16, max_shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Write the merged model as an ordinary checkpoint; returns its weight files. `model` stays as it is.

    What has no adapter is written as well, down to the buffers that `save_pretrained` would write. The folder appears when it
    is whole. Raises FileExistsError if it is there already, and ValueError for what `merge` refuses and for a generation
    configuration that contradicts itself; both before any weights are written.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: merge into another folder, or delete it first")
    dtype = as_dtype(dtype)
    plain, sources, deltas = merge_plan(model, dtype)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # First, because transformers checks them, and a large model's weights take an hour.
    plain.config.dtype = dtype
    plain.config.architectures = [type(plain).__name__]
    plain.config.save_pretrained(partial)
    model.get_base_model().generation_config.save_pretrained(partial)
    shards: list[dict[str, str]] = []  # tensor name → shard file, for each shard
    waiting: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        if waiting:
            file = f"model-{len(shards) + 1:05d}.safetensors"
            save_file(waiting, partial / file, metadata={"format": "pt"})
            shards.append(dict.fromkeys(waiting, file))
            waiting.clear()
            size = 0

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for name, empty in plain.named_parameters():
            yield name, merged_value(empty, sources[name], deltas.get(name, []))
        for name in [n for n, _ in plain.named_buffers() if n in persistent]:
            yield name, sources[name].clone()  # in its own dtype; a copy, as safetensors refuses shared memory

    persistent = plain.state_dict().keys()
    for name, value in values():
        for key, tensor in revert_weight_conversion(plain, {name: value}).items():
            bytes_ = tensor.numel() * tensor.element_size()
            if waiting and size + bytes_ > max_shard_bytes:
                flush()
            waiting[key] = tensor.contiguous().cpu()
            size, total = size + bytes_, total + bytes_
    flush()
    names = {}
    for number, shard in enumerate(shards, start=1):
        final = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (partial / next(iter(shard.values()))).rename(partial / final)
        names |= dict.fromkeys(shard, final)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8", newline="\n")
    partial.rename(folder)
    return sorted(folder.glob("*.safetensors"))


@torch.no_grad()
def merge_4bit(model: PeftModel) -> tuple[PreTrainedModel, list[dict]]:
    """The 4-bit base with its active adapters merged in, and what that cost. Changes `model`, which is used up.

    A packed weight has to be rounded to 16 levels a second time, which may be more than the adapter changed. The rows, one an
    adapted parameter: `change` = ‖Δ‖ / ‖W‖, `error` = ‖what is stored − (W + Δ)‖ / ‖Δ‖ (above 1, more was lost than the
    adapter brought), `kept` = ⟨stored − W, Δ⟩ / ‖Δ‖². Unquantised weights (a router) are rounded to their own dtype only.
    Raises ValueError for what `merge` refuses.
    """
    rows = []
    deltas, copies = _trained(model)
    _, parameters, _ = merge_plan(model, torch.float32)
    base = model.unload()  # takes the adapters' modules away; their factors live on in `deltas`
    for name, module in copies.items():  # PEFT has put the old module back
        base.set_submodule(name, module.requires_grad_(False))
    for name, factors in deltas.items():
        old = parameters[name]
        if not isinstance(old, Params4bit):
            new = nn.Parameter(merged_value(old, old, factors), requires_grad=False)
        else:
            shape = old.quant_state.shape
            new = nf4.quantize_matrices(_merged(old, factors), (1, *shape)[-3:], old.quant_state.nested)
            new.quant_state.shape, new.quant_state.dtype = shape, old.quant_state.dtype
        total = dict.fromkeys(("w", "d", "error", "along"), 0.0)
        for was, wanted, stored in zip(_merged(old, []), _merged(old, factors), _merged(new, []), strict=True):
            delta = wanted - was
            total["w"] += was.square().sum().item()
            total["d"] += delta.square().sum().item()
            total["error"] += (stored - wanted).square().sum().item()
            total["along"] += ((stored - was) * delta).sum().item()
        rows.append(
            {
                "parameter": name,
                "change": (total["d"] / total["w"]) ** 0.5,
                "error": (total["error"] / total["d"]) ** 0.5 if total["d"] else 0.0,
                "kept": total["along"] / total["d"] if total["d"] else 1.0,
            }
        )
        module = base.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Linear4bit):
            new.module, module.quant_state = module, new.quant_state
        _set(base, name, new)
    return base, rows
