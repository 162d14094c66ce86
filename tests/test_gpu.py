"""The same numbers on a GPU as on the CPU: `COURSE_TEST_GPU=1 pytest tests/test_gpu.py`.

What compares a precision with another one, or a run with what must come of it, runs on the CPU, too.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from helpers import activation_checkpointing, budget, fused, nf4, qlora, training
from helpers.audit import audit
from helpers.generation import Prompt, Sampling, generate_replies
from helpers.profiles import PROFILES
from helpers.quantization import load_4bit, random_4bit
from helpers.rehearsal import rehearse
from helpers.tiny import tiny_config
from helpers.tiny_stories import labelled_story
from tests import small_runs

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU, or COURSE_TEST_GPU is not set")
HERE = "cuda" if GPU else "cpu"


@needs_gpu
def test_the_codes_of_a_stack_are_the_same():
    weight = torch.randn(4, 128, 256, generator=torch.Generator().manual_seed(0))
    here, there = nf4.quantize_stack(weight), nf4.quantize_stack(weight.to("cuda"))
    assert (here.data == there.data.cpu()).float().mean() > 0.999, "but for ties"
    gap = (nf4.dequantize_stack(here) - nf4.dequantize_stack(there).cpu()).abs().flatten()
    assert gap.quantile(0.99) < 0.05, "what is left are scales that were rounded the other way"


def count_gates(monkeypatch) -> list:
    """Grows with every call of a fused kernel: an option that is on and used by nothing would be seen."""
    used, gate = [], fused.gate
    monkeypatch.setattr(fused, "gate", lambda *args: (used.append(1), gate(*args))[1])
    return used


def layer_and_inputs(device: str, dtype: torch.dtype, tokens: int):
    """An expert layer with LoRA on both stacks, and what it is given; the same numbers on every device."""
    config = tiny_config(256, hidden=128, layers=1, intermediate=192)
    model = random_4bit(config, dtype, seed=0)  # drawn on the CPU
    model = qlora.add_lora(model, r=8, alpha=16, dropout=0.0, attention=False, router=False).to(device).train()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.05)
    layer: nn.Module = model.get_base_model().model.layers[0].mlp.experts
    x = (torch.randn(tokens, 128, generator=g)).to(device, dtype).requires_grad_()
    index = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(tokens)]).to(device)
    weight = torch.rand(tokens, 2, generator=g).to(device, dtype).requires_grad_()
    return layer, x, index, weight, [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "dtype, tolerance, tokens, kernels",
    [
        *((torch.bfloat16, 3e-2, tokens, False) for tokens in (300, 30)),
        *((torch.float16, 5e-3, tokens, False) for tokens in (300, 30)),
        *(pytest.param(torch.float32, 2e-3, tokens, False, marks=needs_gpu) for tokens in (300, 30)),
        pytest.param(torch.bfloat16, 3e-2, 300, True, marks=needs_gpu),
        pytest.param(torch.float16, 5e-3, 300, True, marks=needs_gpu),
    ],
)
def test_forward_and_gradients_of_the_experts_are_those_of_the_cpu_in_fp32(dtype, tolerance, tokens, kernels, monkeypatch):
    """fp32 with room for TF32. So few tokens that bitsandbytes' fused product is used, and so many that it is not.

    `kernels`: those of `helpers.fused`, which `tests/test_fused.py` tests one by one, there too.
    """
    found, decoding, times = [], [], nf4.Unpacker.times
    monkeypatch.setattr(nf4.Unpacker, "times", lambda self, x, e: (decoding.append(e), times(self, x, e))[1])
    used = count_gates(monkeypatch)
    for where, kind in (("cpu", torch.float32), (HERE, dtype)):
        layer, x, index, weight, adapters = layer_and_inputs(where, kind, tokens)
        if kernels and where == "cuda":
            assert fused.fuse(layer, compiled=False) == 1
        out = layer(x, index, weight)
        out.float().square().sum().backward()
        found.append([t.detach().float().cpu() for t in (out, x.grad, weight.grad, *(p.grad for p in adapters))])
    assert bool(decoding) == (GPU and tokens == 30) and bool(used) == kernels
    for wanted, got in zip(*found, strict=True):
        assert (got - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_gpu)])
def test_a_run_takes_the_gpu_by_itself_and_learns(kernels, tmp_path, monkeypatch):
    """Whole steps: data, 4-bit model, adapters, router losses, Adam; with fused kernels and compiled attention, too."""
    base = small_runs.make_base(tmp_path / "base")
    profile = small_runs.small_profile(base, lora_dropout=0.0, **({"dtype": "bfloat16"} if kernels else {}))
    used = count_gates(monkeypatch)
    result = small_runs.train(base, tmp_path / "run", profile, log_every=1, fused_kernels=kernels)
    assert bool(used) == kernels
    where = {p.device.type for p in training.prepare_model(small_runs.small_profile(base)).parameters()}
    assert where == {HERE}
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < losses[0] and all(row["router/z"] > 0 for row in result.history)
    # 7.7 is ln(2,304), what a model that knows nothing begins with
    assert abs(losses[0] - 7.7) < 0.3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_half_precision_ends_where_fp32_does(dtype, tmp_path):
    """On a GPU, with autocast and, for fp16, its gradient scaler; on the CPU the model's own dtype."""
    base = small_runs.make_base(tmp_path / "base")
    ends = []
    for kind in ("float32", dtype):
        profile = small_runs.small_profile(base, lora_dropout=0.0, dtype=kind, gradient_checkpointing=True)
        ends.append(small_runs.train(base, tmp_path / kind, profile).history[-1]["loss"])
    assert abs(ends[1] / ends[0] - 1) < 2e-2


@needs_gpu
def test_greedy_replies_begin_as_on_the_cpu(tokenizer):
    story, _ = labelled_story(7)
    prompts = [Prompt.of(story.before_reply(0), tokenizer, length) for length in ("tiny", "medium")]
    texts = []
    for where in ("cpu", "cuda"):
        model = load_4bit(PROFILES["tiny"].base_path, dtype="float32", device_map="cpu").to(where)
        texts.append([r.text for r in generate_replies(model, tokenizer, prompts, Sampling(temperature=0, max_new_tokens=8))])
    assert texts[0] == texts[1] and all(texts[0])


@needs_gpu
def test_a_rehearsal_counts_what_the_gpu_allocates():
    config = tiny_config(4096, 1024, 4, 2048)
    profile = dataclasses.replace(PROFILES["a100-80"], lora_r=16)
    model = qlora.add_lora(random_4bit(config, "bfloat16", device="cuda"), r=16, alpha=16, dropout=0.05).train()
    activation_checkpointing.enable(model)
    model.enable_input_require_grads()
    ids = torch.randint(3, 4096, (2, 2048), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = torch.cuda.max_memory_allocated() + moments
    counted = rehearse(profile, 2, 2048, config)
    assert 0.85 < counted.peak / found < 1.15
    assert counted.weights == sum(part.bytes for part in audit(model).parts.values())
    guess = budget.estimate(budget.describe(config, "bfloat16", r=16), 2, 2048)
    assert 0.85 < guess.peak / found < 1.15
