"""LoRA on attention, experts and router, in stock PEFT configuration and files.

PEFT can adapt a 3-D parameter (`target_parameters`), but its wrapper forms W + B·A for all experts in every forward pass
(2.8 GB for one Mixtral layer), cannot handle packed weights and refuses dropout. The subclass below keeps its parameters,
names and files, and hands the factors to `helpers.experts` instead. An adapter saved here loads in stock PEFT on the
unquantised model, and the other way round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
import warnings
from itertools import chain
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.lora.bnb import Linear4bit as StockLoraLinear4bit
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from helpers import experts, nf4
from helpers.audit import router_modules
from helpers.files import write_json

DROPOUT_FILE = "training_dropout.json"
UNUSED = ".dt_proj"  # Jamba multiplies by its weight, so that an adapter on the plain model would do nothing
NO_STOCK_MERGE = (
    "PEFT cannot merge into packed weights: use helpers.merging.merge, or merge_4bit. If layers without packed weights came "
    "before this one, they are merged now: load the model again"
)


class ParamWrapper(StockParamWrapper):  # PEFT recognises nested wrappers by this very class name
    """PEFT's parameter wrapper without the product: LoRA factors go to the experts function as `experts.Factors`.

    For a 2-D parameter (a router, E × H) the product is small and is formed as in PEFT, without dropout: the router's
    input cannot be reached from here. But the sum W + B·A is formed in fp32, and the router runs in fp32 (`_run_in_fp32`).
    """

    def __init__(self, base_layer, adapter_name, parameter_name, config, **kwargs):
        self.expert_dropout: dict[str, float] = {}
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dropout(config), **kwargs)
        self.expert_dropout[adapter_name] = config.lora_dropout  # update_layer saw it without

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        self.expert_dropout[adapter_name] = config.lora_dropout
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=_without_dropout(config), **kwargs)

    def _get_in_out_features(self, module):
        param = self.get_param()
        shape = nf4.stack_shape(param)  # a packed parameter's own shape is (bytes, 1)
        self._param_ndim = len(shape)
        if len(shape) == 3:
            self.num_experts = shape[0]
            # update_layer swaps them for layouts (E, out, in); PEFT 0.20 only where the parameter itself has three dimensions
            swaps = param.ndim == 3 or hasattr(StockParamWrapper, "get_delta_factors")
            return (shape[1], shape[2]) if swaps else (shape[2], shape[1])
        return super()._get_in_out_features(module)

    def factors(self, adapter: str) -> experts.Factors:
        """A (E, r, in) and B (E, out, r), as views. In PEFT's files lora_A is expert-major and lora_B expert-minor."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return experts.Factors(
            A=a.view(self.num_experts, -1, a.shape[-1]),
            B=b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1),
            dropout=self.expert_dropout[adapter],
            scale=self.scaling[adapter],
        )

    def forward(self, x: torch.Tensor, *args, **kwargs):
        base = self.get_base_layer()
        adapters = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if a in self.lora_A]
        if self._param_ndim != 2 or not adapters or base is not self.base_layer or experts.is_experts(base):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        return self._run_in_fp32(base, adapters, x, *args, **kwargs)

    def _run_in_fp32(self, base: nn.Module, adapters: list[str], x: torch.Tensor, *args, **kwargs):
        """The router with W + Σ s·B·A, everything in fp32 (float64 stays float64), whatever autocast says.

        bf16 has 8 significant bits. Beside a weight of 0.05, the 1e-4 that a few steps move it by are rounded away, and the
        router learns nothing. The logits stay in fp32, which is also what the router losses want. In fp32 the bits are PEFT's.
        """
        weight = self.get_param()
        dtype = torch.promote_types(torch.promote_types(weight.dtype, x.dtype), torch.float32)
        with experts.no_autocast(x):
            products = [self.lora_B[a].weight.to(dtype) @ self.lora_A[a].weight.to(dtype) * self.scaling[a] for a in adapters]
            own = chain(base.named_parameters(), base.named_buffers())  # a bias must not stay behind in half precision
            values = {n: t.to(torch.promote_types(t.dtype, dtype)) for n, t in own if t.is_floating_point()}
            values[self.parameter_name] = weight.to(dtype) + (products[0] if len(products) == 1 else sum(products))
            out = functional_call(base, values, (x.to(dtype), *args), kwargs)
        # What comes after logits, routing weights and experts (Inkling's shared experts' gates) meets weights of x's dtype.
        return (*out[:3], *(t.to(x.dtype) for t in out[3:])) if isinstance(out, tuple) else out

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters):
        base, adapters = self.get_base_layer(), [a for a in active_adapters if a in self.lora_A]
        if not adapters or not experts.is_experts(base) or base.config._experts_implementation != experts.NAME:
            if adapters and isinstance(self.get_param(), Params4bit):
                raise RuntimeError(
                    f"packed experts need the {experts.NAME!r} experts function: call model.set_experts_implementation"
                )
            with super()._activate_lora(active_adapters):
                yield
            return
        parts = [self.factors(a) for a in adapters]
        handed = parts[0]
        if len(parts) > 1:  # several adapters add up: one adapter of the summed rank
            if len({p.dropout for p in parts}) > 1 and self.training:
                raise ValueError("active expert adapters have different dropout: train one at a time")
            b = torch.cat([p.B * p.scale for p in parts], 2)
            handed = experts.Factors(torch.cat([p.A for p in parts], 1), b, handed.dropout)
        store = base.__dict__.setdefault("lora_factors", {})
        store[self.parameter_name] = handed
        try:
            yield
        finally:
            del store[self.parameter_name]

    def merge(self, safe_merge=False, adapter_names=None):
        if isinstance(self.get_param(), Params4bit):
            raise NotImplementedError(NO_STOCK_MERGE)
        super().merge(safe_merge, adapter_names)


