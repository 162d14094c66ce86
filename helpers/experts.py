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

from typing import NamedTuple

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from helpers.expert_pass import STACKS, Pass, PreGate, Rule, down_back, ends_of, groups_of, up_back
from helpers.nf4 import BLOCK, stack_shape

NAME = "nf4"


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
        ctx.rules = (job.k, job.groups, job.rules, job.seed, job.kernels)
        ctx.module = job.module
        ctx.save_for_backward(x, weight, job.order, a1, b1, a2, b2, *(t for pair in kept for t in pair))
        return x.new_zeros(1).expand_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with no_autocast(grad):  # whoever calls backward may have left it on
            return None, None, *_ExpertMLP.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad: Tensor) -> tuple:
        """Of x, weight and the factors."""
        x, weight, order, a1, b1, a2, b2, *saved = ctx.saved_tensors
        kept = [PreGate(*pair) for pair in zip(saved[::2], saved[1::2], strict=True)]
        job = Pass(ctx.module, x.dtype, order, *ctx.rules)
        scale = weight.reshape(-1)[order].unsqueeze(1).to(x.dtype)
        gx, gw = job.new_rows(x), torch.zeros_like(weight).reshape(-1)
        ga1, gb1, ga2, gb2 = (None if f is None else torch.zeros_like(f) for f in (a1, b1, a2, b2))
        for group, h in zip(job.groups, kept, strict=True):
            # The routing weight w is left out of the large gradients and put on thin or small tensors instead. So ∂L/∂w is
            # ⟨g, a⟩ with the g at hand, and no tensor as wide as the experts has to be multiplied by it.
            w = scale[group.rows]
            gh, dw = down_back(job, group, job.take(group, grad), h, w, b1, a2, b2, ga2, gb2)
            gw[order[group.rows]] = dw.to(gw.dtype)
            up_back(job, group, gh, x, h.thin, w, a1, b1, ga1, gb1, gx[group.rows])
        return job.by_token(gx, weight), gw.view_as(weight), ga1, gb1, ga2, gb2


class _Finish(torch.autograd.Function):
    """The layer's output (T, H) from the pre-activations; the gradient goes to `_ExpertMLP` as it is."""

    @staticmethod
    def forward(ctx, stand_in, job, kept, weight, b1, a2, b2):
        rows = job.new_rows(stand_in)
        for group, h in zip(job.groups, kept, strict=True):
            job.gate_down(group, h, b1, a2, b2, rows)
        kept.clear()
        return job.by_token(rows, weight)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None, None, None, None


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
    rules: list[Rule] = []
    for name in STACKS:
        lora: Factors | None = self.__dict__.get("lora_factors", {}).get(name)
        if lora is None:
            factors += [None, None]
            rules.append(Rule())
        else:
            p = lora.dropout if self.training else 0.0
            factors += [lora.A, lora.B]
            rules.append(Rule(p, lora.scale / (1 - p) if p < 1 else 0.0))
    # Drawn from torch's CPU generator, which checkpointing restores: the recomputation drops the same entries.
    seed = int(torch.randint(2**31, ())) if any(rule.dropout for rule in rules) else 0
    x, weight = hidden_states.to(dtype).contiguous(), top_k_weights
    with no_autocast(x):
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        groups = groups_of(ends_of(chosen, self.num_experts), stack_shape(stack), order.device.type)
        job = Pass(self, dtype, order, top_k_index.shape[1], groups, rules, seed)
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, *factors))
        if learns or not job.few:
            # B is a view of PEFT's (out, r·E), whose every use would gather single numbers: so once, for all experts
            factors = [None if t is None else t.to(dtype).contiguous() for t in factors]
        if learns:
            kept: list[Tensor] = []
            stand_in = _ExpertMLP.apply(job, kept, x, weight, *factors)
            detached = (None if t is None else t.detach() for t in (weight, *factors[1:]))
            out = _Finish.apply(stand_in, job, kept, *detached)
        else:  # nothing is kept, so a group can go all the way
            a1, b1, a2, b2 = factors
            rows = job.new_rows(x)
            for group in job.groups:
                job.gate_down(group, job.gate_up(group, x, a1, b1), b1, a2, b2, rows)
            out = job.by_token(rows, weight)
    return out.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, nf4_experts_forward)
