r"""Router z-loss and load-balancing loss for any routed model of transformers, with gradients that cannot get lost.

    z-loss      L_z = mean over layers and valid tokens of (logsumexp_e x_te)²        ST-MoE, arXiv 2202.08906, eq. 5
    balancing   L_b = mean over layers of E/k · Σ_e f_e · P_e                          Switch, arXiv 2101.03961, eq. 4-6

with router logits x (T, E), f_e the share of tokens that run expert e (Σ f = k), P the mean softmax. L_b is 1 at balance.
Always name the reduction with a coefficient. What 1.0 here (mean over tokens and layers) is elsewhere, for L layers, top-k:

    z-loss      ST-MoE, transformers' Switch, the card's fork: 1    Megatron (sums layers): 1/L    OLMoE (divides by k): k
    balancing   MegaBlocks, the card's fork: 1    transformers' `load_balancing_loss_func`: 1/k, and it pools the layers

`attach_router_losses` puts a forward hook on every router. The hook computes the losses in fp32 and ties their gradient to
the routing weights with an identity function (the trick of Megatron's autograd scaler). Nothing is collected and carried
to the loss, so the gradient survives reentrant checkpointing, PEFT, accelerate, and trainers that bypass the model's own
loss, all of which silently drop the usual auxiliary loss.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.audit import router_recorders
from helpers.losses import without_dropout

Reduction = Literal["mean", "sum"]
Logits = Tensor | Sequence[Tensor]  # (T, E), or one such tensor a layer


def _weights(mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(weight of each token (T,): 1 / valid tokens, or 0 for padding; number of valid tokens ())."""
    valid = torch.ones(len(like), device=like.device) if mask is None else mask.reshape(-1).to(like.device, torch.float32)
    if valid.shape[0] != like.shape[0]:
        raise ValueError(f"the mask has {valid.shape[0]} tokens, the router logits {like.shape[0]}")
    count = valid.sum()
    return valid / count.clamp_min(1.0), count


def _check(reduction: str) -> None:
    if reduction not in get_args(Reduction):  # anything else would be taken for one of the two: a factor of the layers' number
        raise ValueError(f"reduction={reduction!r}: use one of {', '.join(get_args(Reduction))}")


