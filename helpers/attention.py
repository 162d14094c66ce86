"""Which attention packed rows are trained with, and one that computes only what is there.

Stories that share a row must not see each other. transformers says so to SDPA with a mask of rows × tokens² entries; then the
flash kernel cannot be used, and what the mask forbids is computed all the same. "sdpa_documents", registered here, calls SDPA
once for each document instead: causal, without a mask, through the fastest kernel that torch has on the device. Four equal
documents in a row are a quarter of the products. Results are equal; so are those of flex_attention and of the package flash-attn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import is_flash_attn_2_available

DOCUMENTS = "sdpa_documents"


def documents_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """Of packed rows the documents' lengths (n,), all rows laid end to end, on the CPU; of anything else the mask SDPA gets.

    transformers asks for a mask that it calls not skippable when it finds restarted positions, no mask and no cache. Where a
    token may not see the one before it, a document begins.
    """
    packed = not allow_is_causal_skip and attention_mask is None and local_size is None and q_length == kv_length
    if not packed:
        return sdpa_mask(
            batch_size, q_length, kv_length, mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip, device=device, **kwargs,
        )  # fmt: skip
    row, token = torch.arange(batch_size, device=device).unsqueeze(1), torch.arange(1, q_length, device=device)
    begins = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    begins[:, 1:] = ~mask_function(row, torch.zeros_like(row), token, token - 1)
    starts = begins.flatten().cpu().nonzero().flatten()  # the one time that Python waits for the GPU here
    return starts.diff(append=starts.new_tensor([batch_size * q_length]))


def documents_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, heads, S, D) → (B, S, heads, D), document by document if those are given."""
    if attention_mask is None or attention_mask.ndim != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, lengths, width = [], iter(attention_mask.tolist()), query.shape[2]
    for whole in zip(*(x.split(1) for x in (query, key, value)), strict=True):
        sizes = []
        while sum(sizes) < width:
            sizes.append(next(lengths))
        documents = zip(*(x.split(sizes, 2) for x in whole), strict=True)
        rows.append(torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in documents], 1))
    return torch.cat(rows), None


AttentionInterface.register(DOCUMENTS, documents_attention)
AttentionMaskInterface.register(DOCUMENTS, documents_mask)


def choose_attention(kind: type, dtype: torch.dtype | str, asked: str | None = None) -> tuple[str, str]:
    """Which attention a model of class `kind` is trained with here (transformers' name for it), and why.

    Run so far, on CPUs: "sdpa_documents", "sdpa", "eager", and flex_attention's forward pass. Not run: anything on a GPU.
    """
    if asked:
        return asked, "asked for"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return best_attention(kind, dtype, capability, is_flash_attn_2_available())


def best_attention(kind, dtype, capability: tuple[int, int] | None, flash: bool) -> tuple[str, str]:
    """`choose_attention` from what was found out: the GPU, and whether flash-attn is installed."""
    half = str(dtype).removeprefix("torch.") in ("bfloat16", "float16")
    if flash and half and capability and capability >= (8, 0) and kind._supports_flash_attn:
        return "flash_attention_2", "the package flash-attn is installed"
    if kind._supports_sdpa:
        return DOCUMENTS, "torch's own kernels, one document at a time"
    return "eager", f"{kind.__name__} has nothing faster"
