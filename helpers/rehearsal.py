"""A training step rehearsed: the real code at a large model's real shapes, on tensors that have no storage.

On torch's meta device a tensor is a shape and a dtype. So the whole step (4-bit experts with their adapters, router losses,
checkpointing, the loss in chunks, backward) can be run for Mixtral-8x7B on a laptop in seconds: what does not fit together in
shape or dtype fails here, and what is alive at one time can be counted without a GPU. That is another way to the number that
`budget` calculates. Not seen are speed, what kernels take for themselves, and memory that the allocator cannot use.

Three things stand in for what a meta tensor cannot have: tokens are shared out evenly among the experts; every token is trained,
so the loss is at its largest; a row is one document, through the operator of the flash kernel.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedConfig

from helpers import budget, losses, qlora, quantization
from helpers.profiles import Profile
from helpers.router_losses import attach_router_losses

ATTENTION = "rehearsal"


@dataclass(frozen=True)
class Rehearsal:
    """Bytes of a step: what stays, and the most that its tensors take beside that at one time."""

    rows: int
    tokens: int  # a row
    weights: int  # with their scales, and adapters
    gradients: int  # and Adam's two moments
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.activations

    def __str__(self) -> str:
        gib = {name: getattr(self, name) / budget.GIB for name in ("peak", "weights", "gradients", "activations")}
        return (
            f"rehearsed, {self.rows} x {self.tokens:,} tokens: {gib['peak']:.2f} GiB at the peak: weights and adapters\n"
            f"{gib['weights']:.2f}, gradients and moments {gib['gradients']:.2f}, "
            f"other tensors of a step {gib['activations']:.2f}"
        )


def _flash_attention(module, query, key, value, _mask, scaling=None, **_):
    """transformers' attention function for causal rows of one document: (B, heads, S, D) → (B, S, heads, D)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _flash_attention)


class _Autocast(TorchFunctionMode):
    """What autocast does to linear layers, and PEFT to be told that it is on; the meta device has none of its own."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", self.dtype != torch.float32)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_autocast_enabled("cuda", self.before)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            args = [a.to(self.dtype) if isinstance(a, torch.Tensor) else a for a in args]
        return func(*args, **(kwargs or {}))


def rehearse(
    profile: Profile, micro_batch: int | None = None, context: int | None = None, config: PreTrainedConfig | None = None
) -> Rehearsal:
    """Run the second micro-batch of an accumulated step of a profile, or of another model (`config`) with its adapters.

    Raises whatever the step raises.
    """
    rows, tokens = micro_batch or profile.micro_batch, context or profile.context
    dtype = getattr(torch, profile.dtype)
    model = quantization.random_4bit(config or budget.config_of(profile), dtype, device="meta")
    model.set_attn_implementation(ATTENTION)
    parts = {"experts": profile.lora_experts, "router": profile.lora_router}
    model = qlora.add_lora(model, profile.lora_r, profile.lora_alpha, profile.lora_dropout, **parts).to("meta").train()
    handle = attach_router_losses(model, profile.z_coef, profile.balance_coef)
    if profile.gradient_checkpointing:
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _Autocast(dtype))}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        model.enable_input_require_grads()
    adapters = [p for p in model.parameters() if p.requires_grad]
    for p in adapters:  # those of the first micro-batch
        p.grad = torch.zeros_like(p)
    base, ids = model.get_base_model(), torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    with budget.LiveBytes() as live:
        with _Autocast(dtype), losses.head_input(base) as caught:
            model(input_ids=ids, use_cache=False)
        hidden = caught.pop().flatten(0, 1)
        loss = losses.linear_cross_entropy(hidden, base.get_output_embeddings().weight, ids.flatten())
        del hidden
        loss.backward()
    handle.verify()
    weights = sum(part.bytes for part in quantization.audit(model).parts.values())
    return Rehearsal(rows, tokens, weights, sum(3 * p.numel() * p.element_size() for p in adapters), live.peak)
