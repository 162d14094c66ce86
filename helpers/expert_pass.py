"""One pass over the experts of a layer, forward and backward, group by group: what `experts` puts together.

Every piece comes in torch's own kernels; those between two matrix products also in the kernels of `helpers.fused`, where they are
switched on. Those round less: what they do not write down stays in fp32, and so do routing weights.

n rows of a group: assignments of tokens to its experts. H hidden size, I intermediate size, T tokens, k experts per token, E
experts, r LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import fused
from helpers.nf4 import PIECE, Unpacker

STACKS = ("gate_up_proj", "down_proj")
GROUP = {"cuda": 2**26, "meta": 2**26}  # numbers, of weights and of activations, of experts handled together; a CPU: one by one
MOST_ROWS = 2**15  # as a batch of small products: CUDA's grids end at 65,535, and not all kernels mind it


class Group(NamedTuple):
    """Experts that are handled together, and their rows of the assignments sorted by expert."""

    number: int
    rows: slice
    spans: list[tuple[int, slice]]  # an expert, and its rows counted from the group's first

    def within(self, block: slice) -> Iterator[tuple[int, slice]]:
        """The spans in a block of the group's rows."""
        for e, rows in self.spans:
            first, last = max(rows.start, block.start), min(rows.stop, block.stop)
            if first < last:
                yield e, slice(first, last)


