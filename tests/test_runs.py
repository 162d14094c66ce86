"""A run keeps to its settings, and to its disk and signals when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import files, resume, run_log, training
from helpers.data import build_corpus
from helpers.experiment import finished
from helpers.held_out import held_out_stories
from helpers.profiles import PROFILES
from helpers.router_losses import RouterLosses, attach_router_losses
from helpers.trainer import CourseTrainer, Interruptible, NumberedCollator
from tests import small_runs
from tests.small_runs import STORIES, small_profile, train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_runs.make_base(tmp_path_factory.mktemp("base"))


def another(value):
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 0.5 + 0.01


def test_every_setting_that_changes_a_run_is_compared(base):
    one = small_profile(base)
    texts = {"name": "x", "stories": "generated:7", "dtype": "bfloat16", "long_stories": "split"}
    assert not {(k, v) for k, v in texts.items() if getattr(one, k) == v}
    for field in {f.name for f in dataclasses.fields(one)} - {"reasons", "memory_gib", "save_steps", "base"}:
        changed = resume.settings(one)
        assert field in changed["profile"]
        changed["profile"] = changed["profile"] | {field: texts.get(field) or another(getattr(one, field))}
        assert f"{field}: " in resume.difference(changed, resume.settings(one)), field


def test_a_deletion_that_is_cut_off_looks_like_no_checkpoint(tmp_path):
    keeper = resume.Checkpoints(tmp_path, {}, SimpleNamespace(state=lambda: {}))
    for n in (1, 2):
        (tmp_path / f"checkpoint-{n}").mkdir()
        (tmp_path / f"checkpoint-{n}" / "x").write_text("x")
        resume.seal(tmp_path / f"checkpoint-{n}", {})
    (tmp_path / "checkpoint-3").mkdir()
    with patch.object(shutil, "rmtree", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        keeper.on_save(None, SimpleNamespace(is_world_process_zero=True, global_step=3), None)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_checkpoint_that_cannot_be_written_says_what_to_do(base, tmp_path, log_every):
    with (
        patch.object(CourseTrainer, "_save_checkpoint", side_effect=RuntimeError("stream error: file write failed")),
        pytest.raises(OSError, match=r"checkpoint of step 2 could not be written .*make room"),
    ):
        train(base, tmp_path, small_profile(base, max_steps=4, save_steps=2), log_every=log_every)


class SmallGpu(training.TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def full(_module, _args, kwargs):
            if kwargs["input_ids"].shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.register_forward_pre_hook(full, with_kwargs=True)


def test_a_run_that_was_shrunk_goes_on_shrunk(base, tmp_path):
    profile = small_profile(base, micro_batch=2, accumulation=1, max_steps=4, save_steps=2)
    half = train(base, tmp_path, profile, callbacks=[SmallGpu()], shrink=True, stop_after=2)
    assert not half.finished
    assert train(base, tmp_path, profile, callbacks=[SmallGpu()]).facts["micro_batch"] == 1, "without asking again"


def test_the_result_is_there_as_a_whole_or_not_at_all(base, tmp_path):
    real = os.replace

    def full(a, b):
        if str(b).endswith("result.json"):
            raise OSError(28, "No space left on device")
        return real(a, b)

    with patch.object(os, "replace", full), pytest.raises(OSError, match="could not be written"):
        train(base, tmp_path, small_profile(base, max_steps=1))
    assert not (tmp_path / "result.json").exists()


def test_a_second_ctrl_c_stops_at_once_and_the_first_does_not():
    before, watch = signal.signal(signal.SIGINT, signal.default_int_handler), Interruptible()
    watch.on_train_begin(None, None, None)
    try:
        signal.raise_signal(signal.SIGINT)
        assert watch.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        watch.restore()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_pythons_again_after_a_run_and_after_one_that_failed(base, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train(base, tmp_path / "a", small_profile(base, max_steps=1))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    with patch.object(CourseTrainer, "compute_loss", side_effect=RuntimeError("x")), pytest.raises(RuntimeError, match="x"):
        train(base, tmp_path / "b", small_profile(base, max_steps=1))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_whose_router_losses_do_nothing_stops_at_its_first_step(base, tmp_path):
    with (
        patch.object(RouterLosses, "problem", lambda self: "nothing trainable"),
        pytest.raises(RuntimeError, match="nothing trainable"),
    ):
        train(base, tmp_path, small_profile(base, max_steps=1))


def test_without_the_fused_loss_rows_are_trained_where_either_is(base, tokenizer, tmp_path):
    batch = NumberedCollator(0)(build_corpus(STORIES, tokenizer, 512).numbered()[:3])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    trainer = CourseTrainer(
        model=model,
        args=training.arguments(small_profile(base), tmp_path),
        train_dataset=[],
        router_losses=attach_router_losses(model, 0.0),
    )
    assert trainer.fused
    found = []
    for trainer.fused in (True, False):
        found.append(trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(50)).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_order_of_rows_follows_the_profiles_seed(base, tmp_path):
    args = training.arguments(small_profile(base, seed=7), tmp_path)
    assert (args.seed, args.data_seed) == (7, 7)


def test_a_long_run_measures_the_held_out_loss_about_ten_times(base, tmp_path):
    held = held_out_stories(PROFILES["tiny"], 1)
    result = train(base, tmp_path, small_profile(base, max_steps=40, save_steps=1), held_out=held, log_every=1)
    assert 9 <= sum("held_out" in r for r in result.history) <= 12


def test_the_balancing_coefficient_reaches_the_losses(base, tmp_path):
    seen = []

    class Look(training.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append([getattr(m, "_router_losses", None) for m in model.modules() if getattr(m, "_router_losses", None)])

    train(base, tmp_path, small_profile(base, max_steps=1, z_coef=0.25, balance_coef=0.5), callbacks=[Look()])
    ((handle,),) = seen
    assert (handle.z_coef, handle.balance_coef) == (0.25, 0.5)


def test_the_balancing_loss_is_trained(base, tmp_path):
    rows = [
        train(base, tmp_path / str(c), small_profile(base, max_steps=1, z_coef=0.0, balance_coef=c)).history[0]
        for c in (0.0, 5.0)
    ]
    assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["grad_norm"] != rows[1]["grad_norm"]


def test_a_context_as_long_as_the_models_is_not_refused(base):
    from transformers import AutoConfig

    longest = AutoConfig.from_pretrained(base).max_position_embeddings
    assert training._causal_lm(small_profile(base, context=longest))
    with pytest.raises(ValueError, match="reads at most"):
        training._causal_lm(small_profile(base, context=longest + 1))


class Full(training.TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_odd_micro_batch_is_not_halved(base, tmp_path):
    """5 rows and once: with 2 a step would have 4."""
    with pytest.raises(torch.OutOfMemoryError, match="micro-batch 5 does not fit"):
        train(base, tmp_path, small_profile(base, micro_batch=5, accumulation=1, max_steps=1), callbacks=[Full()], shrink=True)


def test_the_smallest_logit_of_a_row_is_that_of_all_its_steps():
    def step(low, high):
        layers = {n: [1.0] for n in ("tokens", "z", "balance", "entropy", "logsumexp", "mean", "spread")}
        return {"loss": 1.0, "rows": [], "routers": {**layers, "load": [[0.5, 0.5]], "min": [low], "max": [high]}}

    row = run_log.merge([step(-5.0, 9.0), step(-2.0, 3.0)])
    assert (row["router/min"], row["router/max"]) == (-5.0, 9.0)


def test_files_are_on_the_disk_before_they_count(tmp_path, monkeypatch):
    """os.fsync of every file of a checkpoint, then the mark, then its folder."""
    synced = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), original(fd))[1])
    files = [tmp_path / "a.bin", tmp_path / "sub" / "b.bin"]
    (tmp_path / "sub").mkdir()
    for f in files:
        f.write_bytes(b"x")
    resume.seal(tmp_path, {})
    mark = (tmp_path / resume.MARK).stat().st_ino
    assert {f.stat().st_ino for f in files} <= set(synced[: synced.index(mark)])
    assert synced[-1] == tmp_path.stat().st_ino


def test_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "log.jsonl"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="could not be written"):
        files.write_text(file, "new")
    assert file.read_text() == "old"


def test_steps_are_ordered_by_number(tmp_path):
    wanted = {"profile": {}, "base": None, "data": None, "processes": None}
    for n in (9, 10, 100, 99):
        sealed(tmp_path / f"checkpoint-{n}", wanted)
    found = resume.last_good(tmp_path, wanted)
    assert found.name == "checkpoint-100"
    keeper = resume.Checkpoints(tmp_path, wanted, SimpleNamespace(state=lambda: {}), since=found)
    (tmp_path / "checkpoint-101").mkdir()
    keeper.on_save(None, SimpleNamespace(is_world_process_zero=True, global_step=101), None)
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == ["checkpoint-100", "checkpoint-101"]


def sealed(folder, wanted):
    folder.mkdir()
    for name in resume.NEEDED:
        (folder / name).write_text("x", encoding="utf-8")
    resume.seal(folder, wanted)


def test_damaged_and_cut_off_checkpoints_do_not_count_and_go(tmp_path):
    """Of 8 (whole), 10 (damaged) and 11 (cut off), the next one leaves 8, so that there are two whole ones."""
    wanted = {"profile": {}, "base": None, "data": None, "processes": None}
    sealed(tmp_path / "checkpoint-8", wanted)
    sealed(tmp_path / "checkpoint-10", wanted)
    (tmp_path / "checkpoint-10" / "optimizer.pt").write_text("y", encoding="utf-8")
    (tmp_path / "checkpoint-11").mkdir()
    found = resume.last_good(tmp_path, wanted)
    keeper = resume.Checkpoints(tmp_path, wanted, SimpleNamespace(state=lambda: {}), since=found)
    (tmp_path / "checkpoint-12").mkdir()
    keeper.on_save(None, SimpleNamespace(is_world_process_zero=True, global_step=12), None)
    assert found.name == "checkpoint-8"
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


@pytest.mark.parametrize("change", [{"files": {}}, {"files": []}, {"settings": None}, {"settings": {"profile": {}}}])
def test_an_edited_seal_is_damage(tmp_path, change):
    wanted = {"profile": {}, "base": None, "data": None, "processes": None}
    sealed(tmp_path / "checkpoint-8", wanted)
    assert resume.damage(tmp_path / "checkpoint-8") is None
    mark = tmp_path / "checkpoint-8" / resume.MARK
    mark.write_text(json.dumps(json.loads(mark.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no whole checkpoint is left .*complete\.json (cannot be read|does not list)"):
        resume.last_good(tmp_path, wanted)


@pytest.mark.parametrize("name", ["adapter", "result.json", "log.jsonl"])
@pytest.mark.parametrize("go_on", [True, False])
def test_what_is_not_this_runs_is_not_touched(base, tmp_path, name, go_on):
    """Somebody's adapter in the output folder, without the run.json that a run of the course has."""
    place = tmp_path / name / "notes.txt" if name == "adapter" else tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_text('{"mine": 1, "seconds": 1}\n', encoding="utf-8")
    with pytest.raises((ValueError, FileExistsError), match=rf"holds {name} but no run.json|already holds a run"):
        train(base, tmp_path, small_profile(base, max_steps=1), resume=go_on)
    assert place.read_text(encoding="utf-8") == '{"mine": 1, "seconds": 1}\n'