class LoraLinear4bit(StockLoraLinear4bit):
    """PEFT's LoRA on a 4-bit linear layer, but for `merge`: PEFT would merge layer 0's attention and then fail at its experts."""

    def merge(self, safe_merge=False, adapter_names=None):
        raise NotImplementedError(NO_STOCK_MERGE)


class QLoraModel(PeftModelForCausalLM):
    """PEFT's model; later adapters (`add_adapter`, `load_adapter`) get this module's layers as well."""

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args, **kwargs) -> None:
        super().add_adapter(adapter_name, _use_our_layers(peft_config, self.get_base_model()), *args, **kwargs)


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """PEFT's wrapper refuses dropout; ours keeps the number and applies it in the experts function."""
    return dataclasses.replace(config, lora_dropout=0.0) if config.lora_dropout else config


def lora_config(
    model: PreTrainedModel,
    r: int = 32,
    alpha: int = 16,
    dropout: float = 0.05,
    attention: bool = True,
    experts_too: bool = True,
    router: bool = True,
) -> LoraConfig:
    """The card family's LoRA: all linear layers, expert stacks and routers (r 32, alpha 16, dropout 0.05).

    Some layers of some families PEFT cannot adapt (`_renamed_by_peft`, `_unreadable`): a warning says which are left out, and
    ValueError is raised if a requested router is among them.
    """
    head, routers = model.get_output_embeddings(), router_modules(model)
    inside_routers = {id(m) for router_module in routers for m in router_module.modules()}
    wanted, unwanted = [], []
    for name, module in model.named_modules():
        # Subclasses compute something else than PEFT's layer would. Indexers choose tokens and get no gradient.
        if type(module) in (nn.Linear, Linear4bit) and module is not head and ".indexer." not in name:
            (wanted if (router if id(module) in inside_routers else attention) else unwanted).append(name)
    if misread := _unreadable(wanted, model) + [name for name in wanted if name.endswith(UNUSED)]:
        names = ", ".join(misread[:3])
        warnings.warn(f"{len(misread)} linear layers get no adapter, as stock PEFT would lose it: {names} …", stacklevel=3)
        wanted, unwanted = [name for name in wanted if name not in misread], unwanted + misread
    leaves = {name.rpartition(".")[2] for name in wanted}
    if lost := {leaf for leaf in leaves if _renamed_by_peft(leaf, model)}:
        gone = {id(model.get_submodule(name)) for name in wanted if name.rpartition(".")[2] in lost}
        if gone & inside_routers:
            raise ValueError(f"PEFT cannot put an adapter on this model's router ({', '.join(sorted(lost))}): leave it out")
        warnings.warn(f"{len(gone)} linear layers get no adapter, as PEFT takes {sorted(lost)} for experts", stacklevel=3)
        leaves -= lost
    parameters = set()
    for name, module in model.named_modules():
        place = ".".join(name.split(".")[-2:])
        if experts_too and experts.is_experts(module):
            parameters |= {f"{place}.{stack}" for stack in experts.STACKS}
        if router and _adapted_by_weight(module, routers):
            parameters.add(f"{place}.weight")
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(leaves),
        exclude_modules=[name for name in unwanted if name.rpartition(".")[2] in leaves] or None,
        target_parameters=sorted(parameters) or None,
        task_type="CAUSAL_LM",
    )


