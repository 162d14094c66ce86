"""Memory of a training step before it is run: every part counted, the peak, and what fits which GPU.

Weights, adapters, gradients and Adam's moments are counted on the model's real shapes, on torch's meta device, with the very
rules that load and adapt it. Activations follow from what one layer keeps for its backward pass:

    attention   the residual stream, the norm's output, a dropped copy for each adapter, q, k, v, the output, a mask if any
    experts     their input, and per token and chosen expert the pre-activations (2I); no weights

Without checkpointing all layers keep theirs. With it, each layer keeps its input (T × H), and one layer at a time everything
else. On top come the working tensors of one expert's backward pass. The tests hold the sum against the measured peak of live
tensors (`LiveBytes`).

B rows, S tokens per row, T = B·S, H hidden size, I intermediate size, E experts, k experts per token.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from helpers.profiles import Profile

GIB = 2**30
GPUS = {"T4": 14.7, "L4": 22.2, "A100-40": 39.6, "A100-80": 79.3}  # GiB that the driver reports, not the name's
# What the profiles' models look like, so that a budget needs no network: model type and where it differs from the type's default.
SHAPES = {
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", {"max_position_embeddings": 32768}),
    "allenai/OLMoE-1B-7B-0924": ("olmoe", {"intermediate_size": 1024}),
}
# GiB for the CUDA context, cuBLAS and what torch's allocator reserves beyond tensors: an allowance. On an H200 it reserved up to
# 1.2 GiB more than was estimated for tensors (benchmarks/results/experts-h200.json).
RESERVE = 2.0
IMBALANCE = 1.25  # the fullest expert has this many times the average of tokens: assumed


# ------------------------------------------------------------------------------------------------------ before the run


@dataclass(frozen=True)
class Budget:
    """Bytes of a training step by part. `layer` is what exists for one layer only, while its backward pass runs.

    Gradients count in full, as they do from the second micro-batch of an accumulated step on.
    """

    name: str
    micro_batch: int  # rows
    context: int  # tokens in a row
    parts: dict[str, int]  # in the order of `PARTS`
    uncounted: tuple[str, ...] = ()  # see `Model`

    @property
    def peak(self) -> int:
        """The most that is alive at one time: while a layer's backward pass runs, or during the loss."""
        fixed = sum(self.parts[p] for p in ("weights", "adapters", "gradients", "optimizer", "kept"))
        return fixed + max(self.parts["layer"], self.parts["loss"])

    def fits(self, gib: float, reserve: float = RESERVE) -> bool:
        return self.peak / GIB + reserve <= gib

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row a part: part, GiB, what it is; and the peak."""
        rows = [{"part": p, "GiB": self.parts[p] / GIB, "what": what} for p, what in PARTS.items()]
        return [*rows, {"part": "peak", "GiB": self.peak / GIB, "what": "all but the smaller of layer and loss"}]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.micro_batch} x {self.context:,} tokens"]
        lines += [f"{r['part']:<12}{r['GiB']:>9.3f} GiB  {r['what']}" for r in self.table]
        verdicts = [f"{gpu} {'fits' if self.fits(gib) else 'does not fit'}" for gpu, gib in GPUS.items()]
        lines.append(f"with {RESERVE:.1f} GiB to spare: " + ", ".join(verdicts))
        if self.uncounted:
            lines.append(f"NOT COUNTED: the activations of {' and '.join(self.uncounted)}; the peak is higher by those")
        return "\n".join(lines)


PARTS = {
    "weights": "4-bit weights with their scales, and what stays unquantised",
    "adapters": "LoRA factors in fp32",
    "gradients": "of the adapters, fp32",
    "optimizer": "Adam's two moments, fp32",
    "kept": "activations of all layers between forward and backward",
    "layer": "one layer's own: recomputed activations, working tensors of an expert",
    "loss": "head and loss: hidden states, their gradient, one chunk of logits",
}


@dataclass(frozen=True)
class Model:
    """What of a model decides its memory: bytes counted once, sizes for the activations."""

    name: str
    weights: int
    adapters: int  # numbers
    dtype: torch.dtype
    sizes: dict[str, int]
    uncounted: tuple[str, ...] = ()  # parts whose activations the formulas below do not know


def describe(
    config: PreTrainedConfig,
    dtype: torch.dtype | str = "bfloat16",
    r: int = 32,
    experts: bool = True,
    router: bool = True,
    attention: bool = True,
    name: str | None = None,
) -> Model:
    """Count a model of this configuration on the meta device: no weight is made, Mixtral takes a second.

    ValueError if its configuration does not say in one number what the activations are made of (layers of different sizes).
    """
    from helpers.quantization import as_dtype

    dtype, text = as_dtype(dtype), config.get_text_config()
    weights, adapters, normed = count(config, dtype, r, experts, router, attention)
    try:
        sizes = _sizes(text)
    except (AttributeError, RuntimeError, TypeError) as error:  # RuntimeError: of attributes that differ by layer
        raise ValueError(f"the activations of a {text.model_type} cannot be counted from its configuration ({error})") from error
    sizes |= dict(rank=r if adapters else 0, adapted=attention, routed=router, normed=normed)
    return Model(name or text.model_type, weights, adapters, dtype, sizes, _uncounted(text))


def count(
    config: PreTrainedConfig, dtype: torch.dtype, r: int, experts: bool, router: bool, attention: bool = True
) -> tuple[int, int, bool]:
    """(bytes of the weights in 4 bit, numbers in the adapters, whether queries and keys have norms)."""
    from peft import get_peft_model

    from helpers import qlora, quantization

    model, quantizer = quantization.empty_4bit(config, dtype)
    weights = 0
    for full_name, param in model.named_parameters():
        packed = quantizer.param_needs_quantization(model, full_name)
        weights += packed_bytes(param.numel()) if packed else param.numel() * param.element_size()
    adapters = 0
    if experts or router or attention:
        settings = qlora.lora_config(model, r=r, dropout=0.0, attention=attention, experts_too=experts, router=router)
        adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
        adapters = sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n)
    normed = any(name.endswith(("q_norm", "query_layernorm")) for name, _ in model.named_modules())
    return weights, adapters, normed


def _uncounted(text: PreTrainedConfig) -> tuple[str, ...]:
    """What a configuration has beside attention and routed experts of one size."""
    marks = {
        "shared experts": (
            "n_shared_experts",
            "shared_expert_intermediate_size",
            "num_shared_experts",
            "shared_intermediate_size",
        ),
        "latent attention": ("kv_lora_rank",),
        "dense layers": ("first_k_dense_replace", "mlp_only_layers"),
    }
    return tuple(part for part, names in marks.items() if any(getattr(text, name, None) for name in names))


def _sizes(text: PreTrainedConfig) -> dict[str, int]:
    """What the activations are made of. AttributeError for what a configuration does not have."""
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(text, name, None))), None)
    if experts is None:
        raise AttributeError(f"no {', '.join(names[:-1])} or {names[-1]}")
    return dict(
        layers=text.num_hidden_layers, hidden=text.hidden_size, vocabulary=text.vocab_size, experts=experts,
        inner=getattr(text, "moe_intermediate_size", None) or text.intermediate_size, top_k=text.num_experts_per_tok,
        queries=heads * head_dim, keys=(getattr(text, "num_key_value_heads", None) or heads) * head_dim, heads=heads,
        longest=text.max_position_embeddings,
    )  # fmt: skip


def packed_bytes(weights: int) -> int:
    """NF4 with double quantisation: a nibble a weight, a byte a block of 64, four bytes 256 blocks, code books and mean."""
    blocks = math.ceil(weights / 64)
    return math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def estimate(
    what: Profile | PreTrainedConfig | Model,
    micro_batch: int | None = None,
    context: int | None = None,
    checkpointing: bool | None = None,
    dropout: float | None = None,
    device: str = "cuda",
    masked: bool = False,
    imbalance: float = IMBALANCE,
    **lora: Any,
) -> Budget:
    """The budget of a profile, of a model configuration, or of a model that was `describe`d before.

    What is not given is taken from the profile; otherwise one row of the longest context, with checkpointing, dropout 0.05.
    `masked`: packed rows go through SDPA with a mask (`--attention sdpa`). `imbalance`: how many times the average of tokens
    the fullest expert has. `lora` goes to `describe`.
    """
    from helpers.profiles import Profile

    if isinstance(what, Profile):
        usual = (what.micro_batch, what.context, what.gradient_checkpointing, what.lora_dropout)
        model = of_profile(what, **lora)
    else:
        model = what if isinstance(what, Model) else describe(what, **lora)
        usual = (1, model.sizes["longest"], True, 0.05)
    given = (micro_batch, context, checkpointing, dropout)
    rows, tokens, checkpointing, dropout = (u if g is None else g for g, u in zip(given, usual, strict=True))
    if rows < 1 or tokens < 1:
        raise ValueError(f"micro-batch {rows} and context {tokens} must be at least 1")
    layer_kept, working, head = _activations(model, rows, tokens, dropout, device, masked, imbalance)
    z = model.sizes
    checkpoint = rows * tokens * z["hidden"] * model.dtype.itemsize
    parts = {
        "weights": model.weights,
        "adapters": 4 * model.adapters,
        "gradients": 4 * model.adapters,
        "optimizer": 8 * model.adapters,
        "kept": z["layers"] * (checkpoint if checkpointing else layer_kept),
        "layer": working + (layer_kept if checkpointing else 0),
        "loss": head,
    }
    return Budget(model.name, rows, tokens, parts, model.uncounted)


def config_of(profile: Profile) -> PreTrainedConfig:
    """The configuration of a profile's base, from `SHAPES`, or else from disk or the Hub (a few kilobytes)."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if profile.base in SHAPES:
        kind, changes = SHAPES[profile.base]
        return CONFIG_MAPPING[kind](**changes)
    return AutoConfig.from_pretrained(profile.base_path)


