"""The smallest run that has all parts of a real one: a random one-layer Mixtral, 4-bit experts, packed stories, router losses."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from unittest.mock import patch

from helpers import tokens
from helpers.profiles import PROFILES, Profile
from helpers.tiny_stories import labelled_story

STORIES = [labelled_story(k, max_words=40, max_turns=2) for k in range(60)]


def make_base(folder: Path, **config) -> Path:
    import torch
    from transformers import AutoTokenizer, MixtralForCausalLM

    from helpers.tiny import HOME, tiny_config

    gc.freeze()  # each run collects garbage, and need not look at all that has been imported
    tokenizer = AutoTokenizer.from_pretrained(HOME)
    torch.manual_seed(0)
    MixtralForCausalLM(tiny_config(len(tokenizer), hidden=64, layers=1, intermediate=64, **config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_profile(base: Path, **changes) -> Profile:
    fields = {
        "base": str(base),
        "context": 512,
        "micro_batch": 1,
        "max_steps": 12,
        "save_steps": 4,
        "warmup_steps": 2,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
    }
    return dataclasses.replace(PROFILES["tiny"], **{**fields, **changes})


def train(base: Path, folder: Path, profile: Profile | None = None, **kwargs):
    from helpers import training

    settings = {"progress": None, "log_every": 3, "held_out": [], **kwargs}
    with patch.object(tokens, "PACKING_EFFORT", 0):  # a second of looking for a better packing, in every run
        return training.train(profile or small_profile(base), STORIES, folder, **settings)
