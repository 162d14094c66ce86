"""Where the time and the memory of one training step go, measured with hooks on the model's parts.

Forward: from a module's pre-hook to its hook. Backward: from the gradient's arrival at its output to its departure at its
input, or to the end of the pass where the input needs none. Memory: the bytes of tensors that are made during the pass and are
still alive, at their peak. Meant for the course's small models; on a GPU it waits for the device at each border, so its step
is slower than a real one.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from helpers import losses
from helpers.budget import LiveBytes
from helpers.experts import is_experts
from helpers.quantization import router_recorders


def _parts(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that are timed: routers, expert stacks, attention, the head."""
    named = {module: "router" for module, _ in router_recorders(model)}
    for name, module in model.named_modules():
        if is_experts(module):
            named[module] = "experts"
        elif name.endswith(("self_attn", "attention")):
            named[module] = "attention"
    return named


class _Clock:
    """Seconds by part and direction, from hooks."""

    def __init__(self, model: nn.Module):
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
        self.begun: dict[tuple[int, str], float] = {}
        self.hooks = []
        for module, part in _parts(model).items():
            self.hooks += [
                module.register_forward_pre_hook(self._start("forward")),
                module.register_forward_hook(self._stop("forward", part), always_call=True),
            ]
            if part == "attention":  # called with keywords, which backward hooks of modules do not see
                self.hooks.append(module.register_forward_hook(self._follow, with_kwargs=True))
            else:
                self.hooks.append(module.register_full_backward_pre_hook(self._start("backward")))
                self.hooks.append(module.register_full_backward_hook(self._stop("backward", part)))

    def _follow(self, module, args, kwargs, output) -> None:
        """The same for a module whose input is a keyword, with hooks on the tensors themselves."""
        entry = kwargs.get("hidden_states", args[0] if args else None)
        leaving = output[0] if isinstance(output, tuple) else output
        start, stop = self._start("backward"), self._stop("backward", "attention")
        if leaving.requires_grad:
            leaving.register_hook(lambda _grad: start(module))
        if entry is not None and entry.requires_grad:
            entry.register_hook(lambda _grad: stop(module))

    def finish(self) -> None:
        """Close what is still open at the end of the backward pass."""
        for key in [k for k in self.begun if k[1] == "backward"]:
            self.seconds["attention"]["backward"] += self.now() - self.begun.pop(key)

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _start(self, kind: str):
        def hook(module, *_):
            self.begun[id(module), kind] = self.now()

        return hook

    def _stop(self, kind: str, part: str):
        def hook(module, *_):
            self.seconds[part][kind] += self.now() - self.begun.pop((id(module), kind), self.now())

        return hook

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _step(model: nn.Module, batch: dict[str, torch.Tensor], seconds: dict | None) -> float:
    """Forward and backward; returns the loss."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "valid", "rows")}
    start = _Clock.now()
    hidden, targets = losses.completion_states(model, inputs, batch["labels"], model)
    middle = _Clock.now()
    loss = losses.linear_cross_entropy(hidden, model.get_output_embeddings().weight, targets) / max(1, len(targets))
    head = _Clock.now()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # a first layer without inputs to train
        loss.backward()
    if seconds is not None:
        seconds |= {"forward": middle - start, "head": head - middle, "backward": _Clock.now() - head}
    return loss.item()


def profile_step(model: nn.Module, batch: dict[str, torch.Tensor], repeats: int = 3) -> dict[str, Any]:
    """{"seconds": part → {"forward", "backward"}, of the quickest of `repeats` steps; "mib": what is held; "tokens"; "loss"}.

    Includes an optimizer step with a learning rate of 0; leaves weights and hooks as they were, and no gradients.
    """
    device = model.get_output_embeddings().weight.device
    batch = {name: value.to(device) for name, value in batch.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    model.train()
    best: dict[str, Any] = {}
    for _ in range(repeats):
        clock, whole = _Clock(model), {}
        try:
            _step(model, batch, whole)
            clock.finish()
        finally:
            clock.remove()
        begun = _Clock.now()
        optimizer.step()
        whole["optimizer"] = _Clock.now() - begun
        optimizer.zero_grad()
        total = sum(whole.values())
        if not best or total < best["total"]:
            parts = {name: dict(value) for name, value in clock.seconds.items()}
            rest = {kind: whole[kind] - sum(p[kind] for p in parts.values()) for kind in ("forward", "backward")}
            parts["norms, embeddings, rest"] = {kind: max(0.0, value) for kind, value in rest.items()}
            parts["head and loss"] = {"forward": whole["head"], "backward": 0.0}
            parts["optimizer"] = {"forward": whole["optimizer"], "backward": 0.0}
            best = {"total": total, "seconds": parts}
    with LiveBytes() as peak:
        loss = _step(model, batch, None)
    optimizer.zero_grad()
    adapters = sum(p.nbytes for p in trained)
    frozen = sum(p.untyped_storage().nbytes() for p in {id(p): p for p in model.parameters() if not p.requires_grad}.values())
    bytes_held = {
        "frozen weights": frozen,
        "adapters": adapters,
        "their gradients": adapters,
        "their two Adam moments": 2 * adapters,
        "activations at the peak": max(0, peak.peak - adapters),
    }
    return {
        "seconds": best["seconds"],
        "mib": {name: value / 2**20 for name, value in bytes_held.items()},
        "tokens": int(batch["valid"].sum()) if "valid" in batch else batch["input_ids"].numel(),
        "loss": loss,
    }
