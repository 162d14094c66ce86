"""Log rows, live output and its cost, the profile of a step."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from helpers import run_log, training
from helpers.data import build_corpus
from helpers.profiles import PROFILES
from helpers.run_plots import LiveTraining, plot_held_out, plot_router_pair, plot_spoilt, plot_step_profile, plot_training
from helpers.step_profile import profile_step
from helpers.tokens import Collator
from tests import small_runs
from tests.small_runs import STORIES, small_profile


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_runs.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    labelled = STORIES[:3]
    return small_runs.train(base, tmp_path_factory.mktemp("run"), held_out=labelled)


def test_a_row_is_the_mean_over_its_steps_weighted_by_tokens(whole):
    def layers(tokens, z, load):
        names = ("balance", "entropy", "logsumexp", "mean", "spread")
        values = {name: [1.0, 1.0] for name in names}
        return {"tokens": [tokens, tokens], "z": z, "max": [1.0, z[0]], "min": [-z[1], 0.0], "load": load, **values}

    even, one = [[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]
    steps = [
        {"loss": 2.0, "rows": [1], "routers": layers(100, [4.0, 8.0], even)},
        {"loss": 4.0, "rows": [2], "routers": layers(300, [8.0, 8.0], one)},
    ]
    row = run_log.merge(steps)
    assert row["loss"] == 3.0 and row["router/z"] == pytest.approx((7.0 + 8.0) / 2)
    assert (row["router/max"], row["router/min"]) == (8.0, -8.0)
    assert row["load"] == [[0.875, 0.125], [0.5, 0.5]] and row["router/max_load"] == 1.75
    assert run_log.merge([{"loss": 2.0, "rows": [], "routers": {}}]) == {"loss": 2.0}


def test_one_row_for_all_steps_is_the_mean_of_a_row_a_step(base, whole, tmp_path):
    single = small_runs.train(base, tmp_path, log_every=1).history
    for row in whole.history:
        first = row["step"] - len(row["rows"])
        steps = [r for r in single if first < r["step"] <= row["step"]]
        assert row["loss"] == pytest.approx(sum(r["loss"] for r in steps) / len(steps), rel=1e-6)
        assert row["rows"] == [n for r in steps for n in r["rows"]]


def test_time_is_summed_over_sittings():
    rows = [{"seconds": s} for s in (1.0, 5.0, 9.0, 2.0, 4.0, 1.5)]
    assert training.total_seconds(rows) == 9.0 + 4.0 + 1.5
    later = [{"seconds": 1.0, "sitting": 1}, {"seconds": 3.0, "sitting": 2}, {"seconds": 4.0, "sitting": 2}]
    assert training.total_seconds(later) == 1.0 + 4.0, "a slow first row of a new sitting"
    assert training.total_seconds([{"seconds": 2.0}, {"seconds": 7.0, "sitting": 2}]) == 9.0, "begun by an older version"


def test_the_line_for_a_terminal_says_how_long_it_will_take():
    row = {"step": 10, "of": 100, "epoch": 0.1, "loss": 1.0, "grad_norm": 0.5, "tokens_per_second": 1000, "seconds": 20.0}
    later = {**row, "step": 20, "seconds": 60.0, "router/z": 3.0, "held_out": {"all": 1.5}}
    assert "3 min left" in run_log.describe([row]), "90 steps of 2 s"
    line = run_log.describe([row, later])
    assert "5 min left" in line and "held out 1.500" in line and "epoch 0.10" in line, "80 steps of 4 s: the pace of now"
    resumed = {**row, "step": 30, "seconds": 5.0}
    assert "35 s left" in run_log.describe([row, later, resumed]), "70 steps of 0.5 s since the resumption"
    slow = {**row, "step": 30, "seconds": 70.0, "sitting": 2}
    assert "8 min left" in run_log.describe([row, {**later, "sitting": 1}, slow]), "70 steps of 7 s"
    assert [run_log.duration(s) for s in (12, 200, 7500)] == ["12 s", "3 min", "2 h 05 min"]


def test_a_cut_off_last_line_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert run_log.read_log(tmp_path) == [{"step": 1}]


class Slow(LiveTraining):
    """Drawing takes half a second of an invented clock."""

    def __init__(self):
        self.time = 0.0
        super().__init__(clock=lambda: self.time)
        self.at = []

    def draw(self, rows):
        self.at.append(rows[-1]["step"])
        self.time += 0.5


def test_live_plots_cost_less_than_a_hundredth_of_the_run(whole):
    live = Slow()
    for step in range(600):
        live.time += 0.5
        live([{"step": step, "of": 600}] * 2)
    assert 3 <= live.drawn <= 6 and live.cost <= 0.01, (live.at, live.cost)


def test_a_live_plot_updates_one_figure(whole, monkeypatch):
    shown = []

    class Handle:
        def update(self, figure):
            shown.append("update")

    monkeypatch.setattr("IPython.display.display", lambda figure, display_id: shown.append("first") or Handle())
    live = LiveTraining(share=1e9, seconds=0)
    for _ in range(4):  # the first call starts the clock
        live(whole.history)
    assert shown == ["first", "update", "update"]


def test_the_live_plot_ends_with_the_whole_run(whole, monkeypatch):
    """Else a figure of step 340 stands above "step 1600 of 1600"."""
    shown = []

    class Handle:
        def update(self, figure):
            shown.append(figure.alt)

    monkeypatch.setattr("IPython.display.display", lambda figure, display_id: shown.append(figure.alt) or Handle())
    live = LiveTraining(share=1e9, seconds=0)
    live(whole.history[:1])
    live(whole.history[:2])
    before = live.cost, live.drawn
    live.finish(whole.history)
    assert f"to step {whole.history[-1]['step']}:" in shown[-1] and live.drawn == before[1]
    LiveTraining().finish(whole.history)  # a run that was never drawn on its way
    assert len(shown) == before[1] + 2


def test_the_load_over_time_is_labelled_in_steps(whole):
    axes = next(a for a in plot_training(whole.history).axes if a.get_title(loc="left").startswith("load of the busiest"))
    label = axes.xaxis.get_major_formatter()
    assert axes.get_xlabel() == "step"
    assert [label(n, 0) for n in range(len(whole.history))] == [str(row["step"]) for row in whole.history]
    assert label(-1, 0) == label(len(whole.history), 0) == ""


def test_a_run_that_was_stopped_before_its_first_row_is_no_crash():
    with pytest.raises(ValueError, match="stopped before its first one"):
        plot_training([])
    LiveTraining().finish([])
    assert training.total_seconds([]) == 0.0


def test_a_short_run_pays_little_for_its_picture():
    """A redraw of 0.8 s, as on a slow machine: in 35, 60 and 300 seconds it takes no more than a hundredth."""
    for length in (35, 60, 300):
        now = [0.0]
        live = LiveTraining(clock=lambda now=now: now[0])
        live.draw = lambda rows, now=now: now.__setitem__(0, now[0] + 0.8)
        for second in range(length):
            now[0] = max(now[0], float(second))
            live([{}] * (second + 1))
        assert live.cost <= 0.01, length


def test_figures_have_a_text_alternative(whole):
    first, last = whole.history[0]["held_out"], whole.history[-1]["held_out"]
    figures = [
        plot_training(whole.history),
        plot_router_pair({"a": whole.history, "b": whole.history}),
        plot_held_out(first, last),
        plot_spoilt({"a": whole.history, "b": whole.history, "c": whole.history}),
    ]
    for figure in figures:
        assert len(figure.alt.split()) >= 5


@pytest.mark.parametrize("installed", [False, True])
def test_tensorboard_is_used_if_it_is_installed(installed, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.trainer.is_tensorboard_available", lambda: installed)
    if installed and importlib.util.find_spec("tensorboard") is None:
        monkeypatch.setattr("helpers.trainer.Arguments", lambda **kwargs: kwargs["report_to"])
        assert training.arguments(PROFILES["tiny"], tmp_path) == ["tensorboard"]
    else:
        assert training.arguments(PROFILES["tiny"], tmp_path).report_to == (["tensorboard"] if installed else [])


def test_reporters_get_the_router_numbers_too(whole):
    state = json.loads((whole.run_dir / "checkpoint-12" / "trainer_state.json").read_text())
    logged = [row for row in state["log_history"] if "loss" in row]
    assert [r["router/z"] for r in logged] == [r["router/z"] for r in whole.history]


def test_a_step_is_profiled_by_part_and_left_as_it_was(base, tokenizer):
    model = training.prepare_model(small_profile(base, gradient_checkpointing=False))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    batch = Collator(0)(build_corpus(STORIES, tokenizer, 512).rows[:2])
    found = profile_step(model, batch, repeats=2)
    assert found["tokens"] == int(batch["valid"].sum())
    for part in ("attention", "experts", "router"):
        assert found["seconds"][part]["forward"] > 0 and found["seconds"][part]["backward"] > 0, part
    trained = sum(p.nbytes for p in before.values()) / 2**20
    assert found["mib"]["adapters"] == trained and found["mib"]["their two Adam moments"] == 2 * trained
    hidden = batch["input_ids"].numel() * model.config.hidden_size * 4 / 2**20
    assert found["mib"]["activations at the peak"] > 4 * hidden, "at least inputs and outputs of a layer's parts"
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert all(p.grad is None for p in model.parameters())
    assert len(plot_step_profile(found).alt.split()) >= 5