def test_a_finished_run_without_its_settings_or_with_another_adapter_is_not_taken(base, tmp_path):
    profile = small_profile(base, max_steps=2, save_steps=1)
    done = train(base, tmp_path, profile)
    file = done.adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is not what the run wrote: delete"):
        finished(tmp_path)
    train(base, tmp_path, profile)
    assert file.read_bytes() == whole, "made again from the last checkpoint"
    result = (tmp_path / "result.json").read_text(encoding="utf-8")
    (tmp_path / "result.json").write_text("[]", encoding="utf-8")
    for asked in (lambda: finished(tmp_path), lambda: train(base, tmp_path, profile)):
        with pytest.raises(ValueError, match=r"result\.json is damaged"):
            asked()
    (tmp_path / "result.json").write_text(result, encoding="utf-8")
    facts = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    shutil.rmtree(done.adapter)
    for micro_batch in (3, "x", 0):
        (tmp_path / "run.json").write_text(json.dumps(facts | {"micro_batch": micro_batch}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"run\.json has a micro-batch of .* which does not divide"):
            train(base, tmp_path, profile)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"but no run\.json, so it is not ours"):
        train(base, tmp_path, small_profile(base, max_steps=4))


def test_an_empty_list_of_held_out_stories_measures_nothing(base, tmp_path):
    result = train(base, tmp_path, small_profile(base, max_steps=1), held_out=[])
    assert not any("held_out" in r for r in result.history)


