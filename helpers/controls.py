"""Controls that must not show the effect: a random adapter of the same size, and labels that mean nothing.

(The third is the base model itself: `with model.disable_adapter():`.)
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import torch

from helpers.data import Labelled


@contextlib.contextmanager
def random_adapter(model, seed: int = 0) -> Iterator[None]:
    """Inside, each LoRA tensor is normal noise with the Frobenius norm that training gave it; afterwards it is back, to the bit.

    If any change of this size made replies follow the modifier, this one would.
    """
    tensors = [(n, p) for n, p in sorted(model.named_parameters(), key=lambda item: item[0]) if ".lora_" in n]
    if not tensors:
        raise ValueError("the model has no LoRA adapter to replace by a random one")
    kept = [p.detach().clone() for _, p in tensors]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for (_, p), old in zip(tensors, kept, strict=True):
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.copy_(noise * (old.norm() / noise.norm()))
        yield
    finally:
        with torch.no_grad():
            for (_, p), old in zip(tensors, kept, strict=True):
                p.copy_(old)


def shuffled_labels(labelled: Sequence[Labelled], seed: int = 0) -> list[Labelled]:
    """The same stories and the same modifiers, dealt out anew over all replies: nothing can be learned from them.

    Replies without modifier take part, so how often each class (and none) occurs stays the same.
    """
    labels = [label for _, lengths in labelled for label in lengths or ()]
    random.Random(seed).shuffle(labels)
    rest = iter(labels)
    return [(story, [next(rest) for _ in lengths or ()]) for story, lengths in labelled]
