"""The card's recipe, against what really ran; and the run against plain transformers."""

from __future__ import annotations

import json
import math
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from helpers import activation_checkpointing, experts, losses, training
from helpers.data import build_corpus
from helpers.held_out import HeldOutLoss, held_out_stories
from helpers.lengths import LENGTHS, length_class
from helpers.losses import plain_head
from helpers.profiles import PROFILES
from helpers.qlora import DROPOUT_FILE
from helpers.router_losses import attach_router_losses
from helpers.tokens import Collator, encode
from helpers.trainer import CourseTrainer, NumberedCollator
from tests import small_runs
from tests.small_runs import STORIES, small_profile, train

# A product whose gradient is not what was computed; see losses.evaluation_mode.
pytestmark = pytest.mark.filterwarnings("error:.*autograd kernel was not registered")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_runs.make_base(tmp_path_factory.mktemp("base"))


def weights(result):
    return load_file(result.adapter / "adapter_model.safetensors")


@pytest.mark.slow
def test_what_ran_under_the_a100_profile_is_the_cards_recipe(base, tmp_path):
    """Only the base model and the context are small; every number here is the card's, or its siblings' (LoRA)."""
    import dataclasses

    profile = dataclasses.replace(PROFILES["a100-80"], base=str(base), context=400)
    result = train(base, tmp_path, profile, log_every=1)
    rows = json.loads((tmp_path / "result.json").read_text())["corpus"]
    per_epoch = math.ceil(len({n for r in result.history for n in r["rows"]}) / (4 * 2))
    assert rows["stories"] == len(STORIES) and result.step == 3 * per_epoch, "3 epochs of 4 x 2 rows"
    assert all(len(r["rows"]) == 8 for r in result.history[: per_epoch - 1])

    total = result.step
    for row in result.history:  # the rate with which the step was made: warm-up over 10 steps, then half a cosine
        s = row["step"] - 1
        wanted = 1e-4 * (s / 10 if s < 10 else 0.5 * (1 + math.cos(math.pi * (s - 10) / (total - 10))))
        assert math.isclose(row["learning_rate"], wanted, rel_tol=1e-6, abs_tol=1e-12), row["step"]

    checkpoint = tmp_path / f"checkpoint-{total}"
    for group in torch.load(checkpoint / "optimizer.pt")["param_groups"]:
        assert (group["betas"], group["eps"], group["initial_lr"]) == ((0.9, 0.999), 1e-8, 1e-4)
        assert group["weight_decay"] == 0, "so AdamW is Adam"
    quantised = result.facts["quantization"]
    assert (quantised["bnb_4bit_quant_type"], quantised["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert (quantised["bnb_4bit_compute_dtype"], quantised["llm_int8_threshold"]) == ("bfloat16", 6.0)
    assert quantised["llm_int8_skip_modules"] is None
    assert next(r for r in result.facts["audit"] if r["part"] == "experts")["4-bit"] == 1.0

    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 16)
    assert json.loads((result.adapter / DROPOUT_FILE).read_text())["lora_dropout"] == 0.05
    names = " ".join(weights(result))
    assert all(part in names for part in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.experts", "mlp.gate"))
    run = json.loads((tmp_path / "run.json").read_text())["profile"]
    assert run["seed"] == 42 and run["z_coef"] == run["balance_coef"] == 1e-3


@pytest.mark.parametrize("name", [n for n in PROFILES if n != "tiny"])
def test_the_arguments_of_every_large_profile_are_the_cards(name, tmp_path):
    args = training.arguments(PROFILES[name], tmp_path)
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (1e-4, "cosine", 10)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
    assert (args.num_train_epochs, args.seed, args.data_seed) == (3, 42, 42)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert rows * PROFILES[name].context == 4 * 2 * 10240, "the card's tokens per step"


class CatchGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def test_every_adapter_of_every_expert_gets_a_gradient(base, tmp_path):
    """At step 1 only lora_B has one, because B = 0; from step 2 on all."""
    caught = CatchGradients()
    profile = small_profile(base, warmup_steps=0, max_steps=2, micro_batch=4, lora_router=True, lora_dropout=0.0)
    train(base, tmp_path, profile, callbacks=[caught])
    first, second = caught.steps
    assert len(first) == len(second) == 2 * (4 + 2 + 1), "A and B on q, k, v, o, both stacks and the router"
    for name, gradient in first.items():
        assert gradient.abs().max() > 0 or "lora_A" in name, name
    for name, gradient in second.items():
        assert gradient.abs().max() > 0, name
        if ".experts." in name:  # (E·r, in), or (out, r·E) with the expert as the fast axis
            by_expert = (
                gradient.view(8, 4, -1).flatten(1) if "lora_A" in name else gradient.view(-1, 4, 8).permute(2, 0, 1).flatten(1)
            )
            assert (by_expert.abs().amax(1) > 0).all(), name


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    """Dropout is drawn again, and router losses are counted once."""
    runs = [train(base, tmp_path / str(on), small_profile(base, gradient_checkpointing=on)) for on in (False, True)]
    for a, b in zip(*(r.history for r in runs), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["router/z"] - b["router/z"]) < 1e-5 and a["load"] == b["load"]
    for name, tensor in weights(runs[0]).items():
        assert (tensor - weights(runs[1])[name]).norm() <= 1e-4 * tensor.norm(), name


def test_bf16_is_close_to_fp32(base, tmp_path):
    runs = [train(base, tmp_path / dtype, small_profile(base, dtype=dtype)) for dtype in ("float32", "bfloat16")]
    for a, b in zip(*(r.history for r in runs), strict=True):
        assert abs(a["loss"] / b["loss"] - 1) < 5e-3 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 0.1


def test_one_layer_learns_one_story_by_heart(tmp_path):
    """Random weights, all frozen and in 4 bit; wide enough, or the frozen head could not be sure of anything."""
    base = small_runs.make_base(tmp_path / "base", initializer_range=0.3, tie_word_embeddings=False)
    changes = {"lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "z_coef": 0.0, "balance_coef": 0.0}
    profile = small_profile(base, max_steps=75, save_steps=1000, **changes)
    result = training.train(profile, STORIES[:1], tmp_path / "run", progress=None, log_every=25, held_out=[])
    assert result.history[0]["loss"] > 9 and result.history[-1]["loss"] < 0.02


class PlainCollator(Collator):
    def __call__(self, rows):
        return {k: v for k, v in super().__call__(rows).items() if k != "valid"}


def unquantised(folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache=False)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def test_the_loss_curve_is_that_of_plain_transformers(base, tokenizer, tmp_path):
    """No quantisation, no router losses: then `Trainer` with the model's own loss must make the same steps."""
    corpus = build_corpus(STORIES, tokenizer, 512)
    args = training.arguments(small_profile(base, micro_batch=2, accumulation=2, max_steps=8), tmp_path, log_every=1)
    args.save_strategy = "no"
    plain = Trainer(model=unquantised(base), args=args, train_dataset=corpus.rows, data_collator=PlainCollator(0))
    model = unquantised(base)
    handle = attach_router_losses(model, 0.0, 0.0)
    ours = CourseTrainer(
        model=model, args=args, train_dataset=corpus.rows, data_collator=NumberedCollator(0), router_losses=handle
    )
    assert ours.fused
    curves = []
    for trainer in (plain, ours):
        trainer.train()
        curves.append([(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "loss" in r])
    assert len(curves[0]) == 8
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=2e-5, atol=0)
    for (name, p), q in zip(plain.model.named_parameters(), ours.model.parameters(), strict=True):
        assert (p - q).norm() <= 1e-4 * p.norm(), name


def test_packed_rows_give_the_same_loss_with_either_attention(base, tokenizer):
    batch = NumberedCollator(0)(build_corpus(STORIES, tokenizer, 512).numbered()[:2])
    assert (batch["position_ids"] == 0).sum() > 3, "several stories a row"
    inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
    found = []
    for name in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=name).requires_grad_(False)
        assert model.config._attn_implementation == name
        found.append(losses.completion_loss(model, inputs, batch["labels"], model).item())
    assert abs(found[0] / found[1] - 1) < 1e-5


def test_a_head_that_is_more_than_a_product_is_left_to_the_model_and_the_run_says_so(base, tmp_path, capsys):
    profile = small_profile(base, max_steps=3)
    fused = train(base, tmp_path / "fused", profile)
    assert "logits are built" not in capsys.readouterr().out
    with patch.object(losses, "plain_head", return_value=False):
        plain = train(base, tmp_path / "plain", profile)
    assert "logits are built wherever a token is trained" in capsys.readouterr().out
    for a, b in zip(fused.history, plain.history, strict=True):
        assert abs(a["loss"] / b["loss"] - 1) < 1e-5 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-3


def test_a_machine_with_two_gpus_trains_on_one_of_them(base, tmp_path):
    """Else a step would have twice the rows, and each router a copy without hooks."""
    args = training.arguments(small_profile(base, micro_batch=3), tmp_path)
    args.device  # noqa: B018  counts the GPUs
    args._n_gpu = 2  # what it finds on such a machine
    assert args.n_gpu == 1 and args.train_batch_size == 3 and args.parallel_mode.value == "not_parallel"


class Waits(TorchDispatchMode):
    """Counts what would make a GPU's queue wait: numbers fetched by Python, and sizes that depend on data."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [a for a in (args[1] if func is torch.ops.aten.index.Tensor else ()) if a is not None and a.dtype == torch.bool]
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default) or masks:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [2, 5])
def test_a_batch_waits_for_the_gpu_a_known_number_of_times(layers, checkpointing, tokenizer, tmp_path, monkeypatch):
    """Of the 4-bit model that is trained: three times for the whole, and once for each pass over a layer.

    For transformers' question whether the row is packed, for where its documents begin, for the number of trained tokens; and in
    each layer for where each expert's rows end (`ends_of`), once more where activations are computed again.
    """
    base = small_runs.make_base(tmp_path / "base", num_hidden_layers=layers)
    profile = small_profile(base, gradient_checkpointing=checkpointing, lora_dropout=0.0)  # dropout's seeds are the host's own
    model = training.prepare_model(profile).train()
    if checkpointing:
        activation_checkpointing.enable(model)
    args = training.arguments(profile, tmp_path)
    handle = attach_router_losses(model, 1e-3, 1e-3)
    trainer = CourseTrainer(model=model, args=args, train_dataset=[], router_losses=handle)
    batch = NumberedCollator(0)(build_corpus(STORIES, tokenizer, 512).numbered()[:2])
    fetched, ends_of = [], experts.ends_of
    # On a CPU its `tolist` passes no dispatcher; on a GPU it waits.
    monkeypatch.setattr(experts, "ends_of", lambda *of: (fetched.append(1), ends_of(*of))[1])
    trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(50)).backward()  # what is done once only
    fetched.clear()
    with Waits() as waits:
        trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(50)).backward()
    assert waits.count == 3
    assert len(fetched) == layers * (2 if checkpointing else 1)


# -------------------------------------------------------------------------------------------------------- held out


def test_the_held_out_loss_is_the_models_own_by_reply(base, tokenizer):
    """Reply k alone: the stories' loss up to reply k, minus that up to reply k − 1."""
    labelled = held_out_stories(PROFILES["tiny"], 3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    found = HeldOutLoss(labelled, tokenizer, 2048, pad=0, batch_size=2)(model)
    assert [m.training for m in model.modules()] == before and torch.equal(torch.get_rng_state(), state)
    assert plain_head(model.requires_grad_(False)) and [m.training for m in model.modules()] == before

    sums, counts = Counter(), Counter()
    for story, lengths in labelled:
        total, tokens = 0.0, 0
        for k, reply in enumerate(story.replies):
            until = type(story)(story.names, story.personas, story.scenario, story.messages[: 2 * k + 2])
            sample = encode(until, tokenizer, lengths[: k + 1])
            ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
            with torch.no_grad():
                loss = model(ids, labels=labels).loss.item() * sample.trained
            name = length_class(reply.text)
            sums[name] += loss - total
            counts[name] += sample.trained - tokens
            total, tokens = loss, sample.trained
    assert set(found) == {"all", *counts} and len(counts) > 3
    for name in counts:
        assert abs(found[name] - sums[name] / counts[name]) < 2e-3, name
    assert abs(found["all"] - sum(sums.values()) / sum(counts.values())) < 1e-4
    assert list(found)[1:] == [n for n in LENGTHS if n in counts]


@pytest.mark.slow
def test_held_out_stories_are_not_trained_on():
    for name in ("tiny", "a100-80"):
        from helpers.data import labelled_stories

        held, trained = ([story for story, _ in some(PROFILES[name])] for some in (held_out_stories, labelled_stories))
        for part in (lambda s: s.messages, lambda s: (s.scenario, s.personas), lambda s: s.messages[0].text + s.scenario):
            assert held and not set(map(part, held)) & set(map(part, trained))


def test_the_log_has_the_held_out_loss_at_the_first_the_saved_and_the_last_step(base, tmp_path):
    result = train(base, tmp_path, small_profile(base, max_steps=11), held_out=held_out_stories(PROFILES["tiny"], 2))
    assert [r["step"] for r in result.history] == [1, 3, 6, 9, 11]
    assert [r["step"] for r in result.history if "held_out" in r] == [1, 6, 9, 11], "every 4 steps, at the row that follows"


def test_gradients_are_clipped_and_checkpointing_is_not_reentrant(tmp_path):
    from helpers import training

    args = training.arguments(PROFILES["a100-80"], tmp_path)
    assert (
        args.max_grad_norm == 1.0
        and args.gradient_checkpointing
        and args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    )
