"""LoRA on attention, experts and router, in stock PEFT configuration and files.

PEFT can adapt a 3-D parameter (`target_parameters`), but its wrapper forms W + B·A for all experts in every forward pass
(2.8 GB for one Mixtral layer), cannot handle packed weights and refuses dropout. The subclass below keeps its parameters,
names and files, and hands the factors to `helpers.experts` instead. An adapter saved here loads in stock PEFT on the
unquantised model, and the other way round.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import torch
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from torch import nn
from transformers import PreTrainedModel

from helpers import experts
from helpers.quantization import router_modules


class ParamWrapper(StockParamWrapper):  # PEFT recognises nested wrappers by this very class name
    """PEFT's parameter wrapper without the product: LoRA factors go to the experts function as `experts.Factors`.

    For a 2-D parameter (a router, E × H) the product is small and is formed as in PEFT, without dropout: the router's
    input cannot be reached from here.
    """

    def __init__(self, base_layer, adapter_name, parameter_name, config, **kwargs):
        self.expert_dropout: dict[str, float] = {adapter_name: config.lora_dropout}
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dropout(config), **kwargs)

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        if config.lora_dropout:  # a second adapter comes this way
            self.expert_dropout[adapter_name] = config.lora_dropout
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=_without_dropout(config), **kwargs)

    def _get_in_out_features(self, module):
        param = self.get_param()
        shape = experts.stack_shape(param)  # a packed parameter's own shape is (bytes, 1)
        self._param_ndim = len(shape)
        if len(shape) == 3:
            self.num_experts = shape[0]
            return shape[1], shape[2]  # update_layer swaps them for layouts (E, out, in)
        return super()._get_in_out_features(module)

    def factors(self, adapter: str) -> experts.Factors:
        """A (E, r, in) and scaled B (E, out, r). In PEFT's files lora_A is expert-major and lora_B expert-minor."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return experts.Factors(
            A=a.view(self.num_experts, -1, a.shape[-1]),
            B=b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1) * self.scaling[adapter],
            dropout=self.expert_dropout[adapter],
        )

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
            handed = experts.Factors(torch.cat([p.A for p in parts], 1), torch.cat([p.B for p in parts], 2), handed.dropout)
        store = base.__dict__.setdefault("lora_factors", {})
        store[self.parameter_name] = handed
        try:
            yield
        finally:
            del store[self.parameter_name]

    def merge(self, safe_merge=False, adapter_names=None):
        if isinstance(self.get_param(), Params4bit):
            raise NotImplementedError("merging into 4-bit weights would round the adapter away: merge into the bf16 base model")
        super().merge(safe_merge, adapter_names)


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
    """The card family's LoRA: all linear layers, expert stacks and routers (r 32, alpha 16, dropout 0.05)."""
    head = model.get_output_embeddings()
    linears = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    parameters = set()
    for name, module in model.named_modules():
        if experts_too and experts.is_experts(module):
            parameters |= {".".join([*name.split(".")[-2:], stack]) for stack in experts.STACKS}
    if router:
        routers = {id(m) for m in router_modules(model)}
        names = [n for n, m in model.named_modules() if id(m) in routers]
        # a router that is itself an nn.Linear is already in `linears`
        parameters |= {".".join([*n.split(".")[-2:], "weight"]) for n in names if n.rpartition(".")[2] not in linears}
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(linears) if attention else [],
        target_parameters=sorted(parameters) or None,
        task_type="CAUSAL_LM",
    )


def _use_our_wrapper(config: LoraConfig, model: nn.Module) -> LoraConfig:
    kinds = {type(m) for m in model.modules() if experts.is_experts(m)} | {type(m) for m in router_modules(model)}
    config._register_custom_module(dict.fromkeys(kinds, ParamWrapper))
    return config


def add_lora(
    model: PreTrainedModel, r: int = 32, alpha: int = 16, dropout: float = 0.05, experts: bool = True, router: bool = True
) -> PeftModel:
    """The model with fresh, trainable adapters (fp32). Raises RuntimeError if a requested part got none."""
    config = lora_config(model, r, alpha, dropout, experts_too=experts, router=router)
    peft_model = get_peft_model(model, _use_our_wrapper(config, model))
    check_adapters(peft_model, config)
    return peft_model


def load_lora(model: PreTrainedModel, folder: str | Path, trainable: bool = False) -> PeftModel:
    """The model with a saved adapter, from this course or from stock PEFT."""
    config = PeftConfig.from_pretrained(str(folder))
    if not trainable:
        config.inference_mode = True
    peft_model = PeftModel.from_pretrained(model, str(folder), config=_use_our_wrapper(config, model), is_trainable=trainable)
    check_adapters(peft_model, config)
    return peft_model


def check_adapters(model: PeftModel, config: LoraConfig) -> None:
    """Every target of the configuration has an adapter: PEFT itself only warns when a name matches nothing."""
    adapted = {n for n, _ in model.named_modules() if n.endswith(".lora_A")}
    wrapped = {m.parameter_name for m in model.modules() if isinstance(m, StockParamWrapper)}
    for target in config.target_parameters or []:
        if target.rpartition(".")[2] not in wrapped:
            raise RuntimeError(f"no adapter was put on {target}: PEFT found no parameter of this name")
    for target in config.target_modules or []:
        if not any(f".{target}." in n for n in adapted):
            raise RuntimeError(f"no adapter was put on {target}: PEFT found no module of this name")


def adapter_norms(model: nn.Module) -> dict[str, float]:
    """Frobenius norm of every LoRA tensor, as `<module or parameter>.lora_A|B`: which parts have learned."""
    norms = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")  # nested wrappers sit on one module
        if isinstance(module, StockParamWrapper):
            name += f".{module.parameter_name}"
        for kind in ("lora_A", "lora_B"):
            for adapter in getattr(module, kind).values():
                norms[f"{name}.{kind}"] = adapter.weight.detach().float().norm().item()
    return norms


def save_lora(model: PeftModel, folder: str | Path) -> Path:
    """Write the adapter so that stock PEFT loads it, on the same base in bf16 or in this course's 4 bit.

    Stock PEFT refuses a configuration with dropout on parameters, even for inference, where dropout does nothing. The
    file therefore says 0; the run's own record keeps the training value.
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
    return folder