def of_profile(profile: Profile, **lora: Any) -> Model:
    """`describe` for a profile's base."""
    wanted = {"r": profile.lora_r, "experts": profile.lora_experts, "router": profile.lora_router, **lora}
    return describe(config_of(profile), profile.dtype, name=f"{profile.name} ({profile.base})", **wanted)


def adapter_numbers(profile: Profile) -> int:
    """In the adapters of a profile; also of a model whose activations cannot be counted."""
    from helpers.quantization import as_dtype

    wanted = (profile.lora_r, profile.lora_experts, profile.lora_router)
    return count(config_of(profile), as_dtype(profile.dtype), *wanted)[1]


def _activations(
    model: Model, rows: int, tokens: int, dropout: float, device: str, masked: bool, imbalance: float
) -> tuple[int, int, int]:
    """(what a layer keeps, what its backward pass works with beside that, what the loss takes) in bytes."""
    z, s = model.sizes, model.dtype.itemsize
    t, h, inner, k = rows * tokens, z["hidden"], z["inner"], z["top_k"]
    stream = t * h * s
    fp32_copies = 2 * t * h * 4 if s < 4 else 0  # both norms work in fp32
    norms = 2 * stream + fp32_copies
    inputs = [h, h, h, z["queries"]] if z["adapted"] and z["rank"] else []  # of q, k, v and o
    mask_bytes = s if device == "cpu" else 1
    copies = sum(inputs) * t * (s + mask_bytes) if dropout else stream
    thin = len(inputs) * t * z["rank"] * s
    # q, and k and v for as many heads: with a mask they are repeated, without one the kernel does it
    repeated = 2 * (z["queries"] if masked else z["keys"])
    mask = rows * tokens**2 * s if masked else 0
    attention = t * (2 * z["queries"] + repeated) * s + 4 * t * z["heads"] + mask + copies + thin
    if z["normed"]:  # queries and keys have norms of their own, which work in fp32 too
        attention += t * (z["queries"] + z["keys"]) * (s + (4 if s < 4 else 0))
    # an adapted router works in fp32, and keeps its input for the adapter
    routing = t * z["experts"] * (s + 8) + 2 * t * k * (8 + 4) + (4 * t * h if z["routed"] and s < 4 else 0)
    factors = 2 * model.adapters // z["layers"] * s if s < 4 else 0  # copies in half precision, and their gradients
    layer_kept = norms + attention + routing + stream + factors + t * k * 2 * inner * s
    together, most = _together(t * k, z["experts"], inner, h, device)
    uneven = 1 + (imbalance - 1) / math.sqrt(together)  # several experts even each other out
    most = min(t * min(together, k), math.ceil(uneven * most))
    mask = most * inner if dropout else 0  # a byte each
    # the gate's backward pass, or the unpacked matrices through which the gradient goes back into the input
    gate = (8 if dropout else 7) * inner + 2 * h
    expert = max(most * gate * s, (2 * inner * h * together + most * (2 * inner + 2 * h)) * s) + mask
    scales = 4 * 3 * z["experts"] * inner * h // 64  # of both stacks, for as long as a pass over the experts takes
    working = expert + scales + (2 + k) * stream + (rows * tokens**2 if masked else 0)
    from helpers.losses import tokens_at_a_time

    chunk = min(t, tokens_at_a_time(t, z["vocabulary"], device))
    head = 2 * stream + chunk * z["vocabulary"] * (2 * 4 + (2 * s if s < 4 else 0))
    return layer_kept, working, head


