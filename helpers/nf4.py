"""Stacks of expert matrices in NF4: packed slice by slice, and unpacked an expert, or a piece of one, at a time.

A packed stack is bitsandbytes' own parameter (`Params4bit`), codes and scales as its `quantize_4bit` makes them, with the 3-D
shape (E, out, in) kept in its state. Blocks of 64 weights share a scale and never straddle rows or experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import bitsandbytes.functional as bnbf
import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Params4bit
from torch import Tensor

from helpers import fused

BLOCK = 64  # weights that share one scale; never straddles experts because in_features is a multiple of it
SLICE = {"cpu": 2**20, "cuda": 2**28}  # weights quantised at a time; multiples of BLOCK
PIECE = {"cpu": 2**20}  # weights unpacked at a time: 4 MiB stay in the processor's cache; a GPU takes a whole expert
FUSED = {"cuda": 64}  # rows of an expert up to which bitsandbytes' fused product may be faster; it has none for CPUs


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
    their scales. Otherwise the scales of all are undone in one go, which is fewer kernels. `kernels`: unpack by that of
    `helpers.fused`, to the same bits.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, few: bool = False, kernels: bool = False):
        self.weight, self.dtype, self.kernels = weight.detach(), dtype, kernels
        self.packed = isinstance(weight, Params4bit)
        experts, self.rows, self.columns = stack_shape(weight)
        if self.packed:
            self.state = weight.quant_state
            self.weight = self.weight.view(-1)
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
        most = PIECE.get(self.weight.device.type, math.inf) if self.dtype.itemsize >= 4 else math.inf
        if not self.packed or self.rows * self.columns <= most:
            yield 0, self(e)
            return
        scales, step = self._scales(e), max(1, most // self.columns)
        for first in range(0, self.rows, step):
            yield first, self._rows(e, scales, first, min(first + step, self.rows))

    def over(self, spans: list[tuple[int, slice]]) -> Iterator[tuple[int, slice, Iterable[tuple[int, Tensor]]]]:
        """(e, its rows, the pieces of its matrix) of each expert. Several are unpacked in one go, with those between them."""
        if len(spans) == 1:
            yield *spans[0], self.pieces(spans[0][0])
            return
        first, last = spans[0][0], spans[-1][0] + 1
        if self.packed:
            stack = self._rows(first, self.scales[first:last].flatten(), 0, (last - first) * self.rows)
            stack = stack.view(last - first, self.rows, self.columns)
        else:
            stack = self.weight[first:last].to(self.dtype)
        for e, rows in spans:
            yield e, rows, [(0, stack[e - first])]

    def fuses(self, spans: list[tuple[int, slice]]) -> bool:
        """Whether experts have so few rows (decoding) that unpacking their weights would cost more than the product."""
        most = max(rows.stop - rows.start for _, rows in spans)
        return self.packed and self.dtype == self.raw and most <= FUSED.get(self.weight.device.type, 0)

    def times(self, x: Tensor, e: int) -> Tensor:
        """x (n, in) @ expert e's matrix, transposed → (n, out), by bitsandbytes: which kernel, it decides by shape and GPU."""
        codes, state = self._packed(e, self._scales(e), 0, self.rows)
        return matmul_4bit(x, codes, state)

    def _scales(self, e: int) -> Tensor:
        return self.scales[e] if self.scales is not None else block_scales(self.state, e * self.blocks, self.blocks)

    def _rows(self, e: int, scales: Tensor, first: int, last: int) -> Tensor:
        """Rows `first` to `last` counted from expert e's first, whose scales begin with `scales`; they may go beyond its last."""
        codes, state = self._packed(e, scales, first, last)
        if self.kernels:
            out = codes.new_empty((last - first, self.columns), dtype=self.dtype)
            fused.unpack(codes.view(-1), state.absmax, state.code, out)
            return out
        return bnbf.dequantize_4bit(codes, quant_state=state).to(self.dtype)

    def _packed(self, e: int, scales: Tensor, first: int, last: int) -> tuple[Tensor, bnbf.QuantState]:
        """The same rows as bitsandbytes keeps a matrix: codes (n/2, 1), and what to read them with."""
        start, end = first * self.columns, last * self.columns  # multiples of BLOCK, as `columns` is one
        state = bnbf.QuantState(
            absmax=scales[start // BLOCK : end // BLOCK],
            shape=torch.Size((last - first, self.columns)),
            code=self.state.code,
            blocksize=self.state.blocksize,
            quant_type=self.state.quant_type,
            dtype=self.raw,
        )
        before = e * self.rows * self.columns
        return self.weight[(before + start) // 2 : (before + end) // 2].view(-1, 1), state


@torch.no_grad()
def dequantize_stack(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole stack (E, out, in), unpacked. For tests, merging and teaching; training never calls it."""
    unpack = Unpacker(weight, dtype)
    return torch.stack([unpack(e) for e in range(stack_shape(weight)[0])])


def quantize_stack(weight: Tensor, double_quant: bool = True) -> Params4bit:
    """A stack (E, out, in) packed into NF4 on its own device: the codes and scales of bitsandbytes' `quantize_4bit`."""
    return quantize_matrices(weight, weight.shape, double_quant)


@torch.no_grad()
def quantize_matrices(matrices: Iterable[Tensor], shape: tuple[int, ...], double_quant: bool = True) -> Params4bit:
    """E matrices (out, in), given one after the other, packed into one NF4 stack of `shape` (E, out, in).

    Only the matrix at hand is needed, and of its quantisation only a slice at a time: on the CPU bitsandbytes' working
    memory is ten times its bf16 input. Blocks do not see each other, so slicing changes no code; it also keeps every call
    below the 2³¹ elements of the CUDA kernels. Raises ValueError for a matrix of another shape and for non-finite weights.
    """
    codes = scales = None
    at, count, ranges = 0, 0, []
    for matrix in matrices:
        if matrix.shape != torch.Size(shape[1:]):
            raise ValueError(f"expert {count} has shape {tuple(matrix.shape)}, the model wants {tuple(shape[1:])}")
        if codes is None:
            total = math.prod(shape)
            codes = torch.empty((total // 2, 1), dtype=torch.uint8, device=matrix.device)
            scales = torch.empty(total // BLOCK, dtype=torch.float32, device=matrix.device)
            dtype = matrix.dtype
        for piece in matrix.reshape(-1).split(SLICE.get(matrix.device.type, 2**28)):
            ranges.append(torch.stack(piece.aminmax()))  # CUDA's quantisation does not pass a NaN on to the scale
            packed, state = bnbf.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
            codes[at // 2 : (at + piece.numel()) // 2] = packed
            scales[at // BLOCK : (at + piece.numel()) // BLOCK] = state.absmax
            at += piece.numel()
        count += 1
    if count != shape[0]:
        raise ValueError(f"{count} experts were given, the model has {shape[0]}")
    if not torch.isfinite(torch.stack(ranges)).all():
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
