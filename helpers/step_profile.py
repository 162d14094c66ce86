"""Where the time and the memory of one training step go, measured with hooks on the model's parts.

At each moment the clock runs for one part: the one that was begun last and has not ended. So the parts add up to the step. A
part's forward goes from its pre-hook to its hook, its backward from the gradient's arrival at its output to the departure at
its input, or to the end of the pass where the input needs none. What gradient checkpointing computes again in the backward
pass counts as that part's backward.

Memory: the bytes of tensors that are made during the pass and are still alive, at their peak. Meant for the course's small
models; on a GPU it waits for the device at each border, so its step is slower than a real one.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers import losses
from helpers.audit import audit, router_recorders
from helpers.budget import LiveBytes
from helpers.experts import is_experts

LAST = REST, HEAD, OPTIMIZER = "norms, embeddings, rest", "head and loss", "optimizer"


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
    """Seconds by part and direction, from hooks; without a model, of the phases alone."""

    def __init__(self, model: nn.Module | None):
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
        self.running: list[tuple[tuple, str]] = []  # (key, part), the one that was begun last at the end
        self.direction, self.last, self.hooks = "forward", self.now(), []
        if model is None:
            return
        for layer in (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)):
            self._time_forward(layer, REST)  # computed again, it begins in the middle of the backward of a part of its own
        for module, part in _parts(model).items():
            self._time_forward(module, part)
            if part == "attention":  # called with keywords, which backward hooks of modules do not see
                self.hooks.append(module.register_forward_hook(self._follow, with_kwargs=True))
            else:
                self.hooks.append(module.register_full_backward_pre_hook(self._start("backward", part)))
                self.hooks.append(module.register_full_backward_hook(self._stop("backward")))

    def _time_forward(self, module: nn.Module, part: str) -> None:
        self.hooks.append(module.register_forward_pre_hook(self._start("forward", part)))
        self.hooks.append(module.register_forward_hook(self._stop("forward"), always_call=True))

    def _follow(self, module, args, kwargs, output) -> None:
        """The same for a module whose input is a keyword, with hooks on the tensors themselves."""
        entry = kwargs.get("hidden_states", args[0] if args else None)
        leaving = output[0] if isinstance(output, tuple) else output
        start, stop = self._start("backward", "attention"), self._stop("backward")
        if leaving.requires_grad:
            leaving.register_hook(lambda _grad: start(module))
        if entry is not None and entry.requires_grad:
            entry.register_hook(lambda _grad: stop(module))

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _note(self) -> None:
        """The time since the last event goes to the part that was running."""
        now = self.now()
        if self.running:
            self.seconds[self.running[-1][1]][self.direction] += now - self.last
        self.last = now

    def _start(self, kind: str, part: str):
        def hook(module, *_):
            self._note()
            self.running.append(((id(module), kind), part))

        return hook

    def _stop(self, kind: str):
        def hook(module, *_):
            self._note()
            begun = [i for i, (key, _part) in enumerate(self.running) if key == (id(module), kind)]
            if begun:
                del self.running[begun[-1]]

        return hook

    @contextmanager
    def phase(self, direction: str, part: str) -> Iterator[None]:
        """What is in no other part counts as this one's. Closes what is still open at its end."""
        self._note()
        self.direction, self.running = direction, [((), part)]
        yield
        self._note()
        self.running = []

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _step(model: nn.Module, batch: dict[str, torch.Tensor], clock: _Clock) -> float:
    """Forward and backward; returns the loss."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "valid", "rows")}
    with clock.phase("forward", REST):
        hidden, targets = losses.completion_states(model, inputs, batch["labels"], model)
    with clock.phase("forward", HEAD):
        loss = losses.linear_cross_entropy(hidden, model.get_output_embeddings().weight, targets) / max(1, len(targets))
    with warnings.catch_warnings(), clock.phase("backward", REST):
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # a first layer without inputs to train
        loss.backward()
    return loss.item()


def _total(seconds: dict[str, dict[str, float]]) -> float:
    return sum(sum(part.values()) for part in seconds.values())


def profile_step(model: nn.Module, batch: dict[str, torch.Tensor], repeats: int = 3) -> dict[str, Any]:
    """{"seconds": part → {"forward", "backward"}, of the quickest of `repeats` steps; "mib": what is held; "tokens"; "loss"}.

    Includes an optimizer step with a learning rate of 0; leaves weights, hooks and mode as they were, and no gradients.
    ValueError for a model whose head is more than a product.
    """
    if not losses.plain_head(model):
        raise ValueError("this model's head is more than a product (scaled, capped or trained), and only a product is timed here")
    device = model.get_output_embeddings().weight.device
    batch = {name: value.to(device) for name, value in batch.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    was_training = model.training
    model.train()
    best: dict[str, dict[str, float]] = {}
    for _ in range(repeats):
        clock = _Clock(model)
        try:
            _step(model, batch, clock)
        finally:
            clock.remove()
        with clock.phase("forward", OPTIMIZER):
            optimizer.step()
        optimizer.zero_grad()
        if not best or _total(clock.seconds) < _total(best):
            best = clock.seconds
    with LiveBytes() as peak:
        loss = _step(model, batch, _Clock(None))
    optimizer.zero_grad()
    model.train(was_training)
    adapters = sum(p.nbytes for p in trained)
    frozen = sum(part.bytes for part in audit(model).parts.values()) - adapters  # of packed weights, scales as well
    bytes_held = {
        "frozen weights": frozen,
        "adapters": adapters,
        "their gradients": adapters,
        "their two Adam moments": 2 * adapters,
        "activations at the peak": max(0, peak.peak - adapters),
    }
    return {
        "seconds": {part: best[part] for part in (*(p for p in best if p not in LAST), *LAST)},
        "mib": {name: value / 2**20 for name, value in bytes_held.items()},
        "tokens": int(batch["valid"].sum()) if "valid" in batch else batch["input_ids"].numel(),
        "loss": loss,
    }
