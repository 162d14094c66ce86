"""A Mixture-of-Experts MLP computed from expert stacks in NF4, with LoRA that is never multiplied out.

transformers 5 keeps all experts of a layer in two 3-D parameters, `gate_up_proj (E, 2I, H)` and `down_proj (E, H, I)`, and
lets an *experts function* be registered by name. This module registers one, "nf4":

    y[t] = Σ_{e ∈ top-k(t)}  weight[t, e] · down_e( gate( gate_up_e(x[t]) ) )        each linear map: (W + s·B·A) x

with a derivative of its own that walks over the experts. W is unpacked from 4 bit for one expert at a time, used for one matrix
product and dropped; backward unpacks it again. Kept between forward and backward are the layer's input and the
pre-activations, nothing of the weights. `B·A` (as large as W) is never formed: the two thin factors are applied in turn.

E experts, H hidden size, I intermediate size, T tokens, k experts per token, r LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from helpers.nf4 import BLOCK, PIECE, Unpacker, stack_shape

NAME = "nf4"
STACKS = ("gate_up_proj", "down_proj")
GROUP = {"cuda": 2**26, "meta": 2**26}  # numbers, of weights and of activations, of experts handled together; a CPU: one by one
MOST_ROWS = 2**15  # as a batch of small products: CUDA's grids end at 65,535, and not all kernels mind it


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


class _Group(NamedTuple):
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


class _Rule(NamedTuple):
    """What is done to an adapter's product beside multiplying."""

    dropout: float = 0.0
    scale: float = 1.0  # alpha / r, and 1 / (1 - dropout)