def _together(assignments: int, experts: int, inner: int, hidden: int, device: str) -> tuple[int, int]:
    """(experts that are handled together, tokens of theirs) if all experts have as many tokens."""
    from helpers.expert_pass import groups_of

    each = max(1, assignments // experts)
    first = groups_of([each * (e + 1) for e in range(experts)], torch.Size((experts, 2 * inner, hidden)), device)[0]
    return len(first.spans), first.rows.stop


def suggest(model: Model, gib: float, reserve: float = RESERVE, step: int = 256, **options: Any) -> tuple[int, int] | None:
    """(micro-batch, context): the longest context that fits, in steps of 256 tokens up to the model's own, then the rows.

    None if not even one row of `step` tokens fits. `options` go to `estimate`.
    """
    step = min(step, model.sizes["longest"])

    def largest(fits, top: int) -> int:
        """The largest n in 1..top that fits, by bisection; 0 if none."""
        low, high = 0, top
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    steps = largest(lambda n: estimate(model, 1, n * step, **options).fits(gib, reserve), max(1, model.sizes["longest"] // step))
    if not steps:
        return None
    return largest(lambda n: estimate(model, n, steps * step, **options).fits(gib, reserve), 1024), steps * step


# ------------------------------------------------------------------------------------------------------ during the run


class LiveBytes(TorchDispatchMode):
    """Peak bytes of tensor storages that are created while it is active, and still alive at that moment."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), counts=False)  # was there before; views of it are nothing new
        out = func(*args, **kwargs)
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage, counts: bool = True) -> None:
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
