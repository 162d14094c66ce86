"""NF4 expert stacks: a Mixture-of-Experts MLP computed from 4-bit weights, with LoRA that is never multiplied out.

transformers 5 keeps all experts of a layer in two 3-D parameters, `gate_up_proj (E, 2I, H)` and `down_proj (E, H, I)`, and
lets an *experts function* be registered by name. This module registers one, "nf4":

    y[t] = Σ_{e ∈ top-k(t)}  weight[t, e] · down_e( gate( gate_up_e(x[t]) ) )        each linear map: (W + s·B·A) x

in one autograd function that walks over the experts. W is unpacked from 4 bit for one expert at a time, used for one matrix
product and dropped; backward unpacks it again. Kept between forward and backward are the layer's input and the
pre-activations, nothing of the weights. `B·A` (as large as W) is never formed: the two thin factors are applied in turn.

E experts, H hidden size, I intermediate size, T tokens, k experts a token, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import bitsandbytes.functional as bnbf
import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "nf4"
STACKS = ("gate_up_proj", "down_proj")
BLOCK = 64  # weights that share one scale; never straddles experts because in_features is a multiple of it


class Factors(NamedTuple):
    """LoRA factors of a whole expert stack, as handed over by the adapter layer."""

    A: Tensor  # (E, r, in)
    B: Tensor  # (E, out, r), already times alpha / r
    dropout: float = 0.0


def is_experts(module: nn.Module) -> bool:
    """Whether a module is an expert stack behind transformers' experts interface."""
    return all(hasattr(module, a) for a in ("_apply_gate", "is_transposed", "has_bias", "is_concatenated"))


def unsupported(module: nn.Module) -> str | None:
    """Why an expert stack cannot be computed here, or None. The layouts are those of `use_experts_implementation`."""
    if module.is_transposed:
        return "its weights are stored transposed (E, in, out), so NF4 blocks would run along the wrong axis"
    if module.has_bias:
        return "its experts have biases"
    if not module.has_gate:
        return "its experts have no gate projection"
    if getattr(module, "has_post_expert_norm", False):
        return "its experts end in a norm"
    for name in STACKS:
        inner = stack_shape(getattr(module, name))[-1]
        if inner % BLOCK:
            return f"{name} has {inner} input features, which is no multiple of the quantisation block of {BLOCK}"
    return None


# ------------------------------------------------------------------------------------------------------ 4-bit stacks


def stack_shape(weight: Tensor) -> torch.Size:
    """(E, out, in) of an expert stack, packed or not."""
    return weight.quant_state.shape if isinstance(weight, Params4bit) else weight.shape


def block_scales(state: bnbf.QuantState) -> Tensor:
    """One fp32 scale for each block of 64 weights, undoing double quantisation (QLoRA, arXiv 2305.14314, §3)."""
    if not state.nested:
        return state.absmax.float()
    return bnbf.dequantize_blockwise(state.absmax, state.state2).float() + state.offset


class Unpacker:
    """Gives expert e's weight matrix (out, in) in the compute dtype; a plain tensor for an unquantised stack."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight, self.dtype = weight.detach(), dtype
        self.packed = isinstance(weight, Params4bit)
        if self.packed:
            state = weight.quant_state
            experts, self.rows, self.columns = state.shape
            self.state, self.scales = state, block_scales(state).view(experts, -1)
            self.weight = self.weight.view(experts, -1)
            # bitsandbytes unpacks to fp32, fp16 and bf16
            self.raw = dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32

    def __call__(self, e: int) -> Tensor:
        if not self.packed:
            return self.weight[e].to(self.dtype)
        state = bnbf.QuantState(
            absmax=self.scales[e],
            shape=torch.Size((self.rows, self.columns)),
            code=self.state.code,
            blocksize=self.state.blocksize,
            quant_type=self.state.quant_type,
            dtype=self.raw,
        )
        return bnbf.dequantize_4bit(self.weight[e].view(-1, 1), quant_state=state).to(self.dtype)


@torch.no_grad()
def dequantize_stack(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole stack (E, out, in), unpacked. For tests, merging and teaching; training never calls it."""
    unpack = Unpacker(weight, dtype)
    return torch.stack([unpack(e) for e in range(stack_shape(weight)[0])])


def quantize_stack(weight: Tensor, double_quant: bool = True) -> Params4bit:
    """A stack (E, out, in) packed into NF4 on its own device."""
    packed = Params4bit(
        weight.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=double_quant, blocksize=BLOCK
    )
    packed = packed.to(weight.device)
    if packed.quant_state is None:
        raise RuntimeError(f"bitsandbytes did not quantise on {weight.device}: run `python -m helpers doctor`")
    return packed


# -------------------------------------------------------------------------------------------------------- the maths


def _dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Dropout from its own generator: backward draws the same mask again instead of keeping it."""
    if p == 0.0:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty(x.shape, device=x.device).bernoulli_(1 - p, generator=generator).to(x.dtype)
    return x * keep.div_(1 - p)


def _linear(x: Tensor, w: Tensor, lora: tuple | None, seed: int) -> Tensor:
    """x (n, in) → (n, out) through W + B·A."""
    y = x @ w.T
    if lora is not None:
        a, b, p = lora
        y.addmm_(_dropout(x, p, seed) @ a.T, b.T)
    return y


def _linear_backward(g: Tensor, x: Tensor, w: Tensor, lora: tuple | None, grads: tuple | None, seed: int) -> Tensor:
    """Gradient for x from gradient g of the output; writes this expert's (∂A, ∂B) into `grads`."""
    gx = g @ w
    if lora is not None:
        a, b, p = lora
        through = g @ b  # (n, r)
        dropped = _dropout(x, p, seed)
        grads[1].copy_(g.T @ (dropped @ a.T))
        grads[0].copy_(through.T @ dropped)
        # the same mask as on x, since dropout is a product with it
        gx += _dropout(through @ a, p, seed) if p else through @ a
    return gx