class PreGate(NamedTuple):
    """What is kept of a group for the backward pass: its pre-activations.

    Either whole, or without the adapter's share, which whoever reads them adds from its thin half.
    """

    wide: Tensor  # (n, 2I)
    thin: Tensor | None  # (n, r)

    def share(self, e: int, rows: slice, b1: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The two factors of the share that expert e's rows lack."""
        return (None, None) if self.thin is None else (self.thin[rows], b1[e].to(self.wide.dtype).contiguous())


class Rule(NamedTuple):
    """What is done to an adapter's product beside multiplying."""

    dropout: float = 0.0
    scale: float = 1.0  # alpha / r, and 1 / (1 - dropout)


class Pass:
    """One pass over the experts of a layer. Its rows are the T·k assignments of tokens to experts, sorted by expert.

    Gathering, gate and dropout are done for a group of experts at once: 64 small experts, one after the other, would keep a
    GPU waiting for Python. Matrix products are done expert by expert, and so are fused gates, which hold an adapter's product.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        order: Tensor,
        k: int,
        groups: list[Group],
        rules: list[Rule],
        seed: int,
        kernels: bool | None = None,  # those of `helpers.fused`; None: as they are switched. Backward goes as forward went
    ):
        self.module, self.order, self.k, self.groups, self.rules, self.seed = module, order, k, groups, rules, seed
        self.token = order // k
        self.kernels = fused.usable(module, order, dtype) if kernels is None else kernels
        # decoding one token: what belongs to the other experts should not be touched at all
        self.few = 2 * sum(len(group.spans) for group in groups) <= module.num_experts
        self.up, self.down = (Unpacker(getattr(module, name), dtype, self.few, self.kernels) for name in STACKS)

    def fuses(self, group: Group) -> bool:
        """Whether a group goes through the kernels of `helpers.fused`. Few rows (decoding) are no work for them."""
        return self.kernels and not self.up.fuses(group.spans)

    def draw(self, group: Group, projection: int) -> tuple[int, float]:
        """(seed, dropout) for those kernels."""
        return (self.seed + 2 * group.number + projection) % 2**31, self.rules[projection].dropout

    def mask(self, group: Group, projection: int) -> Tensor | None:
        """What dropout leaves of a projection's input (n, in): from a generator of its own, so that backward draws it again."""
        dropout = self.rules[projection].dropout
        if not dropout:
            return None
        size = (group.rows.stop - group.rows.start, (self.up, self.down)[projection].columns)
        mask = torch.empty(size, dtype=torch.bool, device=self.order.device)
        generator = None if mask.is_meta else torch.Generator(mask.device).manual_seed(self.seed + 2 * group.number + projection)
        return mask.bernoulli_(1 - dropout, generator=generator)

    def take(self, group: Group, x: Tensor) -> Tensor:
        """x (T, H) → its rows (n, H)."""
        return x[self.token[group.rows]]

    def take_both(self, group: Group, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, H) → its rows (n, H), and what dropout leaves of them."""
        if not self.fuses(group):
            rows = self.take(group, x)
            return rows, _kept(rows, self.mask(group, 0))
        token, draw = self.token[group.rows], self.draw(group, 0)
        rows = x.new_empty(len(token), x.shape[1])
        kept = torch.empty_like(rows) if draw[1] else None
        fused.take(x, token, rows, kept, *draw)
        return rows, rows if kept is None else kept

    def take_kept(self, group: Group, x: Tensor) -> Tensor:
        """By kernel: what dropout leaves of x's rows alone."""
        token = self.token[group.rows]
        kept = x.new_empty(len(token), x.shape[1])
        fused.take(x, token, None, kept, *self.draw(group, 0))
        return kept

    def gate_up(self, group: Group, x: Tensor, a: Tensor | None, b: Tensor | None) -> PreGate:
        """x (T, H) → pre-activations (n, 2I)."""
        rows, kept = self.take_both(group, x)
        thin = None if a is None else _into_rank(group, kept, a, self.rules[0])
        if self.fuses(group):  # the gate adds the adapter's share on its way
            return PreGate(self.times(group, rows, self.up, None, None), thin)
        return PreGate(self.times(group, rows, self.up, thin, b), None)

    def gate_down(self, group: Group, h: PreGate, b1: Tensor | None, a: Tensor | None, b: Tensor | None, out: Tensor) -> None:
        """Pre-activations → the experts' outputs, in their rows of `out` (T·k, H)."""
        gated, kept = self.gate(group, h, b1)
        thin = None if a is None else _into_rank(group, kept, a, self.rules[1])
        self.times(group, gated, self.down, thin, b, out[group.rows])

    def gate(self, group: Group, h: PreGate, b1: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pre-activations → gated activations (n, I), and what dropout leaves of them."""
        if not self.fuses(group):
            blocks = [self.module._apply_gate(h.wide[block]) for block in row_blocks(h.wide)]
            gated = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
            return gated, _kept(gated, self.mask(group, 1))
        draw = self.draw(group, 1)
        gated = h.wide.new_empty(len(h.wide), h.wide.shape[1] // 2)
        kept = torch.empty_like(gated) if draw[1] else None
        for e, rows in group.spans:
            thin, b = h.share(e, rows, b1)
            fused.gate(h.wide[rows], thin, b, gated[rows], None if kept is None else kept[rows], rows.start, *draw)
        return gated, gated if kept is None else kept

    @staticmethod
    def times(group: Group, x: Tensor, unpack: Unpacker, *rest) -> Tensor:
        return (product_of_few if unpack.fuses(group.spans) else product)(group, x, unpack, *rest)

    def new_rows(self, like: Tensor) -> Tensor:
        """(T·k, H) for the groups to fill. No group has the last ones if transformers says by an index of E: no expert."""
        rows = like.new_empty(len(self.order), like.shape[1])
        rows[self.groups[-1].rows.stop if self.groups else 0 :] = 0
        return rows

    def by_token(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows (T·k, H) and routing weights (T, k) → (T, H), each token's weighted sum.

        In one kernel that gathers: no atomic additions as in a scattered sum, and rounded once.
        """
        if self.kernels:
            out = rows.new_empty(len(weight), rows.shape[1])
            place = torch.empty_like(self.order)
            place[self.order] = torch.arange(len(rows), device=rows.device)
            fused.by_token(rows, place, weight.contiguous(), out)
            return out
        begins = torch.arange(0, len(rows), self.k, device=rows.device)
        weight = weight.reshape(-1).to(rows.dtype)
        return F.embedding_bag(self.order.argsort(), rows, begins, mode="sum", per_sample_weights=weight)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """What a mask of bool leaves of x. CUDA has a kernel for it; a product of two dtypes converts entry by entry."""
    if mask is None:
        return x
    return x * mask if x.device.type == "cpu" else torch.ops.aten.native_dropout_backward(x, mask, 1.0)


def _thin(x: Tensor, few: Tensor, out: Tensor) -> None:
    """out (n, r) = x (n, m) @ few (m, r) for a small r. A CPU is 1.5 to 8 times as fast at the product of the transposes."""
    if x.device.type == "cpu":
        out.copy_((few.T.contiguous() @ x.T).T)
    else:
        torch.mm(x, few, out=out)


def _rows(x: Tensor, rows: slice) -> Tensor:
    """x[rows]; of a group of one expert, which has many small calls on a CPU, x itself."""
    return x if rows.stop - rows.start == len(x) else x[rows]


def _into_rank(group: Group, x: Tensor, factors: Tensor, rule: Rule) -> Tensor:
    """x (n, m) through each expert's factor (r, m), and times the adapter's scale → (n, r)."""
    thin = x.new_empty(len(x), factors.shape[1])
    for e, rows in group.spans:
        _thin(_rows(x, rows), factors[e].to(x.dtype).T, _rows(thin, rows))
    return thin if rule.scale == 1 else thin.mul_(rule.scale)


def product(
    group: Group, x: Tensor, unpack: Unpacker, thin: Tensor | None, b: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """x (n, in) → (n, out) through W + B·A, in `out` if it is given; `thin` (n, r) is what A made of x.

    The adapters' share comes first, because a matrix product adds to what is there without another pass over it.
    """
    y = x.new_empty(len(x), unpack.rows) if out is None else out
    for e, rows, pieces in unpack.over(group.spans):
        part_x, part_y = _rows(x, rows), _rows(y, rows)
        if thin is not None:
            torch.mm(_rows(thin, rows), b[e].to(x.dtype).T, out=part_y)
        for first, w in pieces:
            piece = part_y if len(w) == unpack.rows else part_y[:, first : first + len(w)]
            piece.addmm_(part_x, w.T, beta=0 if thin is None else 1)
    return y


def product_of_few(
    group: Group, x: Tensor, unpack: Unpacker, thin: Tensor | None, b: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """The same for few rows, where unpacking would take longer than multiplying."""
    y = x.new_empty(len(x), unpack.rows) if out is None else out
    for e, rows in group.spans:
        whole, part_y = unpack.times(_rows(x, rows), e), _rows(y, rows)
        part_y.copy_(whole) if thin is None else torch.addmm(whole, _rows(thin, rows), b[e].to(x.dtype).T, out=part_y)
    return y


def product_back(
    group: Group,
    g: Tensor,
    unpack: Unpacker,
    thin: Tensor | None,
    a: Tensor | None,
    mask: Tensor | None,
    out: Tensor | None = None,
    onto: bool = False,
) -> Tensor:
    """Gradient g (n, out) of a projection's output → of its input, (n, in), in `out` if given; `thin` (n, r): g through B.

    `onto`: it is added to what `out` holds.
    """
    gx = g.new_empty(len(g), unpack.columns) if out is None else out
    if thin is not None:
        for e, rows in group.spans:
            torch.mm(_rows(thin, rows), a[e], out=_rows(gx, rows))
        if out is None:
            gx = _kept(gx, mask)
        elif mask is not None:
            gx.mul_(mask)
    for _, rows, pieces in unpack.over(group.spans):
        part_g, part_x = _rows(g, rows), _rows(gx, rows)
        for first, w in pieces:
            piece = part_g if len(w) == unpack.rows else part_g[:, first : first + len(w)]
            part_x.addmm_(piece, w, beta=0 if thin is None and first == 0 and not onto else 1)
    return gx


def ends_of(chosen: Tensor, experts: int) -> list[int]:
    """Where each expert's stretch ends in `chosen`, the sorted expert ids. On the meta device, which has none: evenly."""
    if chosen.is_meta:
        return [len(chosen) * (e + 1) // experts for e in range(experts)]
    # The only time that Python waits for the GPU; bincount would wait more often.
    return torch.searchsorted(chosen, torch.arange(experts, device=chosen.device, dtype=chosen.dtype), right=True).tolist()


def groups_of(ends: list[int], shape: torch.Size, device: str) -> list[Group]:
    """Neighbouring experts with tokens, as many as keep both their weights and their rows within `GROUP` numbers.

    When few experts have any (decoding one token), one by one: unpacking the others between them would be wasted.
    """
    _, width, hidden = shape
    used = [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]
    most = GROUP.get(device, 0) if 2 * len(used) > len(ends) else 0
    found: list[list[tuple[int, int, int]]] = []
    for e, start, end in used:
        if found:
            (first_expert, first_row, _), *_ = found[-1]
            if max((e + 1 - first_expert) * hidden, end - first_row) * width <= most:
                found[-1].append((e, start, end))
                continue
        found.append([(e, start, end)])
    groups = []
    for number, spans in enumerate(found):
        first, last = spans[0][1], spans[-1][2]
        groups.append(Group(number, slice(first, last), [(e, slice(start - first, end - first)) for e, start, end in spans]))
    return groups


def row_blocks(h: Tensor) -> list[slice]:
    """Rows to apply the gate to at a time: what stays in a CPU's cache, so that its many steps do not wait for memory.

    On a GPU all, but for `MOST_ROWS`.
    """
    step = min(MOST_ROWS, max(1, int(min(PIECE.get(h.device.type, math.inf), h.numel())) // h.shape[1]))
    return [slice(first, min(first + step, len(h))) for first in range(0, len(h), step)]


def down_back(job: Pass, group: Group, g: Tensor, h: PreGate, w: Tensor, b1, a2, b2, ga2, gb2) -> tuple[Tensor, Tensor]:
    """From the output's gradient g (n, H) to those of the pre-activations (n, 2I), without w, and of w (n,).

    Those of the factors are written to ga2 and gb2.
    """
    thin = None if a2 is None else _into_rank(group, g, b2.mT, job.rules[1])
    back = _gate_back_fused if job.fuses(group) else _gate_back
    gh, gw, into_b = back(job, group, g, h, w, thin, b1, a2, ga2)
    if a2 is not None:
        into_b.mul_(w * job.rules[1].scale)
        for e, rows in group.spans:
            _thin(_rows(g, rows).T, _rows(into_b, rows), gb2[e])
    return gh, gw


def _gate_back(
    job: Pass, group: Group, g: Tensor, h: PreGate, w: Tensor, thin, b1, a2, ga2
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The part of `down_back` as wide as the experts: gradients (n, 2I) and (n,), and what A2 makes of its input (n, r).

    `thin` (n, r): g through B2; it is multiplied by w here. A2's gradient is added to ga2, which holds zeros.
    """
    mask, into_b = job.mask(group, 1), None
    g_a = product_back(group, g, job.down, thin, a2, mask)
    if a2 is not None:
        thin.mul_(w)
        into_b = torch.empty_like(thin)
    blocks = row_blocks(h.wide)
    gh, gw = torch.empty_like(h.wide) if len(blocks) > 1 else None, g.new_empty(len(g))
    for block in blocks:
        with torch.enable_grad():  # the gate is the model's own function, so autograd differentiates it
            part = h.wide[block].detach().requires_grad_()
            gated = job.module._apply_gate(part)
        a = gated.detach()
        torch.bmm(g_a[block].unsqueeze(1), a.unsqueeze(2), out=gw[block].view(-1, 1, 1))
        (found,) = torch.autograd.grad(gated, part, g_a[block])
        if gh is None:
            gh = found
        else:
            gh[block] = found
        if a2 is not None:
            a = _kept(a, None if mask is None else mask[block])
            for e, rows in group.within(block):
                inside = a[rows.start - block.start : rows.stop - block.start]
                _thin(inside, a2[e].T, into_b[rows])
                ga2[e].addmm_(thin[rows].T, inside)
    return gh, gw, into_b


def _gate_back_fused(
    job: Pass, group: Group, g: Tensor, h: PreGate, w: Tensor, thin, b1, a2, ga2
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same by one kernel an expert, which also adds what came through A2, and drops again what dropout dropped.

    A2's gradient is written to ga2.
    """
    g_a = product_back(group, g, job.down, None, None, None)
    gh, partial = torch.empty_like(h.wide), fused.partials(g_a)
    kept = None if a2 is None else torch.empty_like(g_a)
    for e, rows in group.spans:
        second = (None, None, None) if a2 is None else (thin[rows], a2[e], kept[rows])
        fused.gate_back(
            h.wide[rows], *h.share(e, rows, b1), g_a[rows], *second[:2], gh[rows], second[2], partial[rows],
            rows.start, *job.draw(group, 1),
        )  # fmt: skip
    if a2 is None:
        return gh, partial.sum(1), None
    thin.mul_(w)
    into_b = torch.empty_like(thin)
    for e, rows in group.spans:
        _thin(_rows(kept, rows), a2[e].T, _rows(into_b, rows))
        torch.mm(_rows(thin, rows).T, _rows(kept, rows), out=ga2[e])
    return gh, partial.sum(1), into_b


def up_back(job: Pass, group: Group, gh: Tensor, x: Tensor, into_b, w: Tensor, a1, b1, ga1, gb1, gx: Tensor) -> None:
    """From the gradient of the pre-activations (n, 2I) to those of the input (n, H), still without w, and of the factors.

    They are written to gx, ga1 and gb1. `into_b` (n, r): what A1 made of its input, if that was kept.
    """
    thin = None if a1 is None else _into_rank(group, gh, b1.mT, job.rules[0])
    if by_kernel := job.fuses(group) and a1 is not None:
        for e, rows in group.spans:
            fused.thin_product(thin[rows], a1[e], gx[rows], rows.start, *job.draw(group, 0))
        product_back(group, gh, job.up, None, None, None, gx, onto=True)
    else:
        mask = job.mask(group, 0)
        product_back(group, gh, job.up, thin, a1, mask, gx)
    if a1 is not None:
        thin.mul_(w)
        x = job.take_kept(group, x) if by_kernel else _kept(job.take(group, x), mask)
        into_b = _into_rank(group, x, a1, job.rules[0]) if into_b is None else into_b
        into_b = into_b * w  # not in place: what was kept may be asked for again
        for e, rows in group.spans:
            _thin(_rows(gh, rows).T, _rows(into_b, rows), gb1[e])
            torch.mm(_rows(thin, rows).T, _rows(x, rows), out=ga1[e])
