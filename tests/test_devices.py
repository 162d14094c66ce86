"""What a machine with a GPU would notice: everything that is given to a model must be where the model is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers import activation_checkpointing, behaviour, controls, losses, merging, qlora, training
from helpers.attention import DOCUMENTS
from helpers.data import build_corpus, labelled_stories
from helpers.evaluation import FIRST, held_out
from helpers.generation import Prompt, Sampling, generate_replies, stream_reply
from helpers.held_out import HeldOutLoss, held_out_stories
from helpers.merging import save_merged
from helpers.profiles import PROFILES
from helpers.quantization import load_4bit
from helpers.router_losses import attach_router_losses, routing
from helpers.step_profile import profile_step
from helpers.tokens import Collator
from helpers.trainer import CourseTrainer, NumberedCollator
from tests.imitated_gpu import ImitatedGpu

TINY = dataclasses.replace(PROFILES["tiny"], stories="generated:60", lora_router=True, lora_dropout=0.05)


@pytest.fixture
def gpu():
    with ImitatedGpu() as imitated:
        yield imitated


def test_the_imitation_refuses_what_cuda_refuses(gpu):
    here, there = torch.ones(3, 3), torch.ones(3, 3).to("cuda")
    assert (here.device.type, there.device.type, (there @ there).device.type) == ("cpu", "cuda", "cuda")
    assert torch.zeros(2, device=there.device).is_cuda and torch.zeros_like(there).is_cuda and not there.cpu().is_cuda
    for mixed in (lambda: here @ there, lambda: torch.cat([here, there]), lambda: here[torch.zeros(1, device="cuda").long()]):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert there[torch.tensor([0])].is_cuda and (there + torch.tensor(1.0)).is_cuda and float(there.sum()) == 9
    layer = torch.nn.Linear(3, 3).to("cuda")
    layer(there).sum().backward()
    assert layer.weight.is_cuda and layer.weight.grad.is_cuda
    with pytest.raises(RuntimeError, match="same device"):
        layer(here)


@pytest.fixture
def model(gpu):
    found = training.prepare_model(TINY).to("cuda")
    assert found.device.type == "cuda" and all(p.is_cuda for p in found.parameters())
    return found


@pytest.fixture(scope="module")
def rows(tokenizer):
    return build_corpus(labelled_stories(TINY), tokenizer, TINY.context).numbered()[:2]


def trainer_of(model, handle, tmp_path):
    args = training.arguments(TINY, tmp_path)
    trainer = CourseTrainer(model=model, args=args, train_dataset=[], router_losses=handle)
    model.to("cuda")  # it has put the model where it believes to be
    return trainer


def on_gpu(batch):
    return {k: v.to("cuda") for k, v in batch.items()}


@pytest.mark.parametrize("attention", ["sdpa", DOCUMENTS])
def test_a_training_step(gpu, model, rows, tmp_path, attention):
    model.get_base_model().set_attn_implementation(attention)
    # its check of determinism looks without the imitation
    activation_checkpointing.enable(model, context_fn=gpu.again, determinism_check="none")
    handle = attach_router_losses(model.train(), 1e-3, 1e-3)
    batch = on_gpu(NumberedCollator(0)(rows))
    loss = trainer_of(model, handle, tmp_path).compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(500))
    loss.backward()
    assert loss.is_cuda and all(p.grad.is_cuda for p in model.parameters() if p.requires_grad)
    handle.verify()
    assert handle.metrics["router/z"] > 0
    with pytest.raises(RuntimeError, match="same device"):
        losses.completion_loss(model, {"input_ids": batch["input_ids"].cpu()}, batch["labels"], model)


def test_what_is_measured_on_a_model(model, rows, tokenizer):
    batch = Collator(0)(rows)
    assert profile_step(model, batch, repeats=1)["loss"] > 0
    labelled = held_out_stories(TINY, 4)
    assert HeldOutLoss(labelled, tokenizer, TINY.context, 0, 2)(model)["all"] > 0
    stories = held_out(TINY, 2, FIRST)
    assert behaviour.reply_perplexity(model, tokenizer, stories)
    chosen = routing(model, on_gpu({"input_ids": batch["input_ids"][:, :32]}))
    assert chosen.shape[0] == 4 and not chosen.is_cuda


def test_replies(model, tokenizer):
    story = held_out(TINY, 1, FIRST)[0].before_reply(FIRST)
    prompts = [Prompt.of(story, tokenizer, length) for length in ("micro", "tiny", None)]
    greedy, sampled = Sampling(temperature=0, max_new_tokens=6), Sampling(max_new_tokens=6)
    for sampling in (greedy, sampled):
        assert all(r.tokens for r in generate_replies(model, tokenizer, prompts, sampling, batch_size=2))
    assert "".join(stream_reply(model, tokenizer, prompts[0], greedy))
    with controls.random_adapter(model):
        assert generate_replies(model, tokenizer, prompts[:1], greedy)


def test_adapters_are_saved_loaded_and_merged(model, gpu, tmp_path):
    qlora.save_lora(model, tmp_path / "adapter")
    again = qlora.load_lora(load_4bit(TINY.base_path, dtype="float32").to("cuda"), tmp_path / "adapter")
    ids = torch.arange(3, 20, device="cuda").unsqueeze(0)
    with torch.no_grad():
        wanted, found = (m.eval()(ids, use_cache=False).logits for m in (model, again))
    torch.testing.assert_close(found, wanted)
    save_merged(again, tmp_path / "merged")
    assert list((tmp_path / "merged").glob("*.safetensors"))
    merged, _report = merging.merge_4bit(again)
    assert merged(ids).logits.is_cuda
