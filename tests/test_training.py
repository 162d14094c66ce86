"""The training run: loss, accumulation, resume, refusals."""

from __future__ import annotations

import dataclasses
import math
import re
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from helpers import profiles, training
from helpers.data import build_corpus, labelled_stories
from helpers.profiles import PROFILES
from helpers.router_losses import attach_router_losses
from helpers.schema import Message, Story
from helpers.tiny_stories import labelled_story
from helpers.tokens import IGNORED, Collator

TINY = dataclasses.replace(
    PROFILES["tiny"],
    stories="generated:40",
    context=512,
    micro_batch=2,
    max_steps=6,
    save_steps=3,
    lora_r=4,
    lora_alpha=8,
    learning_rate=2e-3,
)
DATA = [labelled_story(k, balanced=0.6, max_words=150) for k in range(30)]


def run(folder, profile=TINY, **kwargs):
    return training.train(profile, DATA, folder, progress=None, log_every=1, **kwargs)


def adapter_of(result):
    from safetensors.torch import load_file

    return load_file(result.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of six steps."""
    return run(tmp_path_factory.mktemp("whole"))


def test_a_run_logs_every_step_and_its_router_losses(whole):
    assert whole.finished and [r["step"] for r in whole.history] == [1, 2, 3, 4, 5, 6]
    for row in whole.history:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
        assert row["router/z"] > 0 and row["router/balance"] >= 0.99
        assert len(row["load"]) == 4 and abs(sum(row["load"][0]) - 1) < 1e-2
    assert training.read_log(whole.run_dir) == whole.history


def test_a_finished_run_is_not_trained_again(whole):
    before = (whole.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    assert run(whole.run_dir).facts == whole.facts
    assert (whole.adapter / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_changed_settings_and_data_are_refused_with_the_difference(whole):
    with pytest.raises(ValueError, match=r"learning_rate: 0\.002 then, 0\.5 now"):
        run(whole.run_dir, dataclasses.replace(TINY, learning_rate=0.5))
    with pytest.raises(ValueError, match="the stories"):
        training.train(TINY, DATA[:20], whole.run_dir, progress=None)
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(whole.run_dir, resume=False)


def prepared(micro_batch=1, z_coef=0.1):
    profile = dataclasses.replace(TINY, micro_batch=micro_batch, accumulation=4 // micro_batch, z_coef=z_coef)
    model = training.prepare_model(profile)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n):
            p.normal_(std=0.02)
    return profile, model


def gradients(tokenizer, tmp_path, micro_batch):
    """Gradients of one optimizer step over four rows, as the trainer sees them."""
    profile, model = prepared(micro_batch)
    corpus = build_corpus(DATA[:8], tokenizer, profile.context)
    rows = corpus.rows[:4]
    handle = attach_router_losses(model, profile.z_coef, 0.0)
    caught = {}

    class Catch(training.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            caught.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    args = training.arguments(dataclasses.replace(profile, max_steps=1), tmp_path / str(micro_batch))
    args.max_grad_norm = 0.0
    trainer = training.CourseTrainer(
        model=model, args=args, train_dataset=rows, data_collator=Collator(0), callbacks=[Catch()], router_losses=handle
    )
    trainer.train()
    return caught, rows


def test_accumulation_gives_the_gradient_of_one_big_batch(tokenizer, tmp_path):
    one, _ = gradients(tokenizer, tmp_path, 4)
    for micro_batch in (1, 2):
        many, _ = gradients(tokenizer, tmp_path, micro_batch)
        assert set(many) == set(one) and len(one) > 20
        for name, g in one.items():
            assert (many[name] - g).norm() <= 1e-4 * g.norm() + 1e-8, name


def test_loss_on_trained_tokens_equals_the_models_own_loss(tokenizer, tmp_path):
    profile, model = prepared(2, z_coef=0.0)
    rows = build_corpus(DATA[:6], tokenizer, profile.context).rows[:2]
    batch = Collator(0)(rows)
    trainer = training.CourseTrainer(
        model=model,
        args=training.arguments(profile, tmp_path),
        train_dataset=rows,
        router_losses=attach_router_losses(model, 0.0, 0.0),
    )
    model.train()
    ours = trainer.compute_loss(model, dict(batch))
    inputs = {k: v for k, v in batch.items() if k != "valid"}
    assert abs(ours.item() - model(**inputs, use_cache=False).loss.item()) < 1e-5
    masked = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    nothing = trainer.compute_loss(model, masked)
    nothing.backward()
    assert nothing.item() == 0.0, "a batch without a trained token has loss 0, not NaN"


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path, monkeypatch):
    broken = dataclasses.replace(TINY, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match="step"):
        run(tmp_path, broken)
    assert not (tmp_path / "result.json").exists()


def test_profiles_say_what_they_change_and_keep_the_cards_tokens_per_step():
    card = PROFILES["a100-80"]
    assert (card.learning_rate, card.micro_batch, card.accumulation, card.epochs, card.seed) == (1e-4, 4, 2, 3, 42)
    assert (card.context, card.warmup_steps, card.lora_r, card.lora_alpha, card.lora_dropout) == (10240, 10, 32, 16, 0.05)
    for profile in PROFILES.values():
        assert profile.reasons
        if profile.name != "tiny":
            assert profile.tokens_per_step == card.tokens_per_step == 81920


def test_written_stories_make_a_corpus(tokenizer):
    profile = dataclasses.replace(PROFILES["a100-80"], context=16384)  # the tiny tokenizer needs more of it
    corpus = build_corpus(labelled_stories(profile), tokenizer, profile.context)
    assert corpus.dropped_turns == 0 and 0.2 < corpus.trained / corpus.tokens < 0.9


def test_the_model_that_is_trained_on_is_not_the_plain_one(tokenizer):
    """Guards the fixture above: 4-bit weights differ from the checkpoint's."""
    _, model = prepared()
    plain = AutoModelForCausalLM.from_pretrained(TINY.base_path, dtype=torch.float32)
    ids = torch.arange(3, 23).view(1, 20)
    with torch.no_grad(), model.disable_adapter():
        assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3


def test_nothing_of_a_finished_run_is_kept_alive(tmp_path):
    """On a GPU the same model is often loaded next, and two of them may not fit."""
    models = []

    class Remember(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            models.append(weakref.ref(model))

    run(tmp_path, dataclasses.replace(TINY, max_steps=2), callbacks=[Remember()])
    assert [m() for m in models] == [None]


@pytest.mark.parametrize(
    ("gib", "capability", "wanted"),
    [(15.9, (6, 0), "tiny"), (14.7, (7, 5), "t4"), (31.7, (7, 0), "tiny"), (22.2, (8, 9), "l4"), (39.6, (8, 0), "a100-40"),
     (79.3, (8, 0), "a100-80"), (79.3, (7, 5), "t4"), (6.0, (8, 6), "tiny")],
)  # fmt: skip
def test_the_profile_is_chosen_by_memory_and_by_what_the_gpu_can_compute(gib, capability, wanted, monkeypatch):
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, int(gib * 2**30)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    profile, why = profiles.choose()
    assert profile.name == wanted and f"{capability[0]}.{capability[1]}" in why


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t4", "l4", "a100-80"])
def test_the_sample_stories_make_the_few_steps_that_the_profile_speaks_of(name, tokenizer, tmp_path):
    """One or two dozen, a good part of them warm-up: by the tiny tokenizer, which needs more tokens than a large model's."""
    profile = PROFILES[name]
    corpus = build_corpus(labelled_stories(profile), tokenizer, profile.context, long=profile.long_stories)
    steps = training._Run(profile, tmp_path, corpus, tokenizer, {}, "", profile.micro_batch).steps
    assert profiles.FEW in profile.reasons and 10 <= steps <= 24 and profile.warmup_steps > 0.4 * steps
    assert profile.save_steps < steps / 3, "a machine that vanishes must not take all of them with it"


def test_a_profile_that_cannot_be_trained_is_refused_with_the_field():
    wrong = [("micro_batch", 0), ("accumulation", -1), ("max_steps", 0), ("z_coef", math.nan), ("seed", -1), ("epochs", 0.0)]
    for name, value in [*wrong, ("learning_rate", math.inf), ("lora_r", 2.5), ("lora_dropout", 1.0)]:
        with pytest.raises(ValueError, match=rf"profile tiny: {name} must be .*, not "):
            dataclasses.replace(TINY, **{name: value})


def test_a_context_beyond_the_models_and_a_model_that_writes_nothing_are_refused(tmp_path):
    from transformers import T5Config

    with pytest.raises(ValueError, match=r"reads at most 2,048 tokens"):
        run(tmp_path / "a", dataclasses.replace(TINY, context=4096))
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="is a t5 model, which is no causal language model"):
        run(tmp_path / "b", dataclasses.replace(TINY, base=str(tmp_path / "t5")))


def test_names_and_paths_are_not_taken_for_what_they_name(tmp_path):
    with pytest.raises(TypeError, match=r"profile 'tiny' is a name: give PROFILES\['tiny'\]"):
        training.train("tiny", None, tmp_path / "a")
    for path in ("mine.yaml", tmp_path):
        with pytest.raises(TypeError, match=re.escape(f"{str(path)!r} is a path: give load_stories({str(path)!r})")):
            training.train(TINY, path, tmp_path / "b")
    assert not list(tmp_path.iterdir()), "said before anything is made"


def test_it_says_what_it_trains_on(tmp_path):
    said = []
    run(tmp_path, dataclasses.replace(TINY, max_steps=2, warmup_steps=1), say=said.append)
    assert said[0].startswith("corpus: 30 stories, ") and "of them trained" in said[0]
    assert said[1] == "2 steps, 1 of them warm-up" and "more than a third" in said[2]
    assert any(text.startswith("loading ") for text in said)


def test_held_out_stories_beyond_a_short_context_are_left_out(tmp_path):
    short = dataclasses.replace(TINY, context=300, max_steps=1)
    held = [labelled_story(900, max_words=30), labelled_story(901, max_words=30)]
    long = Story(
        *(getattr(held[0][0], n) for n in ("names", "personas", "scenario")), (Message("character", ("Yes. " * 400).strip()),)
    )
    said = []
    result = training.train(short, held[:1] * 4, tmp_path, progress=None, held_out=[*held, (long, [None])], say=said.append)
    assert result.history[-1]["held_out"]["all"] > 0
    assert "1 of 3 held-out stories are longer than the context, and not measured on" in said


def test_a_finished_run_whose_adapter_is_gone_makes_it_again(tmp_path, capsys):
    import shutil

    from tests import small_runs

    base = small_runs.make_base(tmp_path / "base")
    first = small_runs.train(base, tmp_path / "run")
    weights = (first.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(first.adapter)
    again = small_runs.train(base, tmp_path / "run")
    assert "lacks adapter_config.json: it is made again from the last checkpoint" in capsys.readouterr().out
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == weights and again.step == first.step
