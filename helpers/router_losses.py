r"""Router z-loss and load-balancing loss for any routed model of transformers, with gradients that cannot get lost.

    z-loss      L_z = mean over layers and valid tokens of (logsumexp_e x_te)²        ST-MoE, arXiv 2202.08906, eq. 5
    balancing   L_b = mean over layers of E/k · Σ_e f_e · P_e                          Switch, arXiv 2101.03961, eq. 4-6

with router logits x (T, E), f the share of the T·k assignments times k, P the mean softmax. L_b is 1 at perfect balance.
"mean" over layers is what the card's fork of transformers did; Megatron sums them, and OLMoE divides by the top-k too, so
a coefficient of 1e-3 means up to 32 times different things: always name the reduction.

`attach_router_losses` puts a forward hook on every router. The hook computes the losses in fp32 and ties their gradient to
the routing weights with an identity function (the trick of Megatron's autograd scaler). Nothing is collected and carried
to the loss, so the gradient survives reentrant checkpointing, PEFT, accelerate, and trainers that bypass the model's own
loss, all of which silently drop the usual auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from helpers.quantization import router_modules

Reduction = Literal["mean", "sum"]


def _layers(router_logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    if not layers:
        raise ValueError("no router logits: was the model run with output_router_logits=True?")
    return [x.float() for x in layers]


def _valid(mask: Tensor | None, like: Tensor) -> Tensor:
    """1.0 for real tokens, 0.0 for padding, of shape (T,)."""
    if mask is None:
        return torch.ones(like.shape[0], device=like.device)
    mask = mask.reshape(-1).to(like.device, torch.float32)
    if mask.shape[0] != like.shape[0]:
        raise ValueError(f"the mask has {mask.shape[0]} tokens, the router logits {like.shape[0]}")
    return mask


def router_z_loss(
    router_logits: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """z-loss of logits (T, E), or of a sequence of them, one a layer; computed in fp32.

    attention_mask: any shape with T entries, 0 for padding, which is left out exactly. reduction: over layers, "mean"
    (the card's fork) or "sum" (Megatron). A batch of padding alone gives 0.
    """
    layers = _layers(router_logits)
    total = torch.zeros((), device=layers[0].device)
    for x in layers:
        valid = _valid(attention_mask, x)
        total = total + (torch.logsumexp(x, -1).square() * valid).sum() / valid.sum().clamp_min(1.0)
    return total / len(layers) if reduction == "mean" else total


def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor], top_k: int, attention_mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Balancing loss per layer, then averaged (MegaBlocks' form and the card's fork's): 1.0 at balance, E/k at collapse.

    transformers' `load_balancing_loss_func` pools the layers first, so that their imbalances can cancel, and is top_k times
    larger (2.0 at balance for Mixtral).
    """
    layers = _layers(router_logits)
    total = torch.zeros((), device=layers[0].device)
    for x in layers:
        valid = _valid(attention_mask, x).unsqueeze(1)
        count, experts = valid.sum().clamp_min(1.0), x.shape[1]
        p = x.softmax(-1)
        chosen = torch.zeros_like(x).scatter_(1, p.topk(top_k, -1).indices, 1.0)
        total = total + ((chosen * valid).sum(0) / count * (p * valid).sum(0) / count).sum() * experts / top_k
    return total / len(layers) if reduction == "mean" else total


class _Attach(torch.autograd.Function):
    """Identity on `x`; in backward, `loss` receives the gradient `scale` as if it had been added to the total loss."""

    @staticmethod
    def forward(ctx, x, loss, handle):
        ctx.handle, ctx.like = handle, loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.handle.injected += 1
        return grad, torch.full_like(ctx.like, ctx.handle.loss_scale), None


@dataclass
class RouterLosses:
    """Handle of attached losses. Callers that know more than one forward pass does may set:

    valid: (B, S) mask of real tokens, when the model gets no attention mask (packed batches);
    window_tokens: valid tokens in the whole accumulation window, for a token-exact mean over it;
    accumulation: number of forward passes whose losses are averaged, where the window's tokens are not known;
    loss_scale: factor that a gradient scaler (fp16) puts on the loss.
    """

    z_coef: float
    balance_coef: float
    reduction: Reduction
    routers: list[nn.Module]
    valid: Tensor | None = None
    window_tokens: int | None = None
    accumulation: int = 1
    loss_scale: float = 1.0
    injected: int = 0
    _mask: Tensor | None = None
    _seen: set[int] = field(default_factory=set)
    _records: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)
    _hooks: list = field(default_factory=list)

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _begin(self, _module, args, kwargs) -> None:
        """Before the decoder runs: note its padding mask; each router may report once until the next call."""
        self._seen.clear()
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            mask = args[1]
        # Decoders also accept ready-made 4-D masks, which do not say which tokens are padding.
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _route(self, router, _args, output):
        if not router.training:
            return None
        if not (isinstance(output, tuple) and len(output) >= 3):
            raise ValueError(f"{type(router).__name__} does not return (logits, scores, indices): its losses cannot be attached")
        logits, scores, *rest = output
        valid = _valid(self.valid if self.valid is not None else self._mask, logits)
        layer = self.routers.index(router)
        top_k = scores.shape[-1]
        if id(router) not in self._seen:  # a checkpointed layer runs again in backward: that is not a second report
            self._seen.add(id(router))
            with torch.no_grad():
                self._records.setdefault(layer, []).append(_statistics(logits.detach().float(), top_k, valid))
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return None
        loss = self._loss(logits, top_k, valid)
        return (logits, _Attach.apply(scores, loss, self), *rest)

    def _loss(self, logits: Tensor, top_k: int, valid: Tensor) -> Tensor:
        """This layer's share of the router loss, normalised so that all shares of a window add up to its mean."""
        z = router_z_loss(logits, valid) * self.z_coef
        balance = load_balancing_loss(logits, top_k, valid) * self.balance_coef if self.balance_coef else 0.0
        share = valid.sum() / self.window_tokens if self.window_tokens else 1.0 / self.accumulation
        return (z + balance) * share / (len(self.routers) if self.reduction == "mean" else 1)

    # -- results -------------------------------------------------------------------------------------------------

    def layer_metrics(self) -> dict[str, Tensor]:
        """Means over what was recorded since `reset`, by layer: z, balance, entropy, logsumexp, mean, spread, max, min (L,)
        and load (L, E), in nats and shares; weighted by valid tokens."""
        if not self._records:
            return {}
        rows = [self._records[layer] for layer in sorted(self._records)]
        result = {}
        for name in rows[0][0]:
            if name == "tokens":
                continue
            values = [torch.stack([r[name] for r in row]) for row in rows]
            if name in ("max", "min"):
                result[name] = torch.stack([getattr(v, name)() for v in values]).cpu()
                continue
            weights = [torch.stack([r["tokens"] for r in row]) for row in rows]
            weights = [w / w.sum().clamp_min(1.0) for w in weights]
            result[name] = torch.stack([torch.tensordot(w, v, dims=1) for w, v in zip(weights, values, strict=True)]).cpu()
        return result

    @property
    def metrics(self) -> dict[str, float]:
        """The same, averaged over layers, as numbers (max and min: over all layers)."""
        layers = self.layer_metrics()
        numbers = {f"router/{n}": float(v.mean()) for n, v in layers.items() if n not in ("load", "max", "min")}
        if layers:
            numbers["router/max"], numbers["router/min"] = float(layers["max"].max()), float(layers["min"].min())
            numbers["router/max_load"] = float(layers["load"].max() * layers["load"].shape[1])
        return numbers

    def reset(self) -> None:
        """Forget what was recorded."""
        self._records.clear()

    def verify(self) -> None:
        """After a backward pass: RuntimeError unless the losses are non-zero and reached something trainable."""
        if not (self.z_coef or self.balance_coef):
            return
        if not self.metrics or not self.metrics["router/z"] > 0:
            raise RuntimeError("router losses are attached, but no router reported: is the model in train mode?")
        if not self.injected:
            raise RuntimeError(
                "router losses have a value but no gradient: nothing trainable lies before or in a router. "
                "Train LoRA on attention, experts or router, and call enable_input_require_grads() for reentrant checkpointing"
            )

    def remove(self) -> None:
        """Take all hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _statistics(x: Tensor, top_k: int, valid: Tensor) -> dict[str, Tensor]:
    """What the log shows of one layer's logits (T, E), over valid tokens; no host synchronisation."""
    count = valid.sum().clamp_min(1.0)
    lse, p = torch.logsumexp(x, -1), x.softmax(-1)
    chosen = torch.zeros_like(x).scatter_(1, x.topk(top_k, -1).indices, 1.0)
    load, importance = (chosen * valid[:, None]).sum(0) / count, (p * valid[:, None]).sum(0) / count
    kept = valid[:, None] > 0
    return {
        "tokens": valid.sum(),
        "z": (lse.square() * valid).sum() / count,
        "balance": (load * importance).sum() * x.shape[1] / top_k,
        "logsumexp": (lse * valid).sum() / count,
        "entropy": (-(p * p.clamp_min(1e-12).log()).sum(-1) * valid).sum() / count,
        "mean": (x.mean(-1) * valid).sum() / count,
        "spread": (x.std(-1) * valid).sum() / count,
        "max": x.masked_fill(~kept, -torch.inf).max(),
        "min": x.masked_fill(~kept, torch.inf).min(),
        "load": load / top_k,
    }


