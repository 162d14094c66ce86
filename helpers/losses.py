"""Cross-entropy of a language model without its logits: head and loss together, a few tokens at a time.

    loss = Σ_t  logsumexp_v(h_t · W_v) − h_t · W_y(t)          ∂loss/∂h_t = (softmax(h_t Wᵀ) − onehot(y_t)) W

The logits of 4 rows of 10,240 tokens with a vocabulary of 32,000 are 4.9 GiB in fp32, and a naive loss holds several such
tensors. Here a chunk of tokens goes through the head, gives its share of the loss and at once its gradient, and is dropped: two
products a chunk, nothing computed twice (the idea of Liger's fused kernel, arXiv 2410.10989, in plain torch for any device).
torch's own `linear_cross_entropy` (since 2.13) has gradients as good, but adds the loss up in bf16, which is 2 % off for
thousands of tokens (a test watches it); Liger's needs Triton and replaces forwards.

N tokens, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from helpers.tokens import IGNORED

CHUNK = {"cpu": 2**19, "cuda": 2**25}  # logits at a time: what a cache holds; what keeps a GPU's multipliers busy
FEWEST = 64  # tokens at a time; with fewer, the products become slow


def _chunks(hidden: Tensor, weight: Tensor, chunk: int | None) -> int:
    """Tokens at a time; of a short batch a sixteenth, so that it too takes little of what all its logits would."""
    return chunk or tokens_at_a_time(len(hidden), weight.shape[0], hidden.device.type)


def tokens_at_a_time(tokens: int, vocabulary: int, device: str) -> int:
    """How many tokens' logits exist at one time."""
    return max(FEWEST, min(CHUNK.get(device, CHUNK["cuda"]) // vocabulary, -(-tokens // 16)))


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies; the gradient for `hidden` is made in forward and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows].to(weight.dtype) @ weight.T).float()
            goal = targets[rows].unsqueeze(1)
            lse = logits.logsumexp(1, keepdim=True)
            total += (lse - logits.gather(1, goal)).sum()
            if grad is not None:
                p = logits.sub_(lse).exp_()
                p.scatter_add_(1, goal, p.new_full((), -1.0).expand(goal.shape))
                grad[rows] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(*([] if grad is None else [grad]))
        return total

    @staticmethod
    def backward(ctx, scale):
        (grad,) = ctx.saved_tensors
        return grad * scale, None, None, None


def linear_cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H), frozen
    targets: Tensor,  # (N,) token ids
    chunk: int | None = None,  # tokens at a time
) -> Tensor:
    """Sum (not mean) over tokens of the cross-entropy of `hidden @ weight.T`, in fp32. Differentiable once, in `hidden`.

    ValueError for a head that is itself trained: this function has no gradient for it.
    """
    if weight.requires_grad:
        raise ValueError("the head is trained itself: use the model's own loss, this one gives the head no gradient")
    return _LinearCrossEntropy.apply(hidden, weight, targets, _chunks(hidden, weight, chunk))


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Cross-entropy of each token (N,) in nats, for evaluation."""
    size = _chunks(hidden, weight, chunk)
    pairs = zip(hidden.split(size), targets.split(size), strict=True)
    parts = [F.cross_entropy((h.to(weight.dtype) @ weight.T).float(), y, reduction="none") for h, y in pairs]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


@contextmanager
def head_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """While active, the head computes nothing: what it would have been given (B, S, H) is put into the list instead.

    A hook on the head, so the model is called as always, through whatever is wrapped around it (PEFT, DDP, autocast).
    """
    caught: list[Tensor] = []

    def take(_head, arguments):
        caught.append(arguments[0])
        return (arguments[0][:, :0], *arguments[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        yield caught
    finally:
        hook.remove()


def next_tokens(labels: Tensor) -> Tensor:
    """Labels (B, S) moved one place to the left: what each place has to predict; the last predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def completion_loss(model: nn.Module, inputs: dict, labels: Tensor, head: nn.Module) -> Tensor:
    """Sum of the cross-entropy over the labelled tokens of a batch; 0, with a gradient, if there are none.

    model: what is to be called, perhaps wrapped; head: the model itself, whose output embeddings are the head.
    """
    hidden, targets = completion_states(model, inputs, labels, head)
    return linear_cross_entropy(hidden, head.get_output_embeddings().weight, targets)


def completion_states(model: nn.Module, inputs: dict, labels: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    """(hidden states (N, H) before the head at the places that have to predict something, their targets (N,))."""
    targets = next_tokens(labels)
    with head_input(head) as caught:
        model(**inputs, use_cache=False)
    places = (targets.flatten() != IGNORED).nonzero().squeeze(1)  # once: a GPU has to wait for their number
    return caught[0].flatten(0, 1)[places], targets.flatten()[places]


def completion_logits(model: nn.Module, inputs: dict, labels: Tensor):
    """For a head that is more than a product: (the model's outputs, logits (N', V) in fp32, targets (N',), some of them ignored).

    Built for the places where some row has to predict something.
    """
    targets = next_tokens(labels)
    places = (targets != IGNORED).any(0).nonzero().squeeze(1)
    outputs = model(**inputs, logits_to_keep=places, use_cache=False)
    return outputs, outputs.logits.float().flatten(0, 1), targets[:, places].flatten()


@torch.no_grad()
def completion_token_losses(model: nn.Module, inputs: dict, labels: Tensor, plain: bool) -> Tensor:
    """Cross-entropy of each labelled token of a batch (N,), in nats. `plain`: whether the model's head is (`plain_head`)."""
    if plain:
        hidden, targets = completion_states(model, inputs, labels, model)
        return token_losses(hidden, model.get_output_embeddings().weight, targets)
    _, logits, targets = completion_logits(model, inputs, labels)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")[targets != IGNORED]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode in which it was, and can be trained on.

    bitsandbytes' linear layers run in train mode. They have no dropout, and on a CPU with AVX512-BF16 a pass in eval mode would
    repack their weights for good, into a form whose product has no gradient.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module, _ in modes:
            if isinstance(module, Linear4bit):
                module.training = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """As `without_dropout`, and no gradients."""
    with without_dropout(model), torch.no_grad():
        yield


def plain_head(model: nn.Module) -> bool:
    """Whether logits are `hidden @ weight.T` and nothing else (no bias, cap or scale), tried out on a few tokens."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return False  # quantised, adapted, or trained itself
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        return False  # small logits, as those of a few tokens may be, do not show it
    ids = torch.arange(8, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
    with evaluation_mode(model):
        logits = model(input_ids=ids, use_cache=False).logits
        with head_input(model) as caught:
            model(input_ids=ids, use_cache=False)
        return torch.allclose((caught[0] @ head.weight.T).float(), logits.float(), rtol=1e-2, atol=1e-3)
