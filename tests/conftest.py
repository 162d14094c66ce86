"""Shared small models. Everything here is random or shipped: no test needs a network, and none a GPU.

On a machine with a GPU the tests do not use it, because what they hold to the bit is a CPU's. `COURSE_TEST_GPU=1 pytest
tests/test_gpu.py tests/test_attention.py` does.
"""

from __future__ import annotations

import os

import pytest
import torch

from helpers import environment

if not os.environ.get("COURSE_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used; processes that a test starts have it, too
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, if Triton is there; read when they are defined

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
