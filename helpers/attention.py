"""Which attention packed rows are trained with, and one that computes only what is there.

Stories that share a row must not see each other. transformers says so to SDPA with a mask of rows × tokens² entries; then the
flash kernel cannot be used, and what the mask forbids is computed all the same. "sdpa_documents", registered here, calls SDPA
once for each document instead: causal, without a mask, through the fastest kernel that torch has on the device. Four equal
documents in a row are a quarter of the products. Results are equal; so are those of flex_attention and of the package flash-attn.

That is attention. What else a model has for a memory, linear attention or a state, need not know where a document begins:
`check_packing` tries it out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.utils import is_flash_attn_2_available

from helpers.losses import evaluation_mode
from helpers.tokens import document_bounds

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


@torch.compiler.disable  # where documents end differs from batch to batch: compiled, each would be code of its own
def documents_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
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

    Run so far: "sdpa_documents", "sdpa" and "eager" on CPUs and on an H200, flex_attention there, and its forward pass on CPUs.
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


# ------------------------------------------------------------------------------------------- do documents stay apart?


def bounds(model: nn.Module, position_ids: Tensor) -> dict:
    """What the model's attention has to be told of packed rows beside their positions (B, T): nothing, except FlashAttention."""
    flash = ALL_MASK_ATTENTION_FUNCTIONS.get(model.config._attn_implementation) is flash_attention_mask  # which is none
    return document_bounds(position_ids) if flash else {}


def packing_errors(model: nn.Module) -> tuple[float, float]:
    """(what a document in front of it changes in a document, what one behind it changes), on two short random documents.

    Each is the relative difference of a token's logits from those of the document alone, the median over tokens. A document
    behind cannot be seen, so the second number is rounding: the same products in the same shapes. The median leaves out
    single tokens that rounding sends to other experts. Documents are short because what leaks may be soon forgotten.
    Draws no random numbers, leaves modes as they were, and is no pass that router losses count.
    """
    weight, generator = model.get_input_embeddings().weight, torch.Generator().manual_seed(0)
    a, b = (torch.randint(weight.shape[0], (length,), generator=generator) for length in (4, 5))

    def logits(*rows: tuple[Tensor, ...]) -> Tensor:
        ids = torch.stack([torch.cat(row) for row in rows]).to(weight.device)
        positions = torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in rows]).to(weight.device)
        return model(input_ids=ids, position_ids=positions, **bounds(model, positions), use_cache=False).logits.float()

    def error(found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)

    with torch.random.fork_rng([weight.device] if weight.is_cuda else []), evaluation_mode(model):
        (ab, ba), (alone_a,), (alone_b,) = logits((a, b), (b, a)), logits((a,)), logits((b,))
    behind = torch.cat([error(ab[len(a) :], alone_b), error(ba[len(b) :], alone_a)])
    before = torch.cat([error(ab[: len(a)], alone_a), error(ba[: len(b)], alone_b)])
    return behind.median().item(), before.median().item()


ROUNDING, SMALLEST = 8, 1e-4  # times the error that is rounding for sure, and an error that does no harm: a leak exceeds both


def _problem(model: nn.Module) -> str | None:
    """Why the model cannot be trained on packed rows with the attention that it has, if so."""
    try:
        leak, rounding = packing_errors(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any model's own code, with a mask that it may not know
        return f"fails with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if leak > max(ROUNDING * rounding, 2 * torch.finfo(model.dtype).eps, SMALLEST):
        return f"a document changes the next one's logits by {leak:.0%}"
    return None


def check_packing(model: nn.Module) -> str:
    """Which attention (transformers' name) keeps the documents of a packed row apart in this model: mostly the one it has.

    Tried out, as in `packing_errors`. Where "sdpa_documents" does not, but "sdpa" does, the model is given that one.
    ValueError for a model that mixes documents in any case: those with a recurrent state or linear attention do, and a few
    whose attention transformers gives no such mask.
    """
    asked, problems = model.config._attn_implementation, []
    for name in (asked, "sdpa") if asked == DOCUMENTS else (asked,):
        if name != asked:
            model.set_attn_implementation(name)
        problem = _problem(model)
        if problem is None:
            return name
        problems.append(f"{name}: {problem}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    raise ValueError(
        f"{type(base).__name__} cannot be trained on packed rows, whose stories must not see each other ({'; '.join(problems)}), "
        "and rows of one story each are not offered: use a base model that keeps them apart, like Mixtral or OLMoE"
    )
