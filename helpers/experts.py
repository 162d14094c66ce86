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

import functools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import bitsandbytes.functional as bnbf
import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "nf4"
STACKS = ("gate_up_proj", "down_proj")
BLOCK = 64  # weights that share one scale; never straddles experts because in_features is a multiple of it
_SLICE = {"cpu": 2**20, "cuda": 2**28}  # weights quantised at a time; multiples of BLOCK
_PIECE = {"cpu": 2**20}  # weights unpacked at a time: 4 MiB stay in the processor's cache; a GPU takes a whole expert


class Factors(NamedTuple):
    """LoRA factors of a whole expert stack, as handed over by the adapter layer."""

    A: Tensor  # (E, r, in)
    B: Tensor  # (E, out, r)
    dropout: float = 0.0
    scale: float = 1.0  # alpha / r


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


def block_scales(state: bnbf.QuantState, first: int = 0, count: int | None = None) -> Tensor:
    """One fp32 scale for each block of 64 weights, undoing double quantisation (QLoRA, arXiv 2305.14314, §3).

    `count` scales from `first` on, which must begin and end with a block of the second quantisation; all by default.
    """
    last = len(state.absmax) if count is None else first + count
    if not state.nested:
        return state.absmax[first:last].float()
    second = state.state2
    inner = second.absmax[first // second.blocksize : -(-last // second.blocksize)]
    codes = state.absmax[first:last]
    return bnbf.dequantize_blockwise(codes, absmax=inner, code=second.code, blocksize=second.blocksize) + state.offset


class Unpacker:
    """Gives expert e's weight matrix (out, in) in the compute dtype; a plain tensor for an unquantised stack.

    `few` says that only some experts will be asked for (decoding one token): then nothing of the others is touched, not even
    their scales. Otherwise the scales of all are undone in one go, which is fewer kernels.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, few: bool = False):
        self.weight, self.dtype = weight.detach(), dtype
        self.packed = isinstance(weight, Params4bit)
        experts, self.rows, self.columns = stack_shape(weight)
        if self.packed:
            self.state = weight.quant_state
            self.weight = self.weight.view(experts, -1)
            self.blocks = self.rows * self.columns // BLOCK  # of one expert
            # Double quantisation has blocks of its own (256 scales): an expert stands alone if it fills whole ones.
            alone = few and self.state.nested and self.blocks % self.state.state2.blocksize == 0
            self.scales = None if alone else block_scales(self.state).view(experts, -1)
            # bitsandbytes unpacks to fp32, fp16 and bf16
            self.raw = dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32

    def __call__(self, e: int) -> Tensor:
        if not self.packed:
            return self.weight[e].to(self.dtype)
        return self._rows(e, self._scales(e), 0, self.rows)

    def pieces(self, e: int) -> Iterator[tuple[int, Tensor]]:
        """Expert e's matrix in horizontal pieces, each with the number of its first row.

        Half precision gets it in one: the sum over pieces in a backward pass would be rounded after every one.
        """
        most = _PIECE.get(self.weight.device.type, math.inf) if self.dtype.itemsize >= 4 else math.inf
        if not self.packed or self.rows * self.columns <= most:
            yield 0, self(e)
            return
        scales, step = self._scales(e), max(1, most // self.columns)
        for first in range(0, self.rows, step):
            yield first, self._rows(e, scales, first, min(first + step, self.rows))

    def _scales(self, e: int) -> Tensor:
        return self.scales[e] if self.scales is not None else block_scales(self.state, e * self.blocks, self.blocks)

    def _rows(self, e: int, scales: Tensor, first: int, last: int) -> Tensor:
        start, end = first * self.columns, last * self.columns  # multiples of BLOCK, as `columns` is one
        state = bnbf.QuantState(
            absmax=scales[start // BLOCK : end // BLOCK],
            shape=torch.Size((last - first, self.columns)),
            code=self.state.code,
            blocksize=self.state.blocksize,
            quant_type=self.state.quant_type,
            dtype=self.raw,
        )
        codes = self.weight[e, start // 2 : end // 2]
        return bnbf.dequantize_4bit(codes.view(-1, 1), quant_state=state).to(self.dtype)


@torch.no_grad()
def dequantize_stack(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole stack (E, out, in), unpacked. For tests, merging and teaching; training never calls it."""
    unpack = Unpacker(weight, dtype)
    return torch.stack([unpack(e) for e in range(stack_shape(weight)[0])])


def quantize_stack(weight: Tensor, double_quant: bool = True) -> Params4bit:
    """A stack (E, out, in) packed into NF4 on its own device: the codes and scales of bitsandbytes' `quantize_4bit`."""
    return pack(weight, weight.shape, double_quant)


@torch.no_grad()
def pack(matrices: Iterable[Tensor], shape: tuple[int, ...], double_quant: bool = True) -> Params4bit:
    """E matrices (out, in), given one after the other, packed into one NF4 stack of `shape` (E, out, in).

    Only the matrix at hand is needed, and of its quantisation only a slice at a time: on the CPU bitsandbytes' working
    memory is ten times its bf16 input. Blocks do not see each other, so slicing changes no code; it also keeps every call
    below the 2³¹ elements of the CUDA kernels. Raises ValueError for a matrix of another shape and for non-finite weights.
    """
    codes = scales = None
    at, count = 0, 0
    for matrix in matrices:
        if matrix.shape != torch.Size(shape[1:]):
            raise ValueError(f"expert {count} has shape {tuple(matrix.shape)}, the model wants {tuple(shape[1:])}")
        if codes is None:
            total = math.prod(shape)
            codes = torch.empty((total // 2, 1), dtype=torch.uint8, device=matrix.device)
            scales = torch.empty(total // BLOCK, dtype=torch.float32, device=matrix.device)
            dtype = matrix.dtype
        for piece in matrix.reshape(-1).split(_SLICE.get(matrix.device.type, 2**28)):
            packed, state = bnbf.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
            codes[at // 2 : (at + piece.numel()) // 2] = packed
            scales[at // BLOCK : (at + piece.numel()) // BLOCK] = state.absmax
            at += piece.numel()
        count += 1
    if count != shape[0]:
        raise ValueError(f"{count} experts were given, the model has {shape[0]}")
    if not torch.isfinite(scales).all():
        raise ValueError("the weights are not finite: there is a NaN or an infinity among them")
    return pack_codes(codes, scales, shape, dtype, double_quant)


@functools.cache
def _scale_code() -> Tensor:
    """bitsandbytes' 8-bit code book for scales. Left to itself it keeps the first one it needs, be that on the meta device."""
    with torch.device("cpu"):
        return bnbf.create_dynamic_map()


def pack_codes(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool) -> Params4bit:
    """The parameter that bitsandbytes would have made of these codes (n/2, 1) uint8 and scales (n/64,) fp32."""
    code = bnbf.get_4bit_type("nf4", device=codes.device)
    state = bnbf.QuantState(scales, torch.Size(shape), code, BLOCK, "nf4", dtype)
    if double_quant:
        state.offset = scales.mean()
        state.absmax, state.state2 = bnbf.quantize_blockwise(scales - state.offset, _scale_code(), blocksize=256)
        state.nested = True
    return Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4",
        bnb_quantized=True,
    )  # fmt: skip


@torch.no_grad()
def random_packed(
    shape: tuple[int, ...],
    std: float,
    dtype: torch.dtype,
    generator: torch.Generator | None,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
) -> Params4bit:
    """Random NF4 weights of a standard deviation, that were never anything but 4-bit; the generator must be the device's.

    The codes are drawn evenly and the scales around the value that gives `std`. No real matrix looks quite like this (fewer
    of its codes are extreme), but it costs what one costs.
    """
    total = math.prod(shape)
    codes = torch.randint(256, (-(-total // 2), 1), dtype=torch.uint8, device=device, generator=generator)
    rms = bnbf.get_4bit_type("nf4", device=device).square().mean().sqrt()
    jitter = torch.rand(-(-total // BLOCK), device=device, generator=generator).sub_(0.5).mul_(0.2)
    return pack_codes(codes, jitter.add_(1).mul_(std / rms), shape, dtype, double_quant)


# -------------------------------------------------------------------------------------------------------- the maths


def _dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Dropout from its own generator: backward draws the same mask again instead of keeping it."""
    if p == 0.0:
        return x
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return keep.div_(1 - p).mul_(x)


class _Adapter(NamedTuple):
    """LoRA of one expert's projection."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    dropout: float
    scale: float


def _thin(x: Tensor, few: Tensor) -> Tensor:
    """x (n, m) @ few (m, r) for a small r. A CPU is 1.5 to 8 times as fast at the product of the transposes."""
    return (few.T.contiguous() @ x.T).T if x.device.type == "cpu" else x @ few


def _linear(x: Tensor, unpack: Unpacker, e: int, lora: _Adapter | None, seed: int) -> Tensor:
    """x (n, in) → (n, out) through W + s·B·A of expert e."""
    y = None
    for first, w in unpack.pieces(e):
        if y is None and len(w) == unpack.rows:
            y = x @ w.T
        else:
            y = x.new_empty(len(x), unpack.rows) if y is None else y
            torch.mm(x, w.T, out=y[:, first : first + len(w)])
    if lora is not None:
        y.addmm_(_thin(_dropout(x, lora.dropout, seed), lora.A.T), lora.B.T, alpha=lora.scale)
    return y


def _into_input(g: Tensor, unpack: Unpacker, e: int) -> Tensor:
    """Gradient g (n, out) of a projection's output → (n, in), through the frozen weight."""
    gx = None
    for first, w in unpack.pieces(e):
        part = g[:, first : first + len(w)]
        gx = part @ w if gx is None else gx.addmm_(part, w)
    return gx


def _ends(chosen: Tensor, experts: int) -> list[int]:
    """Where each expert's stretch ends in `chosen`, the sorted expert ids. On the meta device, which has none: evenly."""
    if chosen.is_meta:
        return [len(chosen) * (e + 1) // experts for e in range(experts)]
    # The only time that Python waits for the GPU; bincount would wait more often.
    return torch.searchsorted(chosen, torch.arange(experts, device=chosen.device, dtype=chosen.dtype), right=True).tolist()


def _row_blocks(h: Tensor, whole: bool) -> list[slice]:
    """Rows to apply the gate to at a time: what stays in a CPU's cache, so that its many steps do not wait for memory."""
    step = len(h) if whole else max(1, int(min(_PIECE.get(h.device.type, math.inf), h.numel())) // h.shape[1])
    return [slice(first, first + step) for first in range(0, len(h), step)]


class _ExpertMLP(torch.autograd.Function):
    """The expert MLP of one layer.

    x (T, H); index (T, k) expert ids; weight (T, k) routing weights; A1 (E, r, H), B1 (E, 2I, r), A2 (E, r, I), B2 (E, H, r)
    or None. The gradient of a routing weight is ⟨∂L/∂a, a⟩ with a the gated activation, so expert outputs are not kept.
    """

    @staticmethod
    def forward(ctx, module, x, index, weight, a1, b1, a2, b2, rules, seed):
        k = index.shape[1]
        flat = index.reshape(-1)
        order = flat.argsort(stable=True)  # assignments sorted by expert
        token = order // k
        ends = _ends(flat[order], module.num_experts)
        ctx.module, ctx.ends, ctx.rules, ctx.seed = module, ends, rules, seed
        keep = any(ctx.needs_input_grad)
        out, kept = torch.zeros_like(x), []
        scale = weight.reshape(-1)[order].unsqueeze(1).to(x.dtype)
        for e, s, t, up, down, lora1, lora2 in _ExpertMLP.walk(ctx, x.dtype, a1, b1, a2, b2):
            rows = token[s:t]
            h = _linear(x[rows], up, e, lora1, seed + 2 * e)
            a = torch.cat([module._apply_gate(h[block]) for block in _row_blocks(h, whole=False)])
            y = _linear(a, down, e, lora2, seed + 2 * e + 1)
            out.index_add_(0, rows, y.mul_(scale[s:t]))
            if keep:
                kept.append(h)
        ctx.save_for_backward(x, weight, order, a1, b1, a2, b2, *kept)
        return out

    @staticmethod
    def walk(ctx, dtype, a1, b1, a2, b2) -> Iterator[tuple]:
        """(e, first row, last row, unpackers, LoRA factors) of every expert that has tokens."""
        used = sum(end > start for start, end in zip([0, *ctx.ends], ctx.ends, strict=False))
        up, down = (Unpacker(getattr(ctx.module, name), dtype, few=2 * used <= len(ctx.ends)) for name in STACKS)
        start = 0
        for e, end in enumerate(ctx.ends):
            if end > start:
                lora1 = None if a1 is None else _Adapter(a1[e], b1[e], *ctx.rules[0])
                lora2 = None if a2 is None else _Adapter(a2[e], b2[e], *ctx.rules[1])
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
            rows, w, seed = token[s:t], scale[s:t], ctx.seed + 2 * e
            # The routing weight w is left out of the large gradients and put on thin or small tensors instead. So ∂L/∂w is
            # ⟨g, a⟩ with the g at hand, and no tensor as wide as the experts has to be multiplied by it.
            g = grad[rows]
            g_a = _into_input(g, down, e)
            if lora2 is not None:
                through = _thin(g, lora2.B).mul_(lora2.scale)
                g_a = _add_dropped(g_a, through, lora2, seed + 1)
                into_b = h.new_empty(len(h), len(lora2.A))
            gh = torch.empty_like(h)
            for block in _row_blocks(h, whole=lora2 is not None and lora2.dropout > 0):
                with torch.enable_grad():  # the gate is the model's own function, so autograd differentiates it
                    part = h[block].detach().requires_grad_()
                    gated = ctx.module._apply_gate(part)
                a = gated.detach()
                gw[order[s:t][block]] = torch.bmm(g_a[block].unsqueeze(1), a.unsqueeze(2)).flatten().to(gw.dtype)
                (gh[block],) = torch.autograd.grad(gated, part, g_a[block])
                if lora2 is not None:
                    a = _dropout(a, lora2.dropout, seed + 1)
                    into_b[block] = _thin(a, lora2.A.T)
                    ga2[e].addmm_((through[block] * w[block]).T, a)
            if lora2 is not None:
                gb2[e] = _thin(g.T, into_b.mul_(lora2.scale * w))
            del g_a
            into_x = _into_input(gh, up, e).mul_(w)
            if lora1 is not None:
                through = _thin(gh, lora1.B).mul_(lora1.scale * w)
                into_x = _add_dropped(into_x, through, lora1, seed)
                dropped = _dropout(x[rows], lora1.dropout, seed)
                gb1[e] = _thin(gh.T, _thin(dropped, lora1.A.T).mul_(lora1.scale * w))
                ga1[e] = through.T @ dropped
            gx.index_add_(0, rows, into_x)
        return None, gx, None, gw.view_as(weight), ga1, gb1, ga2, gb2, None, None


def _add_dropped(gx: Tensor, through: Tensor, lora: _Adapter, seed: int) -> Tensor:
    """gx + through·A, with the mask that dropout had on the input: it is a product with it, so its gradient is too."""
    return gx.add_(_dropout(through @ lora.A, lora.dropout, seed)) if lora.dropout else gx.addmm_(through, lora.A)


def nf4_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The registered experts function: hidden_states (T, H), top_k_index and top_k_weights (T, k) → (T, H)."""
    stack = getattr(self, STACKS[0])
    dtype = stack.quant_state.dtype if isinstance(stack, Params4bit) else stack.dtype
    if hidden_states.dtype == torch.float64:  # reference runs
        dtype = torch.float64
    factors: list[Tensor | None] = []
    rules: list[tuple[float, float]] = []  # dropout and scale of both
    for name in STACKS:
        lora: Factors | None = self.__dict__.get("lora_factors", {}).get(name)
        factors += [None, None] if lora is None else [lora.A.to(dtype), lora.B.to(dtype)]
        rules.append((lora.dropout if self.training else 0.0, lora.scale) if lora is not None else (0.0, 1.0))
    # Drawn from torch's CPU generator, which checkpointing restores: the recomputation drops the same entries.
    seed = int(torch.randint(2**31, ())) if any(dropout for dropout, _ in rules) else 0
    kind = "cpu" if hidden_states.is_meta else hidden_states.device.type  # the meta device knows no autocast
    with torch.autocast(kind, enabled=False):  # one compute dtype; autocast would mix two
        out = _ExpertMLP.apply(self, hidden_states.to(dtype), top_k_index, top_k_weights, *factors, rules, seed)
    return out.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, nf4_experts_forward)
