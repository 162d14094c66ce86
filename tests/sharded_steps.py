"""A worker of tests/test_several_processes.py: optimizer steps of a small run, sharded with FSDP2 if there are several processes.

    torchrun --nproc_per_node 2 tests/sharded_steps.py BASE OUT   (with the repository on PYTHONPATH)

accelerate shards on GPUs only, so this calls what it calls there, `torch.distributed.fsdp.fully_shard`, and leaves out what it
leaves out: packed weights, which stay whole in every process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from bitsandbytes.nn import Params4bit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from helpers import losses, training
from helpers.data import build_corpus
from helpers.router_losses import attach_router_losses
from helpers.trainer import NumberedCollator
from tests.small_runs import STORIES, small_profile


def main(base: str, out: Path) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rows = build_corpus(STORIES[:24], AutoTokenizer.from_pretrained(base), 512).rows[:4]
    model = training.prepare_model(small_profile(Path(base), lora_router=True, lora_dropout=0.0)).train()
    handle = attach_router_losses(model, 1e-3, 1e-3)
    packed = {p for p in model.parameters() if isinstance(p, Params4bit)}
    if world > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh, ignored_params=packed)
        fully_shard(model, mesh=mesh, ignored_params=packed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trainable, lr=4e-3)
    collate, found = NumberedCollator(0), []
    for _step in range(3):
        total = 0.0
        batches = [collate([row]) for row in rows]
        tokens = sum(int((b["labels"] != -100).sum()) for b in batches)
        handle.window_tokens = sum(int(b["valid"].sum()) for b in batches)
        handle.loss_scale = world
        for batch in batches[rank::world]:
            handle.valid = batch["valid"]
            inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
            targets = losses.next_tokens(batch["labels"])
            places = (targets != -100).any(0).nonzero().squeeze(1)
            logits = model(**inputs, logits_to_keep=places, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, places].flatten(), reduction="sum") / tokens
            (loss * world).backward()
            total += loss.item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainable])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        adam.step()
        adam.zero_grad()
        if world > 1:
            summed = torch.tensor(total)
            dist.all_reduce(summed)
            total = summed.item()
        found.append((total, norm.item()))
    sharded = sum(isinstance(p, DTensor) for p in trainable)
    if rank == 0:
        out.write_text(json.dumps({"steps": found, "sharded": sharded, "trainable": len(trainable), "packed": len(packed)}))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
