"""The kernels of `expert_kernels` as torch operators; switching them on, and whether they can be used here.

As operators of a library ("moe_course") they have a place in torch's dispatcher: what counts kernels or runs a step without
numbers, on the meta device, sees them like torch's own. Each writes into tensors that it is given.

They are an option (`fuse`, `--fused-kernels`), and not the default: Triton's interpreter has run them in fp32 and fp16, and its
compiler has made bf16 code for A100 and H100, but no GPU has run them yet. Without them torch's own kernels
compute the same in more passes over memory; so it is on CPUs, on GPUs before Ampere, in fp32, and for gates other than SiLU's.
Each expert has launches of its own, so with many small experts (OLMoE) they may gain nothing.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

COLUMNS = 128  # of a program's tile
DEVICES = {"cuda", "meta"}  # where they may run; with Triton's interpreter, for tests, on CPUs
DTYPES = (torch.bfloat16, torch.float16)
MOST_RANK = 64  # whose factors fit into what an L4 has of memory on the chip
AMPERE = (8, 0)

LIBRARY = torch.library.Library("moe_course", "DEF")


def _operator(schema: str) -> Callable[..., None]:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)

    def launch(*args) -> None:
        with torch.cuda.device_of(args[0]):  # Triton launches on the current GPU, wherever the tensors are
            getattr(import_module("helpers.expert_kernels"), name)(*args)

    for device in ("CUDA", "CPU"):
        LIBRARY.impl(name, launch, device)
    LIBRARY.impl(name, lambda *_: None, "Meta")
    return getattr(torch.ops.moe_course, name).default


# codes (bytes,) uint8 of NF4, scales (bytes / 32,) fp32, table (16,) fp32 → out, 2 · bytes weights: what bitsandbytes unpacks.
unpack = _operator("unpack(Tensor codes, Tensor scales, Tensor table, Tensor(a!) out) -> ()")

# x (T, H), token (n,) → rows = x[token] (n, H), and kept: what dropout leaves of them. One of the two may be None.
take = _operator("take(Tensor x, Tensor token, Tensor(a!)? rows, Tensor(b!)? kept, int seed, float dropout) -> ()")

# h (n, 2I) + thin (n, r) @ b (2I, r)ᵀ → gated = silu(first half) · second half (n, I), and kept: what dropout leaves of it.
# The n rows are those from `first` on of a group that shares a seed; so below.
gate = _operator(
    "gate(Tensor h, Tensor? thin, Tensor? b, Tensor(a!) gated, Tensor(b!)? kept, int first, int seed, float dropout) -> ()"
)

# The derivative. With ga = g (n, I) + what dropout leaves of thin2 (n, r) @ a2 (r, I), the gradient of the gated activations:
# gh (n, 2I), the gradient of h; kept again; partial (n, blocks of columns) fp32, whose sum over a row is ⟨ga, gated⟩.
gate_back = _operator(
    "gate_back(Tensor h, Tensor? thin1, Tensor? b, Tensor g, Tensor? thin2, Tensor? a2, Tensor(a!) gh, Tensor(b!)? kept, "
    "Tensor(c!) partial, int first, int seed, float dropout) -> ()"
)

# out (n, m) = what dropout leaves of thin (n, r) @ a (r, m).
thin_product = _operator("thin_product(Tensor thin, Tensor a, Tensor(a!) out, int first, int seed, float dropout) -> ()")

# rows (T·k, H), place (T·k,), weight (T, k) → out (T, H): for each token the weighted sum of its k rows, which are at `place`.
by_token = _operator("by_token(Tensor rows, Tensor place, Tensor weight, Tensor(a!) out) -> ()")


def partials(like: Tensor) -> Tensor:
    """For `gate_back`, beside g (n, I): (n, blocks of columns)."""
    return like.new_empty(len(like), -(-like.shape[1] // COLUMNS), dtype=torch.float32)


def problem() -> str | None:
    """Why the GPU at hand cannot run them, if so. Tried out, because Triton needs compilers of its own."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    return _problem_of(torch.cuda.current_device())


