"""What a run survives, and what it refuses. Compared with a run to which nothing happened, bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from helpers import resume, training
from helpers.profiles import ROOT
from helpers.run_log import CLOCK, read_log
from tests import small_runs
from tests.small_runs import small_profile, train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_runs.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Twelve steps to which nothing happened."""
    return train(base, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def part(base, tmp_path):
    """A run that was interrupted after ten of the twelve, in the middle of a log row; checkpoints at 8 and 10."""
    result = train(base, tmp_path / "run", stop_after=10)
    assert not result.finished and result.step == 10
    return result.run_dir


def rows(folder):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_log(folder)]


def states(folder):
    """Everything that the next step would depend on."""
    kinds = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    return {name: torch.load(folder / name, weights_only=False) for name in kinds}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def assert_as_if_nothing_had_happened(run_dir, whole):
    weights = "adapter_model.safetensors"
    assert (run_dir / "adapter" / weights).read_bytes() == (whole.adapter / weights).read_bytes()
    assert rows(run_dir) == rows(whole.run_dir)
    last = f"checkpoint-{whole.step}"
    for name, state in states(whole.run_dir / last).items():
        assert same(states(run_dir / last)[name], state), name


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its children")
def test_kill_at_any_moment_ctrl_c_and_a_full_disk_change_nothing(base, tmp_path):
    """Kills at random moments, some in the middle of a checkpoint's writing, after Ctrl-C and a disk that filled up."""
    command = [sys.executable, "-m", "tests.kill_runs", str(base), str(tmp_path), "22", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    hits = Counter(report["hits"])
    assert report["interrupted"] == 130, "Ctrl-C is a clean end, with a checkpoint"
    assert report["full"] == 2 and "could not be written" in report["message"] and "make room" in report["message"]
    assert sum(hits.values()) - hits["finished"] >= 20 and hits["while writing"] >= 3, hits
    assert report["plain"] == report["last"] == 0
    assert_as_if_nothing_had_happened(tmp_path / "run", training.load_result(tmp_path / "plain"))


def test_an_interruption_between_two_log_rows_leaves_no_trace(base, part, whole):
    assert train(base, part).finished
    assert_as_if_nothing_had_happened(part, whole)


def test_each_row_is_logged_once_an_epoch_in_another_order(whole, base, tmp_path):
    profile = small_profile(base, epochs=2, max_steps=-1)
    long = train(base, tmp_path, profile)
    seen = [n for row in long.history for n in row["rows"]]
    half = len(seen) // 2
    assert sorted(seen[:half]) == sorted(seen[half:]) == list(range(half)) and seen[:half] != seen[half:]


def test_a_checkpoint_that_was_cut_off_is_passed_over(base, part, whole, capsys):
    (part / "checkpoint-10" / resume.MARK).unlink()
    (part / "checkpoint-10" / "optimizer.pt").write_bytes(b"half")
    train(base, part)
    assert "checkpoint-10 was cut off while it was written: passed over" in capsys.readouterr().out
    assert_as_if_nothing_had_happened(part, whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(base, part, whole, capsys):
    file = part / "checkpoint-10" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train(base, part)
    assert "checkpoint-10 is damaged (optimizer.pt has changed since it was written)" in capsys.readouterr().out
    assert_as_if_nothing_had_happened(part, whole)


def test_if_all_checkpoints_are_damaged_it_stops(base, part):
    for folder in part.glob("checkpoint-*"):
        (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint .* checkpoint-8: adapter_model.safetensors is missing"):
        train(base, part)


def test_a_foreign_checkpoint_is_refused_with_the_difference(base, part, tmp_path):
    other = train(base, tmp_path / "other", small_profile(base, learning_rate=1e-3, max_steps=11), stop_after=11).run_dir
    shutil.copytree(other / "checkpoint-11", part / "checkpoint-11")
    with pytest.raises(ValueError, match=r"belongs to another run .*learning_rate: 0\.001 then, 0\.004 now"):
        train(base, part)
    bare = tmp_path / "bare"
    shutil.copytree(other / "checkpoint-11", bare / "checkpoint-11")
    with pytest.raises(ValueError, match="holds checkpoint-11 but no"):
        train(base, bare)


def test_an_unreadable_run_file_is_named(base, part):
    (part / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        train(base, part)


def test_only_the_last_checkpoints_are_kept_and_hold_adapters_only(whole, base):
    assert sorted(p.name for p in whole.run_dir.glob("*checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    tensors = load_file(whole.run_dir / "checkpoint-12" / "adapter_model.safetensors")
    assert tensors and all("lora_" in name for name in tensors)
    adapter_bytes = sum(t.nbytes for t in tensors.values())
    size = sum(p.stat().st_size for p in (whole.run_dir / "checkpoint-12").glob("*"))
    assert size < 4 * adapter_bytes + 200_000, "adapters and their two Adam moments, and little else"


@pytest.mark.parametrize("kept", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked(base, tmp_path, kept):
    train(base, tmp_path, keep_checkpoints=kept)
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == sorted(
        ["checkpoint-12", "checkpoint-8", "checkpoint-4"][:kept]
    )


def test_a_folder_that_cannot_be_written_is_named(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        train(base, tmp_path / "file" / "run")


class At(TrainerCallback):
    """Does something to the model before a step, and keeps the weights as they were."""

    def __init__(self, step, what):
        self.step, self.what, self.before = step, what, {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.model = model
            self.before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            self.what(model)

    def weights_are_untouched(self):
        now = dict(self.model.named_parameters())
        return bool(self.before) and all(torch.equal(now[n], p) for n, p in self.before.items())


def poison_forward(model):
    model.get_submodule("base_model.model.model.norm").register_forward_hook(lambda _m, _a, out: out * float("nan"))


def swell_gradient(model):
    """Finite, and so large that the sum of its squares is not: clipping would make zeros of it."""
    next(p for n, p in model.named_parameters() if "lora_B" in n).register_hook(lambda g: g * 0 + 1e25)


def poison_gradient(model):
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))


POISONS = [
    (poison_forward, "the loss is not finite"),
    (poison_gradient, "a gradient is not finite"),
    (swell_gradient, "the norm of the gradient is too large"),
]


@pytest.mark.parametrize(("poison", "what"), POISONS)
def test_what_is_not_finite_stops_before_the_weights_change(base, whole, tmp_path, poison, what):
    bad = At(6, poison)
    with pytest.raises(FloatingPointError, match=rf"{what} at step 6, in row \d+ \(generated:\d+") as caught:
        train(base, tmp_path / "run", callbacks=[bad])
    assert bad.weights_are_untouched()
    step6 = [n for row in rows(whole.run_dir) for n in row["rows"]][5]
    assert f"row {step6} (" in str(caught.value), "the row of that very step"
    assert resume.damage(tmp_path / "run" / "checkpoint-4") is None
    train(base, tmp_path / "run")
    assert_as_if_nothing_had_happened(tmp_path / "run", whole)


class SmallGpu(TrainerCallback):
    """A device on which one row fits, and not two."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def full(_module, _args, kwargs):
            if kwargs["input_ids"].shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore")

        self.hook = model.register_forward_pre_hook(full, with_kwargs=True)


def test_out_of_memory_advises_or_halves_the_micro_batch(base, tmp_path):
    profile = small_profile(base, micro_batch=4, accumulation=2, max_steps=4, save_steps=2, lora_dropout=0.0)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"Tried to allocate 3.00 GiB.*micro-batch 4 does not fit.*--shrink"
    ) as caught:
        train(base, tmp_path / "small", profile, callbacks=[SmallGpu()])
    assert "more" not in str(caught.value) and "the budget expects" in str(caught.value)
    plain = train(base, tmp_path / "large", profile)
    shrunk = train(base, tmp_path / "small", profile, callbacks=[SmallGpu()], shrink=True)
    assert (shrunk.facts["micro_batch"], shrunk.facts["accumulation"]) == (1, 8)
    for a, b in zip(plain.history, shrunk.history, strict=True):
        assert a["rows"] == b["rows"] and abs(a["loss"] - b["loss"]) < 1e-4
    for name, tensor in load_file(plain.adapter / "adapter_model.safetensors").items():
        other = load_file(shrunk.adapter / "adapter_model.safetensors")[name]
        assert (tensor - other).norm() <= 2e-3 * tensor.norm() + 1e-6, name


def test_profile_of_a_run_is_the_one_that_was_given(base, whole):
    assert resume.settings(training.profile_of(whole.run_dir)) == resume.settings(small_profile(base))


def test_other_weights_under_the_same_name_are_another_base(base, tmp_path):
    """The adapter belongs to the weights that it was trained on: neither a half nor a finished run goes on with others."""
    from helpers.experiment import load_run

    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    profile = small_profile(moved, max_steps=2)
    done = train(moved, tmp_path / "done", profile)
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    for again in (lambda: train(moved, done.run_dir, profile), lambda: load_run(done.run_dir)):
        with pytest.raises(ValueError, match=r"other settings \(the weights of the base"):
            again()


def test_a_finished_run_on_given_stories_is_not_taken_for_one_on_the_profiles(base, tmp_path):
    from helpers.tiny_stories import labelled_story

    profile = small_profile(base, max_steps=2, stories="generated:50")
    mine = [labelled_story(77_000 + k) for k in range(40)]
    training.train(profile, mine, tmp_path, progress=None)
    with pytest.raises(ValueError, match=r"the stories and their length labels \(40 stories, .* then; 50 stories, .* now\)"):
        training.train(profile, None, tmp_path, progress=None)


def lively(base):
    """The last step still changes the weights: a cosine ends at 0, and one step too many would not show."""
    return small_profile(base, max_steps=4, save_steps=2, warmup_steps=4)


def test_a_crash_between_the_last_checkpoint_and_the_result_costs_no_step_and_adds_none(base, tmp_path, capsys):
    whole = train(base, tmp_path / "whole", lively(base))
    assert whole.history[-1]["learning_rate"] > 0
    crashed = tmp_path / "crashed"
    train(base, crashed, lively(base))
    shutil.rmtree(crashed / "adapter")
    (crashed / "result.json").unlink()
    said = []
    again = train(base, crashed, lively(base), say=said.append)
    assert again.finished and again.step == 4 and "going on from checkpoint-4" in said
    assert_as_if_nothing_had_happened(crashed, whole)
    assert not list(crashed.glob("checkpoint-5")) and again.facts["trainable"] == whole.facts["trainable"]
    (crashed / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is damaged .*: delete it, and the same training command"):
        train(base, crashed, lively(base))


def test_a_full_disk_at_the_end_says_what_to_do_and_loses_nothing(base, whole, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training.qlora, "save_lora", full)
        with pytest.raises(OSError, match=r"finished adapter could not be written to .*No space left.*make room.*trains nothing"):
            train(base, tmp_path / "run")
    assert train(base, tmp_path / "run").finished
    assert_as_if_nothing_had_happened(tmp_path / "run", whole)


def test_a_start_that_failed_before_its_first_row_may_be_corrected(base, tmp_path):
    bad = At(1, poison_forward)
    with pytest.raises(FloatingPointError):
        train(base, tmp_path, small_profile(base, learning_rate=1e-3, max_steps=2), callbacks=[bad])
    assert (tmp_path / "run.json").exists() and not read_log(tmp_path)
    assert train(base, tmp_path, small_profile(base, max_steps=2), resume=False).finished, "nor is it a run to refuse"
    assert json.loads((tmp_path / "run.json").read_text())["profile"]["learning_rate"] == small_profile(base).learning_rate


def test_another_number_of_processes_is_refused_unless_the_run_is_finished(base, part, whole):
    for folder in (part, whole.run_dir):
        facts = json.loads((folder / "run.json").read_text())
        assert facts["processes"] == 1
    facts = json.loads((part / "run.json").read_text())
    (part / "run.json").write_text(json.dumps({**facts, "processes": 2}))
    with pytest.raises(ValueError, match=r"2 processes then, 1 now.*start as many again"):
        train(base, part)
    older = {k: v for k, v in facts.items() if k != "processes"}
    (part / "run.json").write_text(json.dumps(older))
    assert train(base, part).finished, "a run of an older version does not say how many there were"
    (part / "run.json").write_text(json.dumps({**facts, "processes": 2}))
    assert train(base, part).facts["processes"] == 1


def test_other_kernels_than_before_are_named(base, part, capsys):
    """A run begun with the fused kernels, continued without them: nothing is wrong, but it is no longer the same run."""
    facts = json.loads((part / "run.json").read_text())
    assert facts["fused_kernels"] is False
    (part / "run.json").write_text(json.dumps({**facts, "fused_kernels": True}))
    assert train(base, part).finished
    assert "going on with other kernels than before" in capsys.readouterr().out


def test_a_run_of_another_version_is_named_and_save_steps_are_kept(base, whole, tmp_path):
    assert training.profile_of(whole.run_dir).save_steps == small_profile(base).save_steps == 4
    facts = json.loads((whole.run_dir / "run.json").read_text())
    older = {k: v for k, v in facts.items() if k != "save_steps"}
    (tmp_path / "run.json").write_text(json.dumps(older))
    assert training.profile_of(tmp_path).save_steps == 200, "the tiny profile's"
    (tmp_path / "run.json").write_text(json.dumps({**facts, "profile": {**facts["profile"], "wings": 2}}))
    with pytest.raises(ValueError, match=r"run\.json was written by another version of the course.*wings"):
        training.profile_of(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        training.profile_of(tmp_path)


def test_rows_know_their_sitting_however_quick_it_was(base, part):
    found = train(base, part).history
    assert [row["sitting"] for row in found] == [1 if row["step"] <= 10 else 2 for row in found] and found[-1]["sitting"] == 2
