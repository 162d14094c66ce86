"""The streamed checkpoint of every family holds what `save_pretrained` of the merged model holds, down to the buffers."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

from helpers import merging, qlora
from helpers.merging import save_merged
from helpers.quantization import random_4bit
from tests.moe_families import knows_routers, tiny
from tests.test_families_4bit import MODELS, REFUSED_MODELS

# One of every kind of persistent buffer, of routers without any, and of a linear router. The others are slow only together.
BUFFERED = ("deepseek_v3", "lfm2_moe", "gemma4_text", "minimax", "minimax_m2", "zaya")
QUICK = (*BUFFERED, "mixtral", "olmoe", "hunyuan_v1_moe")
KINDS = [k for k in MODELS if k not in REFUSED_MODELS]


def adapted(kind: str):
    """A random 4-bit model whose adapters do something; AFMoE's router can have none."""
    model = random_4bit(tiny(kind), "float32", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that PEFT cannot adapt
        model = qlora.add_lora(model, r=4, dropout=0.0, router=kind != "afmoe")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.normal_(std=0.05, generator=generator)
        for name, buffer in model.named_buffers():
            if name in model.state_dict() and buffer.is_floating_point():  # zeros would be found again by themselves
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@knows_routers
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_the_streamed_checkpoint_is_that_of_the_merged_model(kind, tmp_path):
    model = adapted(kind)
    whole = merging.merge(model, "bfloat16")
    whole.save_pretrained(tmp_path / "whole")
    save_merged(model, tmp_path / "streamed", "bfloat16", max_shard_bytes=100_000)
    wanted, found = (
        {k: v for f in (tmp_path / d).glob("*.safetensors") for k, v in load_file(f).items()} for d in ("whole", "streamed")
    )
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    buffers = {name.replace(".base_layer", ""): b for name, b in model.get_base_model().named_buffers()}
    kept = {name for name in whole.state_dict() if name in buffers}
    assert all(torch.equal(whole.get_buffer(name), buffers[name]) for name in kept)
    assert kept or kind not in BUFFERED
