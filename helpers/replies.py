"""Replies on disk: an interrupted evaluation continues, and no reply is made twice.

One file holds the replies of one model under one sampling, a line each, keyed by the random stream from which the row was
drawn (prompt, sample number, seed). The file's name carries a fingerprint of model and sampling, so replies of different
adapters or settings can never be mixed, and changed settings leave the old file alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from helpers.generation import SAMPLERS, Progress, Prompt, Reply, Sampling, iterate_replies, numbered, stream_seed


def recorded_replies(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    folder: str | Path | None = None,
) -> list[Reply]:
    """`generate_replies`, but those that `folder` holds already are read; new ones are written as their batch finishes.

    torch.OutOfMemoryError says which batch size to try, and that what is written is kept.
    """
    sampling = sampling or SAMPLERS["course"]
    prompts = numbered(prompts)
    keys = [f"{stream_seed(p, sampling.seed):014x}" for p in prompts]
    if folder is None:
        with _advice(batch_size):
            return [r for _, r in sorted(iterate_replies(model, tokenizer, prompts, sampling, batch_size, progress))]
    file = Path(folder) / f"replies-{fingerprint(model, sampling)}.jsonl"
    known = _read(file)
    missing = [i for i, key in enumerate(keys) if key not in known]
    if missing:
        file.parent.mkdir(parents=True, exist_ok=True)
        wanted = [prompts[i] for i in missing]
        with file.open("a", encoding="utf-8", newline="\n") as out, _advice(batch_size, file):
            for k, reply in iterate_replies(model, tokenizer, wanted, sampling, batch_size, progress):
                known[keys[missing[k]]] = reply
                out.write(json.dumps({"key": keys[missing[k]], **dataclasses.asdict(reply)}, ensure_ascii=False) + "\n")
                out.flush()
    return [known[key] for key in keys]


@contextlib.contextmanager
def _advice(batch_size: int, file: Path | None = None) -> Iterator[None]:
    """torch's message of a lack of memory names bytes; what helps is a smaller batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = (str(error).splitlines() or ["out of memory"])[0]
        if batch_size > 1:
            todo = (
                f"{batch_size} rows at once are too many: try half, batch_size={batch_size // 2} (--batch-size {batch_size // 2})"
            )
        else:
            todo = "even one row is too much: a smaller max_new_tokens or shorter conversations need less"
        kept = f"; the replies of finished batches are kept in {file}, and are not made again" if file else ""
        raise torch.OutOfMemoryError(f"{first.rstrip('.')}. {todo}{kept}") from None


def _read(file: Path) -> dict[str, Reply]:
    """What a file holds. A last line that was cut off in writing is taken out, so that the next one begins on its own line."""
    if not file.exists():
        return {}
    whole, _, torn = file.read_bytes().rpartition(b"\n")  # bytes: the cut may lie inside a letter
    if torn:
        partial = file.with_name(file.name + ".partial")
        partial.write_bytes(whole + b"\n" if whole else b"")
        os.replace(partial, file)
    found = {}
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
        try:
            row = json.loads(line)
            key = row.pop("key")
            found[key] = Reply(**row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: not a reply ({error}); delete this line, or the file to start over") from None
    return found


def fingerprint(model, sampling: Sampling) -> str:
    """Twelve hex digits that stand for the model (with its active adapters, if they are switched on) and the sampling."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    off = any(m.disable_adapters for m in layers)
    active = {a for m in layers for a in m.active_adapters} if not off else set()
    settings = {k: v for k, v in dataclasses.asdict(sampling).items() if k != "seed"}  # the seed is in the keys
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(repr([(a, getattr(m, "scaling", {}).get(a)) for m in layers for a in sorted(active)]).encode())
    for name, p in sorted(model.named_parameters(), key=lambda n: n[0]):
        adapter = ".lora_" in name
        if adapter and not any(f".{a}." in name for a in active):
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        packed = getattr(p, "quant_state", None)
        for tensor in (p,) if packed is None else (p, packed.absmax):
            flat = tensor.detach().reshape(-1)
            flat = flat if adapter else flat[:: max(1, len(flat) // 256)]  # of a base model, 256 numbers a tensor will do
            digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
