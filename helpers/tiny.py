"""The tiny base model of the offline profile: a real MixtralForCausalLM of about 2 M parameters and its tokenizer.

Both are committed under `data_samples/tiny_base/`; `python -m helpers.tiny` rebuilds them (`--help` shows the knobs).
The base is trained on generated stories **without** length modifiers: what the course's adapters learn is not in it.
What it has read is people who ask each other in plain words to be brief or to tell everything: a real base has, too.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

from helpers.files import sha256, write_json
from helpers.prompts import format_story
from helpers.tiny_stories import make_story
from helpers.tokens import encode

HOME = Path(__file__).resolve().parent.parent / "data_samples" / "tiny_base"
# Seeds of generated stories; the ranges never overlap.
TOKENIZER_SEED, BASE_SEED, ADAPTER_SEED, VALIDATION_SEED, EVALUATION_SEED = (k * 10**6 for k in range(1, 6))
REQUESTS = 0.4  # share of the base's user messages that end in a plain wish


def train_tokenizer(stories: int = 2500, vocab_size: int = 3072):
    """A byte-level BPE with `<pad> <s> </s>`, which begins every text with `<s>` as Mixtral's tokenizer does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator((format_story(make_story(TOKENIZER_SEED + k)) for k in range(stories)), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_config(vocab_size: int, hidden: int = 128, layers: int = 4, intermediate: int = 128, **kwargs):
    """Mixtral's architecture, small: 8 experts, top-2, grouped-query attention, rope base 1e6, tied embeddings."""
    from transformers import MixtralConfig

    return MixtralConfig(
        **{
            "vocab_size": -(-vocab_size // 64) * 64,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": max(1, hidden // 64),
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.05,  # 0.02 is meant for much wider layers
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **kwargs,
        }
    )


def pretrain(tokenizer, steps: int, openings: int = 0, tokens_per_step: int = 2048, seed: int = 0, log=print, **config):
    """A base model trained on generated stories, `tokens_per_step` tokens per step; returns (model, history).

    First `steps` on a stream of stories, cut into pieces that grow from 256 to 1,024 tokens, which is quicker than long ones
    from the start. Then `openings` on short stories, a new one at the beginning of each piece: there, nothing but the persona
    says how much somebody talks, while later in a chat the earlier replies say it as well, and the small model looks at those.

    In both phases, 0.4 of the user messages end in a plain wish ("Keep it brief."), which the reply follows: what any large
    base model brings along is that a text can say how much text is to follow. The balancing loss is transformers' own
    (coefficient 0.01).
    """
    import torch
    from transformers import MixtralForCausalLM

    torch.manual_seed(seed)
    model = MixtralForCausalLM(tiny_config(len(tokenizer), router_aux_loss_coef=0.01, **config))
    pieces = [min(256 if k < 0.5 * steps else 512 if k < 0.85 * steps else 1024, tokens_per_step) for k in range(steps)]
    history = _fit(model, _stream(tokenizer, pieces, tokens_per_step), steps, lr=3e-3, decay=1 / 3, log=log)
    if openings:
        history += open_stories(model, tokenizer, openings, tokens_per_step, steps, log)
    return model.eval(), history


def open_stories(model, tokenizer, openings: int, tokens_per_step: int = 2048, first: int = 0, log=print) -> list[dict]:
    """The second phase of `pretrain`, whose steps are numbered from `first`; returns its history.

    It begins with weights in bf16, as they are shipped: so it can go on from files as well.
    """
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    return _fit(model, _openings(tokenizer, openings, tokens_per_step), openings, lr=1.5e-3, decay=0.6, log=log, first=first)


def _stream(tokenizer, pieces: list[int], tokens_per_step: int):
    """A batch a step: one long row of stories, cut anywhere into pieces of the step's length."""
    ids, number = [], 0
    for piece in pieces:
        while len(ids) < tokens_per_step:
            ids += encode(make_story(BASE_SEED + number, requests=REQUESTS), tokenizer).input_ids
            number += 1
        yield [ids[k : k + piece] for k in range(0, tokens_per_step, piece)]
        ids = ids[tokens_per_step:]


def _openings(tokenizer, steps: int, tokens_per_step: int, piece: int = 512):
    """A batch a step: pieces that begin with a story, all stories short."""
    limits, number, piece = random.Random(1), 600_000, min(piece, tokens_per_step)
    for _ in range(steps):
        batch = []
        for _ in range(tokens_per_step // piece):
            ids: list[int] = []
            while len(ids) < piece:
                story = make_story(BASE_SEED + number, requests=REQUESTS, max_words=limits.randint(20, 150))
                ids += encode(story, tokenizer).input_ids
                number += 1
            batch.append(ids[:piece])
        yield batch


def _fit(model, batches, steps: int, lr: float, decay: float, log, first: int = 0) -> list[dict]:
    """AdamW; the learning rate rises over 50 steps and falls in a straight line over the last `decay` of them."""
    import torch

    model.train().set_experts_implementation("grouped_mm")
    model.config.output_router_logits = True
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    history, started = [], time.monotonic()
    for step, rows in enumerate(batches):
        batch = torch.tensor(rows)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, max(0.02, (steps - step) / (steps * decay)))
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {first + step}: lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            seconds = round(time.monotonic() - started)
            history.append({"step": first + step, "loss": round(loss.item(), 4), "seconds": seconds})
            log(json.dumps(history[-1]), flush=True)
    model.config.output_router_logits = False
    return history


def validation_loss(model, tokenizer, stories: int = 32) -> float:
    """Cross-entropy (nats per token) on stories that no training has seen."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for k in range(stories):
            ids = torch.tensor([encode(make_story(VALIDATION_SEED + k), tokenizer).input_ids])
            total += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def build(folder: Path, steps: int = 9000, openings: int = 2500, seed: int = 0) -> dict:
    """Tokenizer and base model into `folder`, in bf16, with a provenance file; returns what that file says."""
    tokenizer = train_tokenizer()
    model, history = pretrain(tokenizer, steps, openings, seed=seed)
    return ship(folder, model, tokenizer, command(steps, openings, seed), (steps + openings) * 2048, history)


def command(steps: int, openings: int, seed: int) -> str:
    return f"python -m helpers.tiny --steps {steps} --openings {openings} --seed {seed}"


def ship(folder: Path, model, tokenizer, made_by: str, tokens: int, history: list[dict]) -> dict:
    """Write model (bf16), tokenizer and provenance."""
    import torch
    import transformers

    model = model.to(torch.bfloat16)  # what is shipped is what is measured
    loss = validation_loss(model.float(), tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "command": made_by,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "validation_loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "history": history,
        "sha256": checksums(folder),
    }
    write_json(folder / "provenance.json", facts)
    return facts


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights and the tokenizer."""
    return {n: sha256(folder / n) for n in ("model.safetensors", "tokenizer.json")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild the tiny base model of the offline profile.")
    parser.add_argument("--out", type=Path, default=HOME)
    parser.add_argument("--steps", type=int, default=9000, help="on a stream of stories")
    parser.add_argument("--openings", type=int, default=2500, help="on short stories, after those")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    facts = build(options.out, options.steps, options.openings, options.seed)
    print({k: v for k, v in facts.items() if k != "history"})
