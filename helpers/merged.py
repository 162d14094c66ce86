"""A plain checkpoint from 4-bit base and adapter, written shard by shard: never more than one shard in memory.

`qlora.merge` builds the whole model, which for Mixtral-8x7B takes 93 GB. Here each parameter is dequantised, gets its adapter
added in fp32, is rounded once, goes into the current shard under the family's own names (transformers' conversion, run
backwards), and is forgotten.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from helpers.qlora import merge_plan, merged_value

INDEX = "model.safetensors.index.json"


@torch.no_grad()
def save_merged(
    model: PeftModel, folder: str | Path, dtype: torch.dtype | str = torch.bfloat16, max_shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Write the merged model as an ordinary checkpoint; returns its weight files. `model` stays as it is.

    What has no adapter is written as well, down to the buffers that `save_pretrained` would write. The folder appears when it
    is whole. Raises FileExistsError if it is there already, and ValueError for what `qlora.merge` refuses and for a generation
    configuration that contradicts itself; both before any weights are written.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: merge into another folder, or delete it first")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    plain, sources, deltas = merge_plan(model, dtype)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # First, because transformers checks them, and a large model's weights take an hour.
    plain.config.dtype = dtype
    plain.config.architectures = [type(plain).__name__]
    plain.config.save_pretrained(partial)
    model.get_base_model().generation_config.save_pretrained(partial)
    shards: list[dict[str, str]] = []  # tensor name → shard file, for each shard
    waiting: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        if waiting:
            file = f"model-{len(shards) + 1:05d}.safetensors"
            save_file(waiting, partial / file, metadata={"format": "pt"})
            shards.append(dict.fromkeys(waiting, file))
            waiting.clear()
            size = 0

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for name, empty in plain.named_parameters():
            yield name, merged_value(empty, sources[name], deltas.get(name, []))
        for name in [n for n, _ in plain.named_buffers() if n in persistent]:
            yield name, sources[name].clone()  # in its own dtype; a copy, as safetensors refuses shared memory

    persistent = plain.state_dict().keys()
    for name, value in values():
        for key, tensor in revert_weight_conversion(plain, {name: value}).items():
            bytes_ = tensor.numel() * tensor.element_size()
            if waiting and size + bytes_ > max_shard_bytes:
                flush()
            waiting[key] = tensor.contiguous().cpu()
            size, total = size + bytes_, total + bytes_
    flush()
    names = {}
    for number, shard in enumerate(shards, start=1):
        final = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (partial / next(iter(shard.values()))).rename(partial / final)
        names |= dict.fromkeys(shard, final)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8", newline="\n")
    partial.rename(folder)
    return sorted(folder.glob("*.safetensors"))