class _Pass:
    """One pass over the experts of a layer. Its rows are the T·k assignments of tokens to experts, sorted by expert.

    Gathering, gate and dropout are done for a group of experts at once: 64 small experts, one after the other, would keep a
    GPU waiting for Python. Matrix products are done expert by expert.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, order: Tensor, k: int, groups: list[_Group], rules: list[_Rule], seed: int
    ):
        self.module, self.order, self.k, self.groups, self.rules, self.seed = module, order, k, groups, rules, seed
        self.token = order // k
        # decoding one token: what belongs to the other experts should not be touched at all
        self.few = 2 * sum(len(group.spans) for group in groups) <= module.num_experts
        self.up, self.down = (Unpacker(getattr(module, name), dtype, self.few) for name in STACKS)

    def mask(self, group: _Group, projection: int) -> Tensor | None:
        """What dropout leaves of a projection's input (n, in): from a generator of its own, so that backward draws it again."""
        dropout = self.rules[projection].dropout
        if not dropout:
            return None
        size = (group.rows.stop - group.rows.start, (self.up, self.down)[projection].columns)
        mask = torch.empty(size, dtype=torch.bool, device=self.order.device)
        generator = None if mask.is_meta else torch.Generator(mask.device).manual_seed(self.seed + 2 * group.number + projection)
        return mask.bernoulli_(1 - dropout, generator=generator)

    def gate_up(self, group: _Group, x: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        """x (T, H) → pre-activations (n, 2I)."""
        x = x[self.token[group.rows]]
        thin = None if a is None else _into_rank(group, _kept(x, self.mask(group, 0)), a, self.rules[0])
        return self.product(group, x, self.up, thin, b)

    def gate_down(self, group: _Group, h: Tensor, a: Tensor | None, b: Tensor | None, out: Tensor) -> None:
        """Pre-activations (n, 2I) → the experts' outputs, in their rows of `out` (T·k, H)."""
        blocks = [self.module._apply_gate(h[block]) for block in _row_blocks(h)]
        gated = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        thin = None if a is None else _into_rank(group, _kept(gated, self.mask(group, 1)), a, self.rules[1])
        self.product(group, gated, self.down, thin, b, out[group.rows])

    @staticmethod
    def product(group: _Group, x: Tensor, unpack: Unpacker, *rest) -> Tensor:
        return (_fused_product if unpack.fuses(group.spans) else _product)(group, x, unpack, *rest)

    def new_rows(self, like: Tensor) -> Tensor:
        """(T·k, H) for the groups to fill. No group has the last ones if transformers says by an index of E: no expert."""
        rows = like.new_empty(len(self.order), like.shape[1])
        rows[self.groups[-1].rows.stop if self.groups else 0 :] = 0
        return rows

    def by_token(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows (T·k, H) and routing weights (T, k) → (T, H), each token's weighted sum.

        In one kernel that gathers: no atomic additions as in a scattered sum, and rounded once.
        """
        begins = torch.arange(0, len(rows), self.k, device=rows.device)
        weight = weight.reshape(-1).to(rows.dtype)
        return F.embedding_bag(self.order.argsort(), rows, begins, mode="sum", per_sample_weights=weight)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _thin(x: Tensor, few: Tensor, out: Tensor) -> None:
    """out (n, r) = x (n, m) @ few (m, r) for a small r. A CPU is 1.5 to 8 times as fast at the product of the transposes."""
    if x.device.type == "cpu":
        out.copy_((few.T.contiguous() @ x.T).T)
    else:
        torch.mm(x, few, out=out)


def _rows(x: Tensor, rows: slice) -> Tensor:
    """x[rows]; of a group of one expert, which has many small calls on a CPU, x itself."""
    return x if rows.stop - rows.start == len(x) else x[rows]


def _into_rank(group: _Group, x: Tensor, factors: Tensor, rule: _Rule) -> Tensor:
    """x (n, m) through each expert's factor (r, m), and times the adapter's scale → (n, r)."""
    thin = x.new_empty(len(x), factors.shape[1])
    for e, rows in group.spans:
        _thin(_rows(x, rows), factors[e].to(x.dtype).T, _rows(thin, rows))
    return thin if rule.scale == 1 else thin.mul_(rule.scale)


def _product(
    group: _Group, x: Tensor, unpack: Unpacker, thin: Tensor | None, b: Tensor | None, out: Tensor | None = None
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


def _fused_product(
    group: _Group, x: Tensor, unpack: Unpacker, thin: Tensor | None, b: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """The same for few rows, where unpacking would take longer than multiplying."""
    y = x.new_empty(len(x), unpack.rows) if out is None else out
    for e, rows in group.spans:
        whole, part_y = unpack.times(_rows(x, rows), e), _rows(y, rows)
        part_y.copy_(whole) if thin is None else torch.addmm(whole, _rows(thin, rows), b[e].to(x.dtype).T, out=part_y)
    return y


def _product_back(
    group: _Group,
    g: Tensor,
    unpack: Unpacker,
    thin: Tensor | None,
    a: Tensor | None,
    mask: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient g (n, out) of a projection's output → of its input, (n, in), in `out` if given; `thin` (n, r): g through B."""
    gx = g.new_empty(len(g), unpack.columns) if out is None else out
    if thin is not None:
        for e, rows in group.spans:
            torch.mm(_rows(thin, rows), a[e], out=_rows(gx, rows))
        if mask is not None:
            gx.mul_(mask)
    for _, rows, pieces in unpack.over(group.spans):
        part_g, part_x = _rows(g, rows), _rows(gx, rows)
        for first, w in pieces:
            piece = part_g if len(w) == unpack.rows else part_g[:, first : first + len(w)]
            part_x.addmm_(piece, w, beta=0 if thin is None and first == 0 else 1)
    return gx


def _ends(chosen: Tensor, experts: int) -> list[int]:
    """Where each expert's stretch ends in `chosen`, the sorted expert ids. On the meta device, which has none: evenly."""
    if chosen.is_meta:
        return [len(chosen) * (e + 1) // experts for e in range(experts)]
    # The only time that Python waits for the GPU; bincount would wait more often.
    return torch.searchsorted(chosen, torch.arange(experts, device=chosen.device, dtype=chosen.dtype), right=True).tolist()


def groups_of(ends: list[int], shape: torch.Size, device: str) -> list[_Group]:
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
        groups.append(_Group(number, slice(first, last), [(e, slice(start - first, end - first)) for e, start, end in spans]))
    return groups


def _row_blocks(h: Tensor) -> list[slice]:
    """Rows to apply the gate to at a time: what stays in a CPU's cache, so that its many steps do not wait for memory.

    On a GPU all, but for `MOST_ROWS`.
    """
    step = min(MOST_ROWS, max(1, int(min(PIECE.get(h.device.type, math.inf), h.numel())) // h.shape[1]))
    return [slice(first, min(first + step, len(h))) for first in range(0, len(h), step)]


class _ExpertMLP(torch.autograd.Function):
    """The expert MLP up to the pre-activations, `kept`; `_Finish` makes the output of them. The derivative of both is here.

    x (T, H); weight (T, k) routing weights; A1 (E, r, H), B1 (E, 2I, r), A2 (E, r, I), B2 (E, H, r) or None. What it returns
    only stands for the layer's output (T, H). Two functions, because checkpointing repeats the forward pass as far as backward
    needs it: so it never comes to the second one, whose products nobody would look at.

    The gradient of a routing weight is ⟨∂L/∂a, a⟩ with a the gated activation, so expert outputs are not kept.
    """

    @staticmethod
    def forward(ctx, job, kept, x, weight, a1, b1, a2, b2):
        kept.extend(job.gate_up(group, x, a1, b1) for group in job.groups)
        ctx.rules = (job.k, job.groups, job.rules, job.seed)
        ctx.module = job.module
        ctx.save_for_backward(x, weight, job.order, a1, b1, a2, b2, *kept)
        return x.new_zeros(1).expand_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with no_autocast(grad):  # whoever calls backward may have left it on
            return None, None, *_ExpertMLP.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad: Tensor) -> tuple:
        """Of x, weight and the factors."""
        x, weight, order, a1, b1, a2, b2, *kept = ctx.saved_tensors
        job = _Pass(ctx.module, x.dtype, order, *ctx.rules)
        scale = weight.reshape(-1)[order].unsqueeze(1).to(x.dtype)
        gx, gw = job.new_rows(x), torch.zeros_like(weight).reshape(-1)
        ga1, gb1, ga2, gb2 = (None if f is None else torch.zeros_like(f) for f in (a1, b1, a2, b2))
        for group, h in zip(job.groups, kept, strict=True):
            # The routing weight w is left out of the large gradients and put on thin or small tensors instead. So ∂L/∂w is
            # ⟨g, a⟩ with the g at hand, and no tensor as wide as the experts has to be multiplied by it.
            token, w = job.token[group.rows], scale[group.rows]
            gh, dw = _down_back(job, group, grad[token], h, w, a2, b2, ga2, gb2)
            gw[order[group.rows]] = dw.to(gw.dtype)
            _up_back(job, group, gh, x[token], w, a1, b1, ga1, gb1, gx[group.rows])
        return job.by_token(gx, weight), gw.view_as(weight), ga1, gb1, ga2, gb2


def _down_back(job: _Pass, group: _Group, g: Tensor, h: Tensor, w: Tensor, a2, b2, ga2, gb2) -> tuple[Tensor, Tensor]:
    """From the output's gradient g (n, H) to those of the pre-activations (n, 2I), without w, and of w (n,).

    Those of the factors are added to ga2 and gb2.
    """
    mask = job.mask(group, 1)
    thin = None if a2 is None else _into_rank(group, g, b2.mT, job.rules[1])
    g_a = _product_back(group, g, job.down, thin, a2, mask)
    if a2 is not None:
        thin.mul_(w)
        into_b = torch.empty_like(thin)
    blocks = _row_blocks(h)
    gh, gw = torch.empty_like(h) if len(blocks) > 1 else None, h.new_empty(len(h))
    for block in blocks:
        with torch.enable_grad():  # the gate is the model's own function, so autograd differentiates it
            part = h[block].detach().requires_grad_()
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
    if a2 is not None:
        into_b.mul_(w * job.rules[1].scale)
        for e, rows in group.spans:
            _thin(_rows(g, rows).T, _rows(into_b, rows), gb2[e])
    return gh, gw


def _up_back(job: _Pass, group: _Group, gh: Tensor, x: Tensor, w: Tensor, a1, b1, ga1, gb1, gx: Tensor) -> None:
    """From the gradient of the pre-activations (n, 2I) to those of the input (n, H), still without w, and of the factors.

    They are written to gx, ga1 and gb1.
    """
    mask = job.mask(group, 0)
    thin = None if a1 is None else _into_rank(group, gh, b1.mT, job.rules[0])
    _product_back(group, gh, job.up, thin, a1, mask, gx)
    if a1 is not None:
        thin.mul_(w)
        x = _kept(x, mask)
        into_b = _into_rank(group, x, a1, job.rules[0]).mul_(w)
        for e, rows in group.spans:
            _thin(_rows(gh, rows).T, _rows(into_b, rows), gb1[e])
            torch.mm(_rows(thin, rows).T, _rows(x, rows), out=ga1[e])


class _Finish(torch.autograd.Function):
    """The layer's output (T, H) from the pre-activations; the gradient goes to `_ExpertMLP` as it is."""

    @staticmethod
    def forward(ctx, stand_in, job, kept, weight, a2, b2):
        rows = job.new_rows(stand_in)
        for group, h in zip(job.groups, kept, strict=True):
            job.gate_down(group, h, a2, b2, rows)
        kept.clear()
        return job.by_token(rows, weight)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None, None, None


def no_autocast(x: Tensor) -> torch.autocast:
    """One compute dtype, where autocast would mix two. The meta device, without one of its own, stands for a GPU."""
    return torch.autocast("cuda" if x.is_meta else x.device.type, enabled=False)


@torch.compiler.disable  # how many rows an expert has, Python must know: traced, it would be compiled again for every batch
def nf4_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The registered experts function: hidden_states (T, H), top_k_index and top_k_weights (T, k) → (T, H)."""
    stack = getattr(self, STACKS[0])
    dtype = stack.quant_state.dtype if isinstance(stack, Params4bit) else stack.dtype
    if hidden_states.dtype == torch.float64:  # reference runs
        dtype = torch.float64
    factors: list[Tensor | None] = []
    rules: list[_Rule] = []
    for name in STACKS:
        lora: Factors | None = self.__dict__.get("lora_factors", {}).get(name)
        if lora is None:
            factors += [None, None]
            rules.append(_Rule())
        else:
            p = lora.dropout if self.training else 0.0
            factors += [lora.A, lora.B]
            rules.append(_Rule(p, lora.scale / (1 - p) if p < 1 else 0.0))
    # Drawn from torch's CPU generator, which checkpointing restores: the recomputation drops the same entries.
    seed = int(torch.randint(2**31, ())) if any(rule.dropout for rule in rules) else 0
    x, weight = hidden_states.to(dtype), top_k_weights
    with no_autocast(x):
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        groups = groups_of(_ends(chosen, self.num_experts), stack_shape(stack), order.device.type)
        job = _Pass(self, dtype, order, top_k_index.shape[1], groups, rules, seed)
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, *factors))
        if learns or not job.few:
            # B is a view of PEFT's (out, r·E), whose every use would gather single numbers: so once, for all experts
            factors = [None if t is None else t.to(dtype).contiguous() for t in factors]
        if learns:
            kept: list[Tensor] = []
            stand_in = _ExpertMLP.apply(job, kept, x, weight, *factors)
            detached = (None if t is None else t.detach() for t in (weight, *factors[2:]))
            out = _Finish.apply(stand_in, job, kept, *detached)
        else:  # nothing is kept, so a group can go all the way
            a1, b1, a2, b2 = factors
            rows = job.new_rows(x)
            for group in job.groups:
                job.gate_down(group, job.gate_up(group, x, a1, b1), a2, b2, rows)
            out = job.by_token(rows, weight)
    return out.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, nf4_experts_forward)