def _unreadable(names: list[str], model: nn.Module) -> list[str]:
    """Linear layers whose adapter PEFT would save, and give another name when it loads it (Laguna's shared experts)."""
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    probe = LoraConfig(target_modules=sorted({name.rpartition(".")[2] for name in names}))
    empty = {key: torch.empty(1, 1, device="meta") for key in keys}
    read = convert_peft_adapter_state_dict_for_transformers(model, probe, empty)
    return [name for key, name in keys.items() if key not in read]


def _renamed_by_peft(leaf: str, model: nn.Module) -> bool:
    """Whether PEFT takes a module name for that of an expert of transformers 4, as a shared expert's in DeepSeek or GLM.

    It would then silently adapt the expert stacks instead, with twice the rank; this translation cannot be switched off.
    """
    probe = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # one half of a fused pair
        return True
    return leaf not in probe.target_modules


def _adapted_by_weight(module: nn.Module, routers: list[nn.Module]) -> bool:
    """Whether a module is a router with a weight of its own; others are, or hold, ordinary linear layers."""
    own = dict(module.named_parameters(recurse=False)).get("weight")
    return type(module) is not nn.Linear and own is not None and own.ndim == 2 and any(module is m for m in routers)


def _use_our_layers(config: LoraConfig, model: nn.Module) -> LoraConfig:
    routers = router_modules(model)
    kinds = {type(m) for m in model.modules() if experts.is_experts(m) or _adapted_by_weight(m, routers)}
    config._register_custom_module(dict.fromkeys(kinds, ParamWrapper) | {Linear4bit: LoraLinear4bit})
    return config


def add_lora(
    model: PreTrainedModel,
    r: int = 32,
    alpha: int = 16,
    dropout: float = 0.05,
    experts: bool = True,
    router: bool = True,
    attention: bool = True,
) -> PeftModel:
    """The model with fresh, trainable adapters (fp32). `attention` stands for all linear layers outside the router.

    Raises RuntimeError if a requested part got none, ValueError for a model that has adapters already.
    """
    _has_none_yet(model)
    config = lora_config(model, r, alpha, dropout, attention=attention, experts_too=experts, router=router)
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    peft_model = QLoraModel(model, _use_our_layers(config, model))
    check_adapters(peft_model, config)
    return peft_model


def load_lora(model: PreTrainedModel, folder: str | Path, trainable: bool = False) -> PeftModel:
    """The model with a saved adapter, from this course or from stock PEFT; `trainable` brings back its training dropout.

    One in the naming of transformers 4 is converted on the way. For a second adapter: `load_adapter` of what this returns
    (without its training dropout). Raises OSError for files that are missing or damaged, ValueError for what is no LoRA adapter
    and for a model that has adapters already, RuntimeError if a part of the adapter is not in the model.
    """
    from helpers import adapters_convert

    _has_none_yet(model)
    with tempfile.TemporaryDirectory() as temporary:
        place, names = _adapter_files(folder)
        if adapters_convert.is_per_expert(names):
            place = adapters_convert.from_per_expert(place, Path(temporary) / "adapter", _text_type(model))
        config = PeftConfig.from_pretrained(str(place))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"{folder} is an adapter of the kind {config.peft_type.value}; only LoRA can be loaded here")
        config.inference_mode = not trainable
        if trainable and (kept := place / DROPOUT_FILE).is_file():
            config.lora_dropout = json.loads(kept.read_text(encoding="utf-8"))["lora_dropout"]
        with warnings.catch_warnings():
            # PEFT looks for what patterns match among modules only, not among parameters; `check_adapters` looks at both
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted module")
            peft_model = QLoraModel(model, _use_our_layers(config, model))
            found = peft_model.load_adapter(str(place), "default", is_trainable=trainable)
    if found.unexpected_keys:
        count, first = len(found.unexpected_keys), found.unexpected_keys[0]
        raise RuntimeError(f"{count} tensors of {folder} have no place in this model, as {first}: is it another base's adapter?")
    if found.missing_keys:
        first = found.missing_keys[0]
        warnings.warn(f"{folder} has no values for {len(found.missing_keys)} tensors of its adapter, as {first}", stacklevel=2)
    check_adapters(peft_model, config)
    return peft_model


