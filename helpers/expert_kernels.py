"""What experts do between two matrix products, as Triton kernels: one reading and one writing where torch has several.

A step of Mixtral-8x7B on an H200 spends much of its time there in torch's own kernels (benchmarks/experts_gpu.py, case
`profile`): drawing masks, multiplying by them, the gate and its derivative, adding the adapter's share, summing by token. All of
that waits for memory, so what counts is how often a tensor as wide as an expert passes. `helpers.fused` gives these kernels their
names as torch operators; only it imports this module, which needs Triton.

Sums are made in fp32 and rounded once, whatever the dtype. Which entries dropout keeps is a hash of (seed, row, column), so the
backward pass asks again and no mask is stored. The hash is PCG's output function for 32 bits, as recommended for such use by
Jarzynski and Olano, "Hash Functions for GPU Rendering" (JCGT 9(3), 2020).

n rows of an expert, H hidden size, I intermediate size, r LoRA rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helpers.fused import COLUMNS

ROWS, STEPS, WARPS = 16, 16, 4  # of a program's tile; how many of them it does, one below the other; its warps
BLOCKS = 32  # of 64 weights, that a program unpacks
VARYING = ("n", "first", "seed", "threshold")  # no kernel of its own for each value
DROP_BITS = 24


@triton.jit
def _hash(x):
    x = x * 747796405 + 2891336453
    x = ((x >> ((x >> 28) + 4)) ^ x) * 277803737
    return (x >> 22) ^ x


@triton.jit
def _kept(row, column, seed, threshold):
    """Whether dropout keeps an entry: (N,), (W,) → (N, W)."""
    by_row = _hash(_hash(row.to(tl.uint32)) + seed.to(tl.uint32))
    by_column = _hash(column.to(tl.uint32))
    return (_hash(by_row[:, None] + by_column[None, :]) >> 8).to(tl.int32) >= threshold


@triton.jit
def _thin_tile(thin, row, n, r: tl.constexpr, R: tl.constexpr):
    """(N, R): rows of a thin matrix (n, r), with zeros up to the size that tl.dot takes."""
    rank = tl.arange(0, R)
    inside = (row < n)[:, None] & (rank < r)[None, :]
    return tl.load(thin + row[:, None] * r + rank[None, :], mask=inside, other=0.0)


@triton.jit
def _of_a(a, column, WIDTH: tl.constexpr, r: tl.constexpr, R: tl.constexpr):
    """(R, W): columns of a factor A (r, m)."""
    rank = tl.arange(0, R)
    inside = (rank < r)[:, None] & (column < WIDTH)[None, :]
    return tl.load(a + rank[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)


@triton.jit
def _of_b(b, column, WIDTH: tl.constexpr, r: tl.constexpr, R: tl.constexpr):
    """(R, W): rows of a factor B (m, r), transposed."""
    rank = tl.arange(0, R)
    inside = (rank < r)[:, None] & (column < WIDTH)[None, :]
    return tl.load(b + column[None, :] * r + rank[:, None], mask=inside, other=0.0)


@triton.jit
def _place(WIDTH: tl.constexpr, N: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr):
    """What a program does: (its first row, its columns (W,), the number of its block of columns)."""
    blocks = tl.cdiv(WIDTH, W)
    block = tl.program_id(0) % blocks
    return tl.program_id(0) // blocks * (N * STEPS), block * W + tl.arange(0, W), block


@triton.jit
def _halves(
    h, thin, b_gate, b_up, row, column, inside, n,
    WIDTH: tl.constexpr, r: tl.constexpr, R: tl.constexpr, LORA: tl.constexpr,
):  # fmt: skip
    """Both halves (N, W) of the pre-activations in fp32: the gate's argument, and what it is multiplied by."""
    at = h + 2 * row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    u = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    if LORA:
        t = _thin_tile(thin, row, n, r, R)
        u += tl.dot(t, b_gate, input_precision="ieee")
        v += tl.dot(t, b_up, input_precision="ieee")
    return u, v


@triton.jit(do_not_specialize=VARYING)
def _unpack(codes, scales, table, out, n, N: tl.constexpr):
    """n blocks of 64 weights that share a scale: 8 words of 4 bytes, of which each holds two, the upper half the first.

    All in one layout, (N, 8 words, 8 weights of a word): no tile has to be turned round on its way.
    """
    block = tl.program_id(0) * N + tl.arange(0, N)
    inside, place = block < n, tl.arange(0, 8)
    word = tl.load(codes + block.to(tl.int64)[:, None] * 8 + place[None, :], mask=inside[:, None], other=0)
    shift = place // 2 * 8 + (1 - place % 2) * 4
    value = tl.load(table + ((word[:, :, None] >> shift[None, None, :]) & 15))
    value = value * tl.load(scales + block, mask=inside, other=0.0)[:, None, None]
    at = block.to(tl.int64)[:, None, None] * 64 + place[None, :, None] * 8 + place[None, None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside[:, None, None])


