"""Controls that must not show the effect: a random adapter of the same size, and labels that mean nothing.

(The third is the base model itself: `with model.disable_adapter():`.)
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import torch

from helpers.data import Labelled
from helpers.merging import active_factors


@contextlib.contextmanager
def random_adapter(model, seed: int = 0) -> Iterator[None]:
    """Inside, each adapter is normal noise, of the size that training gave it; afterwards it is back, to the bit.

    Of the same size is the change of the weights: ‖B·A‖ (Frobenius) of each adapter, and of each expert in a stack. If any
    change of this size made replies follow the modifier, this one would.
    """
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has no LoRA adapter to replace by a random one")
    factors = active_factors(model)
    kept = [(f.A.detach().clone(), f.B.detach().clone()) for f in factors]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for f, (a, b) in zip(factors, kept, strict=True):
                for part, old in ((f.A, a), (f.B, b)):
                    noise = torch.randn(old.shape, generator=generator).to(old)
                    part.copy_(noise * (old.norm() / noise.norm()))
                f.B.mul_((product_norms(a, b) / product_norms(f.A, f.B).clamp_min(1e-30))[:, None, None])
        yield
    finally:
        with torch.no_grad():
            for f, (a, b) in zip(factors, kept, strict=True):
                f.A.copy_(a)
                f.B.copy_(b)


def product_norms(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """‖B·A‖ of each expert (E,), for A (E, r, in) and B (E, out, r), without the products: ‖BA‖² = tr(BᵀB·AAᵀ)."""
    a, b = a.float(), b.float()
    return ((b.mT @ b) * (a @ a.mT)).sum((1, 2)).clamp_min(0).sqrt()


def shuffled_labels(labelled: Sequence[Labelled], seed: int = 0) -> list[Labelled]:
    """The same stories and the same modifiers, dealt out anew over all replies: nothing can be learned from them.

    Replies without modifier take part, so how often each class (and none) occurs stays the same.
    """
    labels = [label for _, lengths in labelled for label in lengths or ()]
    random.Random(seed).shuffle(labels)
    rest = iter(labels)
    return [(story, [next(rest) for _ in lengths or ()]) for story, lengths in labelled]