class _ExpertMLP(torch.autograd.Function):
    """The expert MLP of one layer.

    x (T, H); index (T, k) expert ids; weight (T, k) routing weights; A1 (E, r, H), B1 (E, 2I, r), A2 (E, r, I), B2 (E, H, r)
    or None. The gradient of a routing weight is ⟨∂L/∂a, a⟩ with a the gated activation, so expert outputs are not kept.
    """

    @staticmethod
    def forward(ctx, module, x, index, weight, a1, b1, a2, b2, p1, p2, seed):
        k = index.shape[1]
        flat = index.reshape(-1)
        order = flat.argsort(stable=True)  # assignments sorted by expert
        token = order // k
        ends = torch.bincount(flat, minlength=module.num_experts).cumsum(0).tolist()  # the only host sync
        ctx.module, ctx.ends, ctx.p, ctx.seed = module, ends, (p1, p2), seed
        keep = any(ctx.needs_input_grad)
        out, kept = torch.zeros_like(x), []
        scale = weight.reshape(-1)[order].unsqueeze(1).to(x.dtype)
        for e, s, t, up, down, lora1, lora2 in _ExpertMLP.walk(ctx, x.dtype, a1, b1, a2, b2):
            rows = token[s:t]
            h = _linear(x[rows], up(e), lora1, seed + 2 * e)
            y = _linear(module._apply_gate(h), down(e), lora2, seed + 2 * e + 1)
            out.index_add_(0, rows, y.mul_(scale[s:t]))
            if keep:
                kept.append(h)
        ctx.save_for_backward(x, weight, order, a1, b1, a2, b2, *kept)
        return out

    @staticmethod
    def walk(ctx, dtype, a1, b1, a2, b2) -> Iterator[tuple]:
        """(e, first row, last row, unpackers, LoRA factors) of every expert that has tokens."""
        up, down = (Unpacker(getattr(ctx.module, name), dtype) for name in STACKS)
        start = 0
        for e, end in enumerate(ctx.ends):
            if end > start:
                lora1 = None if a1 is None else (a1[e], b1[e], ctx.p[0])
                lora2 = None if a2 is None else (a2[e], b2[e], ctx.p[1])
                yield e, start, end, up, down, lora1, lora2
            start = end

    @staticmethod
    def backward(ctx, grad):
        x, weight, order, a1, b1, a2, b2, *kept = ctx.saved_tensors
        token = order // weight.shape[1]
        scale = weight.reshape(-1)[order].unsqueeze(1).to(x.dtype)
        gx, gw = torch.zeros_like(x), torch.zeros_like(weight).reshape(-1)
        ga1, gb1, ga2, gb2 = (None if f is None else torch.zeros_like(f) for f in (a1, b1, a2, b2))
        for (e, s, t, up, down, lora1, lora2), h in zip(_ExpertMLP.walk(ctx, x.dtype, a1, b1, a2, b2), kept, strict=True):
            rows = token[s:t]
            with torch.enable_grad():  # the gate is the model's own function, so autograd differentiates it
                h = h.detach().requires_grad_()
                gated = ctx.module._apply_gate(h)
            a = gated.detach()
            seed1, seed2 = ctx.seed + 2 * e, ctx.seed + 2 * e + 1
            # The routing weight w stands behind `down`. Leaving it out of the gradient and putting it on the input gives
            # ∂L/∂(w·a) in one pass, from which both ∂L/∂w = ⟨·, a⟩ and ∂L/∂a = w·(·) follow.
            w = scale[s:t]
            into2 = None if lora2 is None else (ga2[e], gb2[e])
            g_wa = _linear_backward(grad[rows], a * w, down(e), lora2, into2, seed2)
            gw[order[s:t]] = (g_wa * a).sum(-1).to(gw.dtype)
            (gh,) = torch.autograd.grad(gated, h, g_wa.mul_(w))
            into1 = None if lora1 is None else (ga1[e], gb1[e])
            gx.index_add_(0, rows, _linear_backward(gh, x[rows], up(e), lora1, into1, seed1))
        return None, gx, None, gw.view_as(weight), ga1, gb1, ga2, gb2, None, None, None


def nf4_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The registered experts function: hidden_states (T, H), top_k_index and top_k_weights (T, k) → (T, H)."""
    stack = getattr(self, STACKS[0])
    dtype = stack.quant_state.dtype if isinstance(stack, Params4bit) else stack.dtype
    if hidden_states.dtype == torch.float64:  # reference runs
        dtype = torch.float64
    factors: list[Tensor | None] = []
    dropout: list[float] = []
    for name in STACKS:
        lora: Factors | None = self.__dict__.get("lora_factors", {}).get(name)
        factors += [None, None] if lora is None else [lora.A.to(dtype), lora.B.to(dtype)]
        dropout.append(lora.dropout if lora is not None and self.training else 0.0)
    # Drawn from torch's CPU generator, which checkpointing restores: the recomputation drops the same entries.
    seed = int(torch.randint(2**31, ())) if any(dropout) else 0
    with torch.autocast(hidden_states.device.type, enabled=False):  # one compute dtype; autocast would mix two
        out = _ExpertMLP.apply(self, hidden_states.to(dtype), top_k_index, top_k_weights, *factors, *dropout, seed)
    return out.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, nf4_experts_forward)