@pytest.mark.parametrize("part, word", [("lora_experts", ".experts."), ("lora_router", ".gate.")])
def test_the_profile_says_what_is_adapted(tmp_path, part, word):
    base = small_runs.make_base(tmp_path)
    for wanted in (True, False):
        model = training.prepare_model(small_profile(base, **{part: wanted}))
        assert any(word in n for n, p in model.named_parameters() if p.requires_grad) == wanted


def test_long_stories_are_split_where_the_profile_says_so(tmp_path):
    from helpers.tiny_stories import labelled_story

    base = small_runs.make_base(tmp_path / "base")
    stories = [labelled_story(k, max_words=300, max_turns=8) for k in range(12)]
    facts = {}
    for kind in ("drop", "split"):
        profile = small_profile(base, context=600, max_steps=1, long_stories=kind)
        facts[kind] = training.train(profile, stories, tmp_path / kind, progress=None, held_out=[], skip_too_long=True).facts[
            "corpus"
        ]
    assert facts["drop"]["dropped_turns"] > 0 == facts["split"]["dropped_turns"]
    assert facts["split"]["samples"] > facts["split"]["stories"] and facts["drop"]["samples"] == facts["drop"]["stories"]


def test_two_processes_make_half_the_steps(tmp_path):
    from types import SimpleNamespace

    profile = small_profile("x", micro_batch=2, accumulation=1, epochs=1, max_steps=-1)
    steps = [
        training._Run(profile, tmp_path, SimpleNamespace(rows=[None] * 24), None, {}, "", 2, processes=n).steps for n in (1, 2)
    ]
    assert steps == [12, 6]