def attach_router_losses(
    model: nn.Module, z_coef: float = 1e-3, balance_coef: float = 0.0, reduction: Reduction = "mean"
) -> RouterLosses:
    """Add the router losses to whatever loss is trained, on a model or a PEFT model; returns the handle.

    Only acts in train mode; outputs are never changed. Raises ValueError for a model whose routers transformers cannot
    name, and at the first training step if they do not return (logits, scores, indices) or the mask has another size.
    """
    found = {id(m) for m in router_modules(model)}
    # PEFT's modules_to_save keeps the frozen original beside the copy that runs: it is no layer of its own.
    routers = [m for name, m in model.named_modules() if id(m) in found and "original_module" not in name.split(".")]
    if not routers:
        raise ValueError(f"{type(model).__name__} records no router logits in transformers: not a routed model, or not supported")
    handle = RouterLosses(z_coef, balance_coef, reduction, routers)
    decoder = _decoder(model)
    handle._hooks.append(decoder.register_forward_pre_hook(handle._begin, with_kwargs=True))
    handle._hooks += [r.register_forward_hook(handle._route) for r in routers]
    return handle


def _decoder(model: nn.Module) -> nn.Module:
    """The innermost pretrained model around the routers: every way of training goes through its forward."""
    from transformers import PreTrainedModel

    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    return inner[-1] if inner else model
