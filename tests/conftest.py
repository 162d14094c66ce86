"""Shared small models. Everything here is random or shipped: no test needs a network."""

from __future__ import annotations

import pytest
import torch

from helpers import environment

torch.set_num_threads(1)
environment.quiet()


@pytest.fixture(scope="session")
def random_mixtral(tmp_path_factory):
    """Folder of a random two-layer Mixtral in fp32 (hidden 64, 8 experts top-2)."""
    from transformers import MixtralForCausalLM

    from helpers.tiny import tiny_config

    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    MixtralForCausalLM(tiny_config(256, hidden=64, layers=2, intermediate=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from helpers.tiny import HOME

    return AutoTokenizer.from_pretrained(HOME)
