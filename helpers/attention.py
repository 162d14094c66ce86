"""Which attention packed rows are trained with: FlashAttention, flex_attention or SDPA, whichever is there.

Stories that share a row must not see each other. All three keep them apart (given restarted positions, no mask and no cache),
with equal results; they differ in what it costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.utils import is_flash_attn_2_available


def choose_attention(kind: type, dtype: torch.dtype | str, asked: str | None = None) -> tuple[str, str]:
    """Which attention a model of class `kind` is trained with here (transformers' name for it), and why.

    All give the same results on packed rows. SDPA needs a mask of rows × tokens² entries for them, cannot use its flash kernel
    with it and multiplies the masked parts too; flex_attention and FlashAttention skip what lies between two documents. Without
    a GPU it is always SDPA. Run so far: SDPA, eager, and flex_attention's forward pass, on CPUs. Not run: anything on a GPU, so
    flex_attention is compared with SDPA there on a small example before it is taken.
    """
    if asked:
        return asked, "asked for"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return best_attention(kind, dtype, capability, is_flash_attn_2_available(), flex_problem)


def best_attention(kind, dtype, capability: tuple[int, int] | None, flash: bool, problem) -> tuple[str, str]:
    """`choose_attention` from what was found out: the GPU, whether flash-attn is installed, what is wrong with flex_attention."""
    if capability is None:
        return "sdpa", "there is no CUDA GPU"
    if capability < (8, 0):
        return "sdpa", f"the others need compute capability 8.0, this is {capability[0]}.{capability[1]}"
    half = str(dtype).removeprefix("torch.") in ("bfloat16", "float16")
    if flash and half and kind._supports_flash_attn:
        return "flash_attention_2", "the package flash-attn is installed"
    if not kind._supports_flex_attn:
        return "sdpa", f"flash-attn is not installed, and {kind.__name__} has no flex_attention"
    if found := problem():
        return "sdpa", f"flash-attn is not installed, and flex_attention fails here: {found}"
    return "flex_attention", "flash-attn is not installed; flex_attention gives what SDPA gives"


def flex_problem(device: str = "cuda") -> str | None:
    """What is wrong with compiled flex_attention on this device, tried forward and backward on two documents; None if nothing is.

    It is compiled when it is first called, which needs Triton and a C compiler.
    """
    document = torch.tensor([0] * 100 + [1] * 156, device=device)
    x = torch.randn(3, 1, 2, 256, 64, device=device, generator=torch.Generator(device).manual_seed(0)).requires_grad_()

    def together(_batch, _head, query, key):
        return (query >= key) & (document[query] == document[key])

    try:
        mask = create_block_mask(together, None, None, 256, 256, device=device)
        ours = torch.compile(flex_attention)(*x, block_mask=mask)
        dense = (document[:, None] == document) & torch.ones(256, 256, dtype=torch.bool, device=device).tril()
        theirs = F.scaled_dot_product_attention(*x, attn_mask=dense)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
        for a, b in ((ours, theirs), gradients):
            if (a - b).norm() > 1e-2 * b.norm():  # a GPU may multiply in TF32
                return "other results than SDPA"
    except Exception as error:  # of Triton, of the compiler, of torch: each has its own
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