def _text_type(model: nn.Module) -> str:
    return model.config.get_text_config().model_type


def _adapter_files(folder: str | Path) -> tuple[Path, list[str]]:
    """(the adapter's folder, fetched if it is a Hub id; the names of its tensors)."""
    place = Path(folder)
    if not place.is_dir():
        if place.is_absolute() or str(folder).startswith((".", "~")) or str(folder).count("/") != 1:
            raise OSError(f"there is no folder {folder}, and a Hub id has the form ORG/NAME")
        place = Path(snapshot_download(str(folder), allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, DROPOUT_FILE]))
    if missing := [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (place / name).is_file()]:
        raise OSError(f"{folder} holds no {' and no '.join(missing)}: an adapter needs both")
    file = place / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(file, "pt") as tensors:
            return place, list(tensors.keys())
    except SafetensorError as error:
        raise OSError(f"{file} is cut off or damaged (safetensors says: {error}): copy or fetch it again") from error


def _has_none_yet(model: nn.Module) -> None:
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            "this model has adapters already: load it again, or call add_adapter or load_adapter of the adapted model"
        )


def check_adapters(model: PeftModel, config: LoraConfig) -> None:
    """Every target of the configuration has an adapter: PEFT itself only warns when a name matches nothing."""
    adapted = {n for n, _ in model.named_modules() if n.endswith(".lora_A")}
    # the weight of a linear layer gets PEFT's adapter for linear layers where it is packed
    layers = [(plain_name(n), m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    parameters = [f".{name}.{getattr(m, 'parameter_name', 'weight')}" for name, m in layers]
    # a parameter's rank and alpha are looked up by its own name, a layer's by the layer's
    looked_up = [*parameters, *(f".{name}" for name, m in layers if not hasattr(m, "parameter_name"))]
    for pattern in {**config.rank_pattern, **config.alpha_pattern}:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in looked_up):
            warnings.warn(f"the pattern {pattern!r} of the adapter's settings matches nothing, so it does nothing", stacklevel=3)
    for target in config.target_parameters or []:
        if not any(name.endswith(f".{target}") for name in parameters):
            raise RuntimeError(f"no adapter was put on {target}: PEFT found no parameter of this name")
    if isinstance(config.target_modules, str):  # a pattern, or "all-linear", of a stock adapter
        if not adapted:
            raise RuntimeError(f"no adapter was put on {config.target_modules}: PEFT found no module that matches")
        return
    for target in config.target_modules or []:
        if not any(f".{target}." in n for n in adapted):
            raise RuntimeError(f"no adapter was put on {target}: PEFT found no module of this name")


def plain_name(name: str) -> str:
    """The name that a module or parameter of the adapted model has in the plain one."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def adapter_norms(model: nn.Module) -> dict[str, float]:
    """Root mean square of the active adapter's LoRA tensors, as `<module or parameter>.lora_A|B`: which parts have learned.

    The mean, because a plain norm grows with the tensor: that of a stack of experts would dwarf every other.
    """
    norms = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")  # nested wrappers sit on one module
        if isinstance(module, StockParamWrapper):
            name += f".{module.parameter_name}"
        for kind in ("lora_A", "lora_B"):
            of = getattr(module, kind)
            for adapter in (of[a] for a in module.active_adapters if a in of):
                norms[f"{name}.{kind}"] = adapter.weight.detach().float().square().mean().sqrt().item()
    return norms


def save_lora(model: PeftModel, folder: str | Path) -> Path:
    """Write the adapter so that stock PEFT loads it, on the same base in bf16 or in this course's 4 bit.

    Stock PEFT refuses a configuration with dropout on parameters, even for inference, where dropout does nothing. The
    configuration therefore says 0, and the training value is kept beside it for `load_lora(..., trainable=True)`. As in PEFT,
    adapters that are not called "default" get subfolders of their names.
    """
    folder = Path(folder)
    kept = {}
    for name, config in model.peft_config.items():
        kept[name] = config.lora_dropout
        if config.target_parameters:
            config.lora_dropout = 0.0
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        for name, dropout in kept.items():
            model.peft_config[name].lora_dropout = dropout
    for name, dropout in kept.items():
        place = folder if name == "default" else folder / name
        write_json(place / DROPOUT_FILE, {"lora_dropout": dropout})
    return folder