def _layers(router_logits: Logits, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    if not layers:
        raise ValueError("no router logits: was the model run with output_router_logits=True?")
    return ((x.float(), _weights(mask, x)[0]) for x in layers)


def router_z_loss(router_logits: Logits, attention_mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """z-loss, computed in fp32. attention_mask: any shape with T entries, 0 for padding, which is left out exactly (padding
    alone gives 0). reduction: over layers, "mean" (the card's fork) or "sum" (Megatron); ValueError for another."""
    _check(reduction)
    layers = _layers(router_logits, attention_mask)
    losses = torch.stack([(torch.logsumexp(x, -1).square() * w).sum() for x, w in layers])
    return losses.mean() if reduction == "mean" else losses.sum()


def load_balancing_loss(
    router_logits: Logits, top_k: int, attention_mask: Tensor | None = None, reduction: Reduction = "mean", pooled: bool = False
) -> Tensor:
    """Balancing loss per layer, then averaged (MegaBlocks' form and the card's fork's): 1.0 at balance, E/k at collapse.

    pooled: transformers' `load_balancing_loss_func` instead, for comparison. It pools the layers first, so that their
    imbalances can cancel, and is top_k times larger (2.0 at balance for Mixtral); for one layer, exactly top_k times.
    """
    _check(reduction)
    if pooled and not isinstance(router_logits, Tensor):
        mask = None if attention_mask is None else attention_mask.reshape(-1).repeat(len(router_logits))
        return load_balancing_loss(torch.cat(list(router_logits)), top_k, mask, pooled=True)
    losses = []
    for x, w in _layers(router_logits, attention_mask):
        f = torch.zeros_like(x).scatter_(1, x.topk(top_k, -1).indices, w.unsqueeze(1).expand(-1, top_k)).sum(0)
        mean_p = (x.softmax(-1) * w.unsqueeze(1)).sum(0)
        losses.append((f * mean_p).sum() * x.shape[1] / (1 if pooled else top_k))
    return torch.stack(losses).mean() if reduction == "mean" else torch.stack(losses).sum()


class _Attach(torch.autograd.Function):
    """Identity on `x`; in backward, `loss` receives the gradient `handle.loss_scale`, as if it were part of the total loss."""

    @staticmethod
    def forward(ctx, x, loss, handle):
        ctx.handle, ctx.like = handle, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.handle.injected += 1
        return grad, torch.full_like(ctx.like, ctx.handle.loss_scale), None


class _Routing:
    """One layer's routing in fp32: what its two losses, their gradient and its statistics share.

    Written out, because autograd on the functions above takes longer and keeps several (T, E) tensors. Experts come first
    here: reductions over few experts are far faster so on a CPU. Nothing that autocast changes or that waits for a GPU.
    """

    def __init__(
        self,
        logits: Tensor,  # (T, E)
        chosen: Tensor,  # (T, k) experts that run; where a bias corrects the choice, not those of the largest logits
        weight: Tensor,  # (T,)
    ):
        self.x, self.w = logits.detach().t().float().contiguous(), weight
        self.max = self.x.amax(0)
        exp = (self.x - self.max).exp()
        total = exp.sum(0)
        self.lse, self.p = total.log() + self.max, exp / total
        self.wp = self.p * weight
        self.f = torch.zeros_like(self.x).scatter_(0, chosen.t(), weight.expand(chosen.shape[1], -1)).sum(1)  # (E,), sums to k
        self.scale = logits.shape[1] / chosen.shape[1]  # E/k

    def gradient(self, z_coef: float | Tensor, balance_coef: float | Tensor) -> Tensor:
        """∂(z_coef·z + balance_coef·balance)/∂logits (T, E); f counts choices and has no gradient."""
        f = self.f.unsqueeze(1)
        return (self.wp * (2 * z_coef * self.lse + balance_coef * self.scale * (f - (self.p * f).sum(0)))).t()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Means over valid tokens (6 + E,) of _STATISTICS and choices; extremes (2,): max and -min."""
        x, lse, mean = self.x, self.lse, self.x.mean(0)
        spread = ((x - mean).square().sum(0) / max(1, x.shape[0] - 1)).sqrt()
        rows = torch.stack([lse.square(), lse, (self.p * (lse - x)).sum(0), mean, spread])  # (5, T)
        balance = (self.f * self.wp.sum(1)).sum(0, keepdim=True) * self.scale
        sides = torch.stack([self.max, -x.amin(0)]).masked_fill(self.w == 0, -torch.inf)
        return torch.cat([balance, (rows * self.w).sum(1), self.f]), sides.amax(1)


class _LayerLoss(torch.autograd.Function):
    """0, with the gradient that a layer's two losses have in its logits.

    Checkpointing recomputes what autograd saves, and cannot tell in which of several forward passes. What differs from pass to
    pass is therefore no saved tensor: it stays with the node that the forward pass made, which is the one that runs backward.
    """

    @staticmethod
    def forward(ctx, logits, chosen, weight, z_coef, balance_coef):
        ctx.save_for_backward(logits, chosen)
        ctx.of_this_pass = weight, z_coef, balance_coef
        return torch.zeros((), device=logits.device)

    @staticmethod
    def backward(ctx, grad):
        logits, chosen = ctx.saved_tensors
        weight, *coefficients = ctx.of_this_pass
        gradient = _Routing(logits, chosen, weight).gradient(*coefficients)
        return (grad * gradient).to(logits.dtype), None, None, None, None


_STATISTICS = ("balance", "z", "logsumexp", "entropy", "mean", "spread")


_RAW_LOGITS = {"Gemma4TextRouter": "proj"}  # it returns probabilities: the raw logits are the output of this child


def _read(router: nn.Module, output, place: int, top_k: int | None, raw: Tensor | None = None):
    """A router's output → (as tuple, logits (T, E), place of a tensor that carries their gradient on, experts (T, k))."""
    parts = output if isinstance(output, tuple) else (output,)
    logits = parts[place] if raw is None else raw
    tensors = [(i, p) for i, p in enumerate(parts) if isinstance(p, Tensor)]
    # Nearly always (logits, routing weights, experts). DBRX returns the logits alone, and routes by what we return.
    carrier = next((i for i, p in tensors if i != place and p.is_floating_point()), place)
    chosen = next((p for _, p in tensors if p.ndim == 2 and not p.is_floating_point()), None)
    if logits.ndim != 2 or (chosen is None and top_k is None):
        shape = f"logits {tuple(logits.shape)}, not (tokens, experts)" if logits.ndim != 2 else "no chosen experts"
        raise ValueError(f"router losses cannot be attached to {type(router).__name__}: it returns {shape}")
    if chosen is None:  # JetMoE, Llama 4, DBRX: plain top-k
        chosen = logits.detach().topk(top_k, -1).indices
    elif type(router).__name__ == "ZayaRouter":  # to skip all experts is its last class, but returned as 0 · expert 0
        chosen = chosen.masked_fill(parts[carrier] == 0, logits.shape[1] - 1)
    return parts, logits, carrier, chosen.long()


@dataclass(eq=False)
class _Pass:
    """One forward pass of the models around the routers, with gradients on."""

    mask: Tensor | None  # of real tokens, any shape; None: all are real
    _weights: tuple[Tensor, Tensor] | None = None

    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`_weights`, computed by the first router: the same for all layers."""
        self._weights = self._weights or _weights(self.mask, logits)
        weight, count = self._weights
        return weight.to(logits.device), count.to(logits.device)


@dataclass(repr=False)
class RouterLosses:
    """Handle of attached losses; printed, it names coefficients and reduction. Who knows more than one pass does may set:

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
    injected: int = 0  # gradients that went back into a router's logits
    model: nn.Module | None = None
    _home: nn.Module | None = None  # the model that knows this handle
    _running: list[nn.Module] = field(default_factory=list)  # models around the routers, outermost first
    _pass: _Pass | None = None  # the one that is running; None for one that the losses have nothing to do with
    _passes: int = 0
    _rerun: list[_Pass] = field(default_factory=list)  # since the last backward pass, with layers that backward runs again
    _backward: int = 0  # `injected` when the last pass began
    _raw: dict[int, Tensor] = field(default_factory=dict)
    _reported: set[int] = field(default_factory=set)  # layers that ever did
    _records: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # sums (1 + 6 + E,), extremes (2,)
    _hooks: list = field(default_factory=list)

    def __repr__(self) -> str:
        terms = f"loss + {self.z_coef:g} × z-loss + {self.balance_coef:g} × balancing loss (1.0 at balance)"
        return f"{terms}: mean over valid tokens, {self.reduction} over {len(self.routers)} layers"

    @torch.compiler.disable  # traced, the hooks' state would be baked in; so a compiled graph breaks here
    def _enter(self, module, args, kwargs) -> None:
        """Before a model around the routers runs, outermost first: note its padding mask."""
        self._leave(module)  # it still counts as running where Ctrl-C has cut off the pass before
        self._running.append(module)
        if not (module.training and torch.is_grad_enabled()):  # evaluation, generation, a reference model's pass
            self._pass = None
            return
        if len(self._running) == 1:
            self._pass, self._passes = _Pass(self.valid), self._passes + 1
            if self._backward != self.injected:
                self._backward = self.injected
                self._rerun.clear()
            if self._passes == 2 and (problem := self.problem()):
                warnings.warn(f"{problem}. (Ignore this if no backward pass has run yet.)", RuntimeWarning, stacklevel=2)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        # Inner models often get 4-D masks, which do not tell padding.
        if self._pass and self.valid is None and isinstance(mask, Tensor) and mask.ndim == 2:
            self._pass.mask = mask

    @torch.compiler.disable
    def _leave(self, module, *_) -> None:
        if module in self._running:
            del self._running[self._running.index(module) :]
        if not self._running:
            self._pass = None

    @torch.compiler.disable
    def _route(self, layer: int, place: int, top_k: int | None, router, _args, output):
        raw = self._raw.pop(layer, None)
        again = not self._running  # no model runs: checkpointing recomputes this layer in the backward pass
        if not router.training or (self._pass is None and not again):
            return None
        if router is not self.routers[layer]:
            raise RuntimeError("this router is a copy: attach after PEFT, and use torchrun instead of nn.DataParallel")
        parts, logits, carrier, chosen = _read(router, output, place, top_k, raw)
        wanted = bool(self.z_coef or self.balance_coef)
        if again and len(self._rerun) > 1:
            raise RuntimeError(
                "several forward passes before one backward pass, with reentrant checkpointing: nothing tells which pass a layer "
                "is run again for, so the router losses might take another one's padding mask. Use use_reentrant=False, or call "
                "backward after each pass (and attach anew if one of them shall have no backward pass)"
            )
        # Without reentrant checkpointing, backward goes through what the forward pass has attached: any weights will do here.
        current = (self._rerun[0] if self._rerun else _Pass(None)) if again else self._pass
        weight, count = current.weights(logits)
        if not again:
            self._record(layer, count, *_Routing(logits, chosen, weight).statistics())
            if wanted and not torch.is_grad_enabled() and current not in self._rerun:
                self._rerun = [*self._rerun[:1], current]  # reentrant checkpointing; that there are two is enough to know
        if not (wanted and torch.is_grad_enabled() and logits.requires_grad):
            return None
        share = count / self.window_tokens if self.window_tokens else 1 / self.accumulation
        share = share / (len(self.routers) if self.reduction == "mean" else 1)
        loss = _LayerLoss.apply(logits, chosen, weight, self.z_coef * share, self.balance_coef * share)
        parts = (*parts[:carrier], _Attach.apply(parts[carrier], loss, self), *parts[carrier + 1 :])
        return parts if isinstance(output, tuple) else parts[0]

    def _record(self, layer: int, count: Tensor, means: Tensor, extremes: Tensor) -> None:
        """Add a layer's statistics to what was recorded: constant memory, however late somebody resets."""
        self._reported.add(layer)
        sums = torch.cat([count.reshape(1), means * count]).double()
        if layer in self._records:
            sums, extremes = sums + self._records[layer][0], torch.maximum(extremes, self._records[layer][1])
        self._records[layer] = sums, extremes

    def layer_metrics(self) -> dict[str, Tensor]:
        """By layer, over the valid tokens since `reset`: tokens, z, balance, entropy, logsumexp and its standard deviation
        over tokens, mean, spread (over experts), max and min logit (L,), in nats; load (L, E), shares that sum to 1."""
        if not self._records:
            return {}
        sums, extremes = (torch.stack([self._records[layer][i].cpu() for layer in sorted(self._records)]) for i in (0, 1))
        means = sums[:, 1:] / sums[:, :1].clamp_min(1)
        result = {"tokens": sums[:, 0]} | {name: means[:, i] for i, name in enumerate(_STATISTICS)}
        result |= {"logsumexp_std": (result["z"] - result["logsumexp"] ** 2).clamp_min(0).sqrt()}
        result |= {"max": extremes[:, 0], "min": -extremes[:, 1]}
        result["load"] = nn.functional.normalize(means[:, len(_STATISTICS) :], p=1)
        return {name: value.float() for name, value in result.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """The same, averaged over layers, as numbers (max and min: over all layers; max_load: 1.0 at balance)."""
        layers = self.layer_metrics()
        numbers = {f"router/{n}": float(v.mean()) for n, v in layers.items() if n not in ("tokens", "load", "max", "min")}
        if layers and layers["tokens"].any():  # of padding alone there is no largest logit
            numbers["router/max"], numbers["router/min"] = float(layers["max"].max()), float(layers["min"].min())
            numbers["router/max_load"] = float(layers["load"].max() * layers["load"].shape[1])
        return numbers

    def reset(self) -> None:
        """Forget what was recorded."""
        self._records.clear()

    def problem(self) -> str | None:
        """Why the losses do nothing, if so; to be asked after a backward pass."""
        if not (self.z_coef or self.balance_coef):
            return None
        if silent := len(self.routers) - len(self._reported):
            return f"{silent} of {len(self.routers)} routers never reported their logits: is the model in train mode?"
        if self.injected and _upstream(self.model, self.routers[-1]):
            return None
        return (
            "the router losses have a value but no gradient: nothing trainable lies before or in a router. Train LoRA on "
            "attention, experts or router, and call enable_input_require_grads() for reentrant checkpointing"
        )

    def verify(self) -> None:
        """RuntimeError if there is a `problem`. Where nobody calls it, the second pass in train mode warns."""
        if problem := self.problem():
            raise RuntimeError(problem)

    def remove(self) -> None:
        """Take all hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if getattr(self._home, _HANDLE, None) is self:
            delattr(self._home, _HANDLE)
        torch.compiler.reset()  # compiled code has the hooks inside


def _routers(model: nn.Module) -> list[tuple[nn.Module, int, int | None]]:
    """(router, place of its logits in its output, top-k if it or its parent tells), in order."""
    places, found = dict(router_recorders(model)), []
    for name, router in model.named_modules():
        # PEFT's modules_to_save keeps the frozen original beside the copy that runs: it is no layer of its own.
        if router in places and "original_module" not in name.split("."):
            parent = model.get_submodule(name.rpartition(".")[0])
            found.append((router, places[router], getattr(router, "top_k", getattr(parent, "top_k", None))))
    if not found:
        raise ValueError(f"{type(model).__name__} records no router logits in transformers: not a routed model, or not supported")
    return found


def _around(model: nn.Module, router: nn.Module) -> list[nn.Module]:
    """The pretrained models that hold the router, outermost first: every way of training goes through the innermost."""
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(c is router for c in m.modules())] or [model]


_HANDLE = "_router_losses"  # attribute of the innermost of those models: the handle that is attached


def _upstream(model: nn.Module, router: nn.Module) -> list[str]:
    """Trainable parameters up to the end of the router's layer ("model.layers.31."): what comes later cannot move it."""
    words = next(name for name, m in model.named_modules() if m is router).split(".")
    layer = ".".join(words[: max((i + 1 for i, word in enumerate(words) if word.isdigit()), default=len(words))]) + "."
    parameters = list(model.named_parameters())
    end = max(i for i, (name, _) in enumerate(parameters) if name.startswith(layer))
    return [name for name, p in parameters[: end + 1] if p.requires_grad]


def attach_router_losses(
    model: nn.Module, z_coef: float = 1e-3, balance_coef: float = 0.0, reduction: Reduction = "mean"
) -> RouterLosses:
    """Add the router losses to whatever loss is trained, on a model or a PEFT model; returns the handle.

    Acts in train mode with gradients on; never changes outputs. Attach after PEFT. ValueError, with the reason, for a model
    that cannot be served (at the first training step, where only what its routers return can tell).

    A model has one handle: attaching again takes the one before off, with a warning, so that no loss counts twice.
    """
    _check(reduction)
    for name, value in {"z_coef": z_coef, "balance_coef": balance_coef}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: a number of at least 0 is wanted")
    found = _routers(model)
    around = _around(model, found[-1][0])
    if any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in around):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder, whose padding masks differ: not supported")
    if before := getattr(around[-1], _HANDLE, None):
        warnings.warn(f"this model had router losses already ({before}): they are replaced", RuntimeWarning, stacklevel=2)
        before.remove()
    handle = RouterLosses(z_coef, balance_coef, reduction, [router for router, *_ in found], model=model, _home=around[-1])
    setattr(around[-1], _HANDLE, handle)
    for module in around:
        handle._hooks.append(module.register_forward_pre_hook(handle._enter, with_kwargs=True))
        handle._hooks.append(module.register_forward_hook(handle._leave, always_call=True))
    for layer, (router, place, top_k) in enumerate(found):
        if child := _RAW_LOGITS.get(type(router).__name__):
            keep = lambda _module, _args, output, layer=layer: handle._raw.update({layer: output})  # noqa: E731
            handle._hooks.append(router.get_submodule(child).register_forward_hook(keep))
        handle._hooks.append(router.register_forward_hook(partial(handle._route, layer, place, top_k)))
    torch.compiler.reset()  # code compiled before this would go on without the hooks, and not notice
    return handle


@torch.no_grad()
def routing(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The experts (L, T, k) that the valid tokens of a fixed batch run, in eval mode: a snapshot for `changed_share`."""
    found, chosen = _routers(model), {}

    def keep(layer, place, top_k, router, _args, output):
        chosen[layer] = _read(router, output, place, top_k)[-1].sort(-1).values.cpu()

    hooks = [r.register_forward_hook(partial(keep, layer, *rest)) for layer, (r, *rest) in enumerate(found)]
    decoder = _around(model, found[-1][0])[-1]  # without the head: nobody needs its logits
    try:
        with without_dropout(model):
            decoder(**{k: v for k, v in batch.items() if k not in ("labels", "valid")} | {"use_cache": False})
    finally:
        for hook in hooks:
            hook.remove()
    valid = batch.get("valid", batch.get("attention_mask"))
    every = torch.stack([chosen[layer] for layer in sorted(chosen)])
    return every if valid is None else every[:, valid.reshape(-1).bool().cpu()]


def changed_share(before: Tensor, after: Tensor) -> Tensor:
    """Share of tokens whose set of experts changed between two snapshots of `routing`, by layer (L,)."""
    return (before != after).any(-1).float().mean(-1)
