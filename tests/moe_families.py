"""Tiny configurations of every causal language model whose experts transformers dispatches, found by asking the library."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

knows_routers = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older transformers know the routers of fewer families"
)
MODELS = Path(transformers.__file__).parent / "models"

# The same idea has many names; a family takes those that its configuration knows.
SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=16, n_group=1, topk_group=1,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, num_experts_per_token=2,
    top_k_experts=2, moe_k=2, moe_topk=2, moe_intermediate_size=64, shared_expert_intermediate_size=64, q_lora_rank=16,
    kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, sliding_window=16,
    mlp_layer_types=["dense", "sparse"], mlp_only_layers=[], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_head_dim=16, linear_num_heads=4, linear_value_head_dim=16, mamba_n_heads=8,
    mamba_d_head=16, mamba_d_state=16, index_head_dim=16,
    index_n_heads=4, index_topk=8, unpadded_vocab_size=128,
)  # fmt: skip
# Pictures and sound around a language model that is a type of its own.
COMPOSITES = {"dots3_note", "gemma4", "qwen3_5_moe", "qwen4_exp"}
ATTENTION = ["full_attention", "full_attention"]
OVERRIDES: dict[str, dict] = {
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0),
    "lfm2_moe": dict(layer_types=ATTENTION, num_dense_layers=0),
    "zaya": dict(num_experts_per_tok=1),
    "deepseek_v4": dict(mlp_layer_types=["moe", "moe"]),
    "dots1": dict(n_shared_experts=1),
    "granitemoehybrid": dict(layer_types=["attention", "attention"]),
    "gemma4_text": dict(enable_moe_block=True, hidden_size_per_layer_input=0, vocab_size_per_layer_input=128),
}


def dispatched() -> dict[str, list[type]]:
    """Module name → experts classes, of every modeling file that uses `use_experts_implementation`."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        if "@use_experts_implementation" in path.read_text(encoding="utf-8"):
            name = path.stem.removeprefix("modeling_")
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            # the decorator leaves the class's own forward under `__wrapped__` and gives it `_apply_gate`
            classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
            found[name] = [c for c in classes if hasattr(c, "_apply_gate") and hasattr(c.forward, "__wrapped__")]
    return found


def causal_lms() -> list[str]:
    """Model types of `AutoModelForCausalLM` that live in those files."""
    homes = set(dispatched())
    types = []
    for kind, classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = classes if isinstance(classes, str) else classes[0]
        home = getattr(transformers, name).__module__.rpartition("modeling_")[2]
        if home in homes:
            types.append(kind)
    return types


def tiny(kind: str) -> PreTrainedConfig:
    """A two-layer model of this type with 4 experts."""
    config_class = CONFIG_MAPPING[kind]
    known = set(inspect.signature(config_class.__init__).parameters) | set(dir(config_class))
    sizes = {k: v for k, v in SIZES.items() if k in known}
    if "qk_rope_head_dim" in known:  # multi-head latent attention: rope works on heads of that size
        sizes |= dict(head_dim=8, num_key_value_heads=4)
    return config_class(**sizes | OVERRIDES.get(kind, {}))


def experts_module(experts_class: type, activation: str = "silu") -> torch.nn.Module:
    """An experts class on its own, with 4 experts of hidden size 64 and weights drawn at random."""
    settings = SimpleNamespace(
        **SIZES, hidden_act=activation, hidden_activation=activation, mlp_hidden_act=activation, activation_func=activation,
        swiglu_limit=7.0, swiglu_alpha=1.702, moe_num_shared_experts=1, mlp_gate_softcap=2.0, mlp_up_softcap=2.0,
        moe_hidden_size=64, moe_latent_size=None, rms_norm_eps=1e-5, post_norm_eps=1e-5, mlp_bias=False,
        _experts_implementation="eager",
    )  # fmt: skip
    module = experts_class(settings)
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.2)
    return module.requires_grad_(False)
