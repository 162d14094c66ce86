"""Activation checkpointing, under whichever of its two names the installed transformers has (the older one goes with version 6).

Between forward and backward only each layer's input is kept; the rest is computed once more (Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import TrainingArguments

_NEW = "activation_checkpointing"
_NAME = _NEW if _NEW in {f.name for f in dataclasses.fields(TrainingArguments)} else "gradient_checkpointing"


def enable(model: nn.Module, use_reentrant: bool = False, **settings: Any) -> None:
    """Switch it on in a transformers model, with or without adapters; `settings` go to `torch.utils.checkpoint.checkpoint`."""
    switch = getattr(model, f"{_NAME}_enable")
    switch(**{f"{_NAME}_kwargs": {"use_reentrant": use_reentrant, **settings}})


def disable(model: nn.Module) -> None:
    """Switch it off."""
    getattr(model, f"{_NAME}_disable")()


def arguments() -> dict[str, Any]:
    """What `TrainingArguments` takes to switch it on."""
    return {_NAME: True, f"{_NAME}_kwargs": {"use_reentrant": False}}