@triton.jit(do_not_specialize=VARYING)
def _take(
    x, token, rows, kept, n, seed, threshold,
    WIDTH: tl.constexpr, PLAIN: tl.constexpr, DROP: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    start, column, _ = _place(WIDTH, N, W, 1)
    row = start + tl.arange(0, N)
    inside = (row < n)[:, None] & (column < WIDTH)[None, :]
    source = tl.load(token + row, mask=row < n, other=0).to(tl.int64)
    value = tl.load(x + source[:, None] * WIDTH + column[None, :], mask=inside)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    if PLAIN:
        tl.store(rows + at, value, mask=inside)
    if DROP:
        keep = _kept(row, column, seed, threshold)
        tl.store(kept + at, tl.where(keep, value, tl.zeros_like(value)), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _gate(
    h, thin, b, gated, kept, n, first, seed, threshold,
    WIDTH: tl.constexpr, r: tl.constexpr, R: tl.constexpr, LORA: tl.constexpr, DROP: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    start, column, _ = _place(WIDTH, N, W, STEPS)
    b_gate, b_up = 0.0, 0.0
    if LORA:
        b_gate, b_up = _of_b(b, column, WIDTH, r, R), _of_b(b + WIDTH * r, column, WIDTH, r, R)
    for step in tl.range(STEPS, num_stages=2):  # the next tile is on its way
        row = start + step * N + tl.arange(0, N)
        inside = (row < n)[:, None] & (column < WIDTH)[None, :]
        wide = row.to(tl.int64)[:, None] * WIDTH
        u, v = _halves(h, thin, b_gate, b_up, row, column, inside, n, WIDTH, r, R, LORA)
        a = (u * tl.sigmoid(u) * v).to(gated.dtype.element_ty)
        tl.store(gated + wide + column[None, :], a, mask=inside)
        if DROP:
            keep = _kept(first + row, column, seed, threshold)
            tl.store(kept + wide + column[None, :], tl.where(keep, a, tl.zeros_like(a)), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _gate_back(
    h, thin1, b, g, thin2, a2, gh, kept, partial, n, first, seed, threshold,
    WIDTH: tl.constexpr, r1: tl.constexpr, R1: tl.constexpr, r2: tl.constexpr, R2: tl.constexpr,
    LORA1: tl.constexpr, LORA2: tl.constexpr, DROP: tl.constexpr, N: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    start, column, block = _place(WIDTH, N, W, STEPS)
    b_gate, b_up = 0.0, 0.0
    if LORA1:
        b_gate, b_up = _of_b(b, column, WIDTH, r1, R1), _of_b(b + WIDTH * r1, column, WIDTH, r1, R1)
    if LORA2:
        a_tile = _of_a(a2, column, WIDTH, r2, R2)
    for step in tl.range(STEPS, num_stages=2):
        row = start + step * N + tl.arange(0, N)
        inside = (row < n)[:, None] & (column < WIDTH)[None, :]
        wide = row.to(tl.int64)[:, None] * WIDTH
        u, v = _halves(h, thin1, b_gate, b_up, row, column, inside, n, WIDTH, r1, R1, LORA1)
        ga = tl.load(g + wide + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if DROP:
            keep = _kept(first + row, column, seed, threshold)
        if LORA2:
            part = tl.dot(_thin_tile(thin2, row, n, r2, R2), a_tile, input_precision="ieee")
            if DROP:
                part = tl.where(keep, part, 0.0)
            ga += part
        s = tl.sigmoid(u)
        silu = u * s
        a = silu * v
        d_u = ga * v * (s + silu * (1 - s))
        tl.store(gh + 2 * wide + column[None, :], d_u.to(gh.dtype.element_ty), mask=inside)
        tl.store(gh + 2 * wide + WIDTH + column[None, :], (ga * silu).to(gh.dtype.element_ty), mask=inside)
        if LORA2:
            if DROP:
                left = tl.where(keep, a, 0.0)
            else:
                left = a
            tl.store(kept + wide + column[None, :], left.to(kept.dtype.element_ty), mask=inside)
        # beyond the last row and column all three are zero, so they add nothing
        tl.store(partial + row.to(tl.int64) * tl.cdiv(WIDTH, W) + block, tl.sum(ga * a, axis=1), mask=row < n)


@triton.jit(do_not_specialize=VARYING)
def _thin_product(
    thin, a, out, n, first, seed, threshold,
    WIDTH: tl.constexpr, r: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    start, column, _ = _place(WIDTH, N, W, STEPS)
    tile = _of_a(a, column, WIDTH, r, R)
    for step in range(STEPS):
        row = start + step * N + tl.arange(0, N)
        inside = (row < n)[:, None] & (column < WIDTH)[None, :]
        part = tl.dot(_thin_tile(thin, row, n, r, R), tile, input_precision="ieee")
        if DROP:
            part = tl.where(_kept(first + row, column, seed, threshold), part, 0.0)
        tl.store(out + row.to(tl.int64)[:, None] * WIDTH + column[None, :], part.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _by_token(rows, place, weight, out, n, WIDTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    start, column, _ = _place(WIDTH, N, W, 1)
    token = start + tl.arange(0, N)
    inside = (token < n)[:, None] & (column < WIDTH)[None, :]
    total = tl.zeros((N, W), dtype=tl.float32)
    for j in range(K):
        at = tl.load(place + token * K + j, mask=token < n, other=0).to(tl.int64)
        w = tl.load(weight + token * K + j, mask=token < n, other=0.0).to(tl.float32)
        total += w[:, None] * tl.load(rows + at[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64)[:, None] * WIDTH + column[None, :], total.to(out.dtype.element_ty), mask=inside)


def _threshold(dropout: float) -> int:
    return round(dropout * 2**DROP_BITS)


def _padded(rank: int) -> int:
    """What tl.dot takes for a rank: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(rank))


def _grid(n: int, width: int, steps: int = 1) -> tuple[int]:
    """All in one dimension: the others end at 65,535."""
    return (triton.cdiv(n, ROWS * steps) * triton.cdiv(width, COLUMNS),)


def _whole(*tensors: Tensor | None) -> None:
    """The kernels go through memory row after row: anything else would be read wrongly."""
    if loose := [tuple(t.shape) for t in tensors if t is not None and not t.is_contiguous()]:
        raise ValueError(f"tensors of the shapes {loose} are not contiguous")


def unpack(codes: Tensor, scales: Tensor, table: Tensor, out: Tensor) -> None:
    _whole(codes, scales, table, out)
    _unpack[(triton.cdiv(len(scales), BLOCKS),)](
        codes.view(torch.int32), scales, table, out, len(scales), BLOCKS, num_warps=WARPS
    )


def take(x: Tensor, token: Tensor, rows: Tensor | None, kept: Tensor | None, seed: int, dropout: float) -> None:
    _whole(x, token, rows, kept)
    (n,), width = token.shape, x.shape[1]
    some = rows if rows is not None else kept
    _take[_grid(n, width)](
        x, token, some if rows is None else rows, some if kept is None else kept, n, seed, _threshold(dropout),
        width, rows is not None, kept is not None, ROWS, COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def gate(
    h: Tensor, thin: Tensor | None, b: Tensor | None, gated: Tensor, kept: Tensor | None, first: int, seed: int, dropout: float
) -> None:
    _whole(h, thin, b, gated, kept)
    (n, width), rank = gated.shape, 1 if thin is None else thin.shape[1]
    _gate[_grid(n, width, STEPS)](
        h, h if thin is None else thin, h if b is None else b, gated, gated if kept is None else kept,
        n, first, seed, _threshold(dropout),
        width, rank, _padded(rank), thin is not None, kept is not None, ROWS, COLUMNS, STEPS, num_warps=WARPS,
    )  # fmt: skip


def gate_back(
    h: Tensor, thin1: Tensor | None, b: Tensor | None, g: Tensor, thin2: Tensor | None, a2: Tensor | None,
    gh: Tensor, kept: Tensor | None, partial: Tensor, first: int, seed: int, dropout: float,
) -> None:  # fmt: skip
    _whole(h, thin1, b, g, thin2, a2, gh, kept, partial)
    n, width = g.shape
    r1, r2 = (1 if thin is None else thin.shape[1] for thin in (thin1, thin2))
    _gate_back[_grid(n, width, STEPS)](
        h, h if thin1 is None else thin1, h if b is None else b, g, g if thin2 is None else thin2, g if a2 is None else a2,
        gh, gh if kept is None else kept, partial, n, first, seed, _threshold(dropout),
        width, r1, _padded(r1), r2, _padded(r2), thin1 is not None, thin2 is not None, dropout > 0,
        ROWS, COLUMNS, STEPS, num_warps=WARPS,
    )  # fmt: skip


def thin_product(thin: Tensor, a: Tensor, out: Tensor, first: int, seed: int, dropout: float) -> None:
    _whole(thin, a, out)
    (n, width), rank = out.shape, thin.shape[1]
    _thin_product[_grid(n, width, STEPS)](
        thin, a, out, n, first, seed, _threshold(dropout),
        width, rank, _padded(rank), dropout > 0, ROWS, COLUMNS, STEPS, num_warps=WARPS,
    )  # fmt: skip


def by_token(rows: Tensor, place: Tensor, weight: Tensor, out: Tensor) -> None:
    _whole(rows, place, weight, out)
    n, width = out.shape
    if n:
        _by_token[_grid(n, width)](
            rows, place, weight, out, n, width, weight.shape[1], ROWS, COLUMNS, num_warps=WARPS
        )  # fmt: skip
