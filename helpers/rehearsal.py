"""A training step rehearsed: the real code at a large model's real shapes, on tensors that have no storage.

On torch's meta device a tensor is a shape and a dtype. So the whole step (4-bit experts with their adapters, router losses,
checkpointing, the loss in chunks, backward) can be run for Mixtral-8x7B on a laptop in seconds: what does not fit together in
shape or dtype fails here, and what is alive at one time can be counted without a GPU. That is another way to the number that
`budget` calculates. Not seen are what kernels take for themselves, and memory that the allocator cannot use.

Counted, too, is the work of every kernel: its FLOPs, and the bytes that it has to read and write. No GPU can be done with a
kernel before it has multiplied at its top speed and moved the bytes at its top speed, whichever takes longer (the roofline of
Williams, Waterman and Patterson, 2009). The sum is a time that a real step cannot go below; how far above it is, only a
measurement says.

Three things stand in for what a meta tensor cannot have: tokens are shared out evenly among the experts; every token is trained,
so the loss is at its largest; a row is one document, through the operator of the flash kernel.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedConfig

from helpers import activation_checkpointing, budget, fused, losses, qlora, quantization
from helpers.audit import audit
from helpers.profiles import Profile
from helpers.router_losses import attach_router_losses

ATTENTION = "rehearsal"
CARD_TOKENS = 25.5e6  # three epochs of about 8.5 million, by the size of its data; the card does not say

# Of NVIDIA's data sheets: FLOP/s of dense 16-bit matrix products, and bytes/s of the memory.
SPEEDS = {
    "T4": (65e12, 320e9),
    "L4": (121e12, 300e9),
    "A100-40": (312e12, 1555e9),
    "A100-80": (312e12, 2039e9),
    "H100": (989e12, 3350e9),
    "H200": (989e12, 4800e9),
}


# Thin: with a factor of LoRA or a router, which read much for the little that they multiply. The rest: norms, gates, dropout.
KINDS = ("matrix products", "attention", "thin products", "unpacking", "the rest")


# Where among the arguments the thin matrix and its factor are.
FUSED_PRODUCTS = {"thin_product": [(0, 1)], "gate": [(1, 2)], "gate_back": [(1, 2), (4, 5)]}


class Kernel(NamedTuple):
    kind: str  # of `KINDS`
    flops: int
    bytes: int  # to move

    def least_seconds(self, gpu: str) -> float:
        multiplied, moved = SPEEDS[gpu]
        return max(self.flops / multiplied, self.bytes / moved)


@dataclass(frozen=True)
class Rehearsal:
    """Bytes of a pass (a micro-batch forward and backward): what stays, and the most that its tensors take beside that at once.

    `kernels` says how often each runs.
    """

    rows: int
    tokens: int  # a row
    weights: int  # with their scales, and adapters
    gradients: int  # and Adam's two moments
    activations: int
    kernels: Counter[Kernel]

    @property
    def flops(self) -> int:
        """Of matrix products and attention, recomputation included."""
        return sum(times * kernel.flops for kernel, times in self.kernels.items())

    def least_seconds(self, gpu: str) -> float:
        """What a pass takes at least on a GPU of `SPEEDS`, each kernel at the data sheet's speed."""
        return sum(times * kernel.least_seconds(gpu) for kernel, times in self.kernels.items())

    def shares(self, gpu: str) -> dict[str, float]:
        """Of `least_seconds`, by kind."""
        seconds = dict.fromkeys(KINDS, 0.0)
        for kernel, times in self.kernels.items():
            seconds[kernel.kind] += times * kernel.least_seconds(gpu)
        return {kind: part / self.least_seconds(gpu) for kind, part in seconds.items()}

    def bound(self, gpu: str) -> str:
        seconds = self.least_seconds(gpu)
        return f"{gpu}: at least {seconds:.2f} s, at most {self.rows * self.tokens / seconds:,.0f} tokens/s"

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
        if func is F.linear and torch.is_autocast_enabled("cuda"):
            args = [a.to(self.dtype) if isinstance(a, torch.Tensor) else a for a in args]
        if func is F.dropout:  # the kernel that CUDA has for it; elsewhere it is made of several
            rest = dict(zip(("p", "training"), args[1:], strict=False)) | (kwargs or {})
            return torch.native_dropout(args[0], rest.get("p", 0.5), rest.get("training", True))[0]
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """Counts kernels. Unless it knows better, a kernel reads its inputs and writes its outputs.

    A matrix product does not read where it writes to, unless it adds to what is there.
    """

    NONE = frozenset({"_unsafe_view", "_reshape_alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"})
    WRITES = frozenset({"bernoulli_", "zero_", "fill_", "zeros_like", "ones_like", "new_zeros", "new_full", "full_like"})

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank  # of the adapters
        self.found: Counter[Kernel] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in self.NONE:
            self.found[Kernel(self.kind(name, args), self.flops(name, args, out), self.moved(name, args, kwargs, out))] += 1
        return out

    def kind(self, name: str, args) -> str:
        if "flash_attention" in name:
            return "attention"
        if name.startswith("dequantize") or name == "unpack":
            return "unpacking"
        if name == "thin_product":
            return "thin products"
        if name in ("mm", "bmm", "addmm", "addmm_"):
            first, second = args[-2:]
            thinnest = min(*first.shape[-2:], second.shape[-1])
            return "the rest" if thinnest == 1 else "thin products" if thinnest <= self.rank else "matrix products"
        return "matrix products" if name == "gemm_4bit" else "the rest"

    @staticmethod
    def flops(name: str, args, out) -> int:
        if name in ("mm", "bmm", "addmm", "addmm_"):
            first, second = args[-2:]
            return 2 * first.numel() * second.shape[-1]
        if name == "gemm_4bit":  # bitsandbytes' linear layer
            return 2 * args[0].numel() * out.shape[-1]
        if "flash_attention" in name:  # queries and keys, weights and values, half of them masked; backward has five products
            query = args[1 if "backward" in name else 0]
            batch, heads, tokens, size = query.shape
            return (5 if "backward" in name else 2) * batch * heads * tokens**2 * size
        if name in FUSED_PRODUCTS:  # of an adapter, within a kernel of `helpers.fused`
            pairs = [(args[i], args[j]) for i, j in FUSED_PRODUCTS[name] if args[i] is not None]
            return sum(2 * thin.shape[0] * factor.numel() for thin, factor in pairs)
        return 0

    @classmethod
    def moved(cls, name: str, args, kwargs, out) -> int:
        def size(*values) -> int:
            tensors = {id(t): t for t in tree_leaves(values) if isinstance(t, torch.Tensor)}.values()
            return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)

        if name in cls.WRITES:
            return size(out)
        if name in ("index", "embedding", "gather"):  # of the table, only what is taken out
            return 2 * size(out)
        if name == "take":
            made = [t for t in args[2:4] if t is not None]
            return size(args[1]) + (1 + len(made)) * size(made[0])
        if name in ("index_put_", "copy_"):
            return 2 * size(args[2] if name == "index_put_" else args[1])
        read = {key: value for key, value in (kwargs or {}).items() if key != "out"}
        args = args[1:] if name in ("addmm", "addmm_", "baddbmm_") and read.get("beta") == 0 else args
        return size(args, read) + size(out)


