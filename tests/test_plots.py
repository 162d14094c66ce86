"""The diagrams at the head of the notebooks are drawn from values, and say in words what they show."""

from __future__ import annotations

import math

import pytest
from matplotlib.patches import Rectangle

from helpers import lengths, plots, prompts, run_plots
from tests.test_prompts import STORY


def written(axes) -> str:
    return "\n".join(text.get_text() for text in axes.texts)


def test_a_prompt_has_a_band_for_each_piece_and_marks_the_trained_ones():
    pieces = prompts.segments(STORY, lengths.label_replies(STORY, omit=0.0))
    figure = plots.plot_prompt(pieces)
    (axes,) = figure.axes
    bands = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [bool(band.get_hatch()) for band in bands] == [piece.trained for piece in pieces]
    assert "### Response: (length = " in written(axes) and f"{len(pieces)} pieces" in figure.alt
    assert [text.get_text() for text in axes.texts[1::2]] == ["trained" if piece.trained else "read" for piece in pieces]


def test_a_long_piece_is_cut_and_says_so():
    long = prompts.Segment("word " * 500, True, "reply")
    assert "2,500 characters in all" in written(plots.plot_prompt([long]).axes[0])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_layer_shows_the_shares_and_weights_of_its_logits(top_k):
    logits = [0.1, 1.1, -0.5, 0.3]
    figure = plots.plot_moe_layer(logits, top_k)
    (axes,) = figure.axes
    shares = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
    best = sorted(range(4), key=lambda e: -shares[e])[:top_k]
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    assert len(boxes) == top_k
    for e, share in enumerate(shares):
        assert f"expert {e}:  logit {logits[e]:+.1f}, share {share:.0%}" in written(axes)
        assert (f"expert {e} with weight {share / sum(shares[b] for b in best):.2f}" in figure.alt) == (e in best)
    assert f"logsumexp² = {math.log(sum(map(math.exp, logits))) ** 2:.1f}" in written(axes)


def test_the_qlora_layer_hatches_what_the_audit_calls_4_bit():
    table = [
        {"part": "experts", "4-bit": 1.0, "bits/weight": 4.127},
        {"part": "attention", "4-bit": 0.0, "bits/weight": 16.0},
        {"part": "router", "4-bit": 0.0, "bits/weight": 32.0},
        {"part": "adapters", "4-bit": 0.0, "bits/weight": 32.0},
        {"part": "all", "4-bit": 0.9, "bits/weight": 5.0},
    ]
    figure = run_plots.plot_qlora_layer(table)
    layer, bars = figure.axes
    assert [bool(bar.get_hatch()) for bar in bars.patches] == [True, False, False, False]
    assert [bar.get_width() for bar in bars.patches] == [4.127, 16.0, 32.0, 32.0]
    assert sum(bool(patch.get_hatch()) for patch in layer.patches) == 4, "experts alone, here"
    assert "experts 4.1, attention 16.0" in figure.alt and "expert 7" in written(layer)