@functools.cache
def _problem_of(_gpu: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability() < AMPERE:
        return "they need a GPU from Ampere on"
    shapes = ((3, 140), (3, 4), (140, 4), (3, 70), (3, 70))
    h, thin, b, gated, kept = (torch.ones(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    try:
        gate(h, thin, b, gated, kept, 0, 0, 0.5)
        wanted = 5 * nn.functional.silu(torch.tensor(5.0))  # of 1 + 4 products of ones
        near, dropped = (gated - wanted).abs() < 0.01 * wanted, kept == 0
        right = bool(near.all() and ((kept == gated) | dropped).all() and dropped.any() and not dropped.all())
    except Exception as error:  # compilers and drivers have their own
        return f"Triton fails with {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
    return None if right else "Triton's kernels give wrong numbers"


def check() -> None:
    """ValueError if the GPU at hand cannot run them."""
    if why := problem():
        raise ValueError(f"the fused kernels cannot be used here: {why}; train without them")


def suits(experts: nn.Module) -> bool:
    """Whether an expert stack is computed by `helpers.experts`, and its gate is the one of the kernels."""
    ours = getattr(experts.config, "_experts_implementation", None) == "nf4"
    plain = type(experts)._apply_gate.__module__.startswith("transformers.integrations.")  # no gate of the model's own
    return ours and plain and experts.is_concatenated and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))


def fuse(model: nn.Module, compiled: bool = True) -> int:
    """Switch the kernels on in every expert stack of a model that suits; how many that are.

    `compiled`: norms and attention, which are small kernels, too, are handed to torch.compile. They are compiled when they are
    first run.

    ValueError if the model's GPU cannot run them, if they do not know its dtype or its adapters' rank, or if no experts suit.
    """
    stacks = [m for m in model.modules() if hasattr(type(m), "_apply_gate") and suits(m)]
    device = next(model.parameters()).device.type
    if device == "cuda":
        check()
    if device not in DEVICES:
        raise ValueError(f"the fused kernels run on a CUDA GPU, and this model is on {device}: train without them")
    if not stacks:
        raise ValueError("the fused kernels compute 4-bit experts with a SiLU gate, and this model has none: train without them")
    dtypes = {getattr(p, "quant_state", p).dtype for m in stacks for p in (m.gate_up_proj, m.down_proj)}
    if other := dtypes - set(DTYPES):
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"the fused kernels compute in {known}, and this model in {other.pop()}: train without them")
    ranks = [r for m in model.modules() if isinstance(getattr(m, "r", None), dict) for r in m.r.values()]
    if ranks and max(ranks) > MOST_RANK:
        raise ValueError(f"the fused kernels take LoRA ranks up to {MOST_RANK}, not {max(ranks)}: train without them")
    for module in stacks:
        module.fused_kernels = True
    if compiled and device == "cuda" and not compile_around_experts(model):
        raise ValueError("no norm and no attention to compile was found in this model: train without the fused kernels")
    return len(stacks)


def compile_around_experts(model: nn.Module) -> list[str]:
    """Hand the norms and the attention of each decoder layer to torch.compile; their names.

    The experts stay as they are: how many rows each has, Python must know.
    """
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        within = any(name.startswith(outer + ".") for outer in found)  # norms inside attention go with it
        if (last == "self_attn" or last.endswith("norm")) and not within:
            module.compile(dynamic=True)
            found.append(name)
    return found


def usable(experts: nn.Module, like: Tensor, dtype: torch.dtype) -> bool:
    """Whether a pass over an expert stack, on `like`'s device and computed in `dtype`, goes through the kernels."""
    return experts.__dict__.get("fused_kernels", False) and like.device.type in DEVICES and dtype in DTYPES