def rehearse(
    profile: Profile,
    micro_batch: int | None = None,
    context: int | None = None,
    config: PreTrainedConfig | None = None,
    fused_kernels: bool = False,
) -> Rehearsal:
    """Run the second micro-batch of an accumulated step of a profile, or of another model (`config`) with its adapters.

    `fused_kernels`: with those of `helpers.fused` for the experts. What torch.compile would fuse is not counted.

    Raises whatever the step raises.
    """
    rows, tokens = micro_batch or profile.micro_batch, context or profile.context
    dtype = quantization.as_dtype(profile.dtype)
    model = quantization.random_4bit(config or budget.config_of(profile), dtype, device="meta")
    model.set_attn_implementation(ATTENTION)
    parts = {"experts": profile.lora_experts, "router": profile.lora_router}
    with torch.device("meta"):  # else PEFT draws the adapters before it moves them
        model = qlora.add_lora(model, profile.lora_r, profile.lora_alpha, profile.lora_dropout, **parts).to("meta").train()
    if fused_kernels:
        fused.fuse(model)
    handle = attach_router_losses(model, profile.z_coef, profile.balance_coef)
    if profile.gradient_checkpointing:
        activation_checkpointing.enable(model, context_fn=lambda: (nullcontext(), _Autocast(dtype)))
        model.enable_input_require_grads()
    adapters = [p for p in model.parameters() if p.requires_grad]
    for p in adapters:  # those of the first micro-batch
        p.grad = torch.zeros_like(p)
    base, ids = model.get_base_model(), torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    with _Kernels(profile.lora_r) as kernels, budget.LiveBytes() as live:
        with _Autocast(dtype), losses.head_input(base) as caught:
            model(input_ids=ids, use_cache=False)
        hidden = caught.pop().flatten(0, 1)
        loss = losses.linear_cross_entropy(hidden, base.get_output_embeddings().weight, ids.flatten())
        del hidden
        loss.backward()
    handle.verify()
    weights = sum(part.bytes for part in audit(model).parts.values())
    gradients = sum(3 * p.numel() * p.element_size() for p in adapters)
    return Rehearsal(rows, tokens, weights, gradients, live.peak, kernels.found)
