"""The figures show the numbers of the tables, and say them in words."""

from __future__ import annotations

import io
import itertools

import matplotlib.image
import matplotlib.pyplot as plt
import pytest

from helpers import eval_plots
from helpers.lengths import LENGTHS, word_range
from tests.test_evaluation import table


@pytest.fixture(scope="module")
def tables():
    climbing = table(lambda c, i: word_range(c)[0] + i if c else 17)
    climbing.replies[0]["end"] = "limit"
    return climbing, table(lambda c, i: 5 + i)


def points(axes):
    return [tuple(p) for line in axes.lines for p in line.get_xydata()]


def test_lengths_shows_every_reply_and_the_ranges(tables):
    figure = eval_plots.plot_lengths(tables[0])
    (axes,) = figure.axes
    dots = [line for line in axes.lines if line.get_markersize() == 2.6]
    assert sum(len(line.get_xydata()) for line in dots) == len(tables[0].replies)
    assert axes.get_yscale() == "log" and "micro 10" in figure.alt
    cut = [line for line in dots if line.get_marker() == "^"]
    assert sum(len(line.get_xydata()) for line in cut) == 1, "a reply that was cut off has its own mark"


def test_lengths_shows_the_means_of_a_control_in_the_column_of_their_class(tables):
    alone, beside = eval_plots.plot_lengths(tables[0]), eval_plots.plot_lengths(tables[0], control=tables[1])
    lines = [line.get_xydata() for line in beside.axes[0].lines if line.get_color() == eval_plots.PURPLE]
    assert [[y for _, y in line] for line in lines] == [[r["mean"]] * 2 for r in tables[1].rows]
    assert [[round(x) for x, _ in line] for line in lines] == [[x, x] for x in range(len(lines))], "reaches into a neighbour's"
    assert beside.alt.startswith(alone.alt) and beside.alt.endswith("Of the test: " + eval_plots._means(tables[1]) + ".")


def test_on_a_phone_it_is_the_same_picture_with_larger_words(tables):
    wide, narrow = (eval_plots.plot_lengths(tables[0], control=tables[1], phone=phone) for phone in (False, True))
    assert points(narrow.axes[0]) == points(wide.axes[0]) and narrow.alt == wide.alt
    assert narrow.get_figwidth() < 0.5 * wide.get_figwidth()
    narrow.canvas.draw()
    labels = [t.get_window_extent() for t in narrow.axes[0].get_xticklabels()]
    assert not any(a.x1 > b.x1 or a.width == 0 for a, b in itertools.pairwise(labels))
    title = narrow.axes[0]._left_title.get_window_extent()
    assert title.x1 <= narrow.bbox.x1, "the title is cut off"


def test_a_figure_is_dark_ink_on_an_opaque_page_whatever_the_theme_is(tables):
    """A transparent figure cannot be read on a dark page; nor can one that an editor's dark theme drew, on a light one."""
    png = []
    for theme in ("default", "dark_background", {"figure.facecolor": (1, 1, 1, 0), "savefig.transparent": False}):
        with plt.style.context(theme):
            data, _ = eval_plots.plot_perplexity(
                [{"length": "micro", "replies": 3, "with": 2.0, "without": 3.0}]
            )._repr_mimebundle_()
            png.append(data["image/png"])
    assert png[0] == png[1] == png[2]
    pixels = matplotlib.image.imread(io.BytesIO(png[0]))
    assert (pixels[..., 3] == 1).all() and pixels[0, 0].tolist() == [1, 1, 1, 1]
    assert (pixels[..., :3].max(axis=-1) < 0.2).sum() > 500, "the words are dark"


def test_the_matrix_holds_shares(tables):
    figure = eval_plots.plot_class_matrix(tables[0])
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (10, 10) and list(image.sum(axis=1)) == pytest.approx([1] * 10)
    hit = sum(word_range("long")[0] + i <= word_range("long")[1] for i in range(20)) / 20
    assert image[LENGTHS.index("long")][LENGTHS.index("long")] == pytest.approx(hit)


def test_effects_separates_controls_by_shape_and_colour(tables):
    figure = eval_plots.plot_effects({"adapter": tables[0], "control": tables[1]})
    markers = [line.get_marker() for line in figure.axes[0].lines if line.get_marker() in "os"]
    assert markers == ["o", "s"] and "control +0.00" in figure.alt


def test_side_by_side_and_perplexity_draw_each_mean(tables):
    figure = eval_plots.plot_side_by_side(tables)
    heights = {round(y, 6) for _, y in points(figure.axes[0])}
    for t in tables:
        assert {round(r["mean"], 6) for r in t.rows} <= heights
    rows = [
        {"length": "micro", "replies": 3, "with": 2.0, "without": 3.0},
        {"length": "tiny", "replies": 2, "with": 2.5, "without": 2.6},
    ]
    figure = eval_plots.plot_perplexity(rows)
    assert {y for _, y in points(figure.axes[0])} == {2.0, 3.0, 2.5, 2.6} and "micro 3.00 to 2.00" in figure.alt
    assert "short, medium, long" in figure.axes[0].get_xlabel()


def test_a_perplexity_of_few_replies_is_hollow_and_what_is_left_out_is_named():
    rows = [{"length": name, "replies": n, "with": 2.0, "without": 3.0} for name, n in zip(LENGTHS, range(5, 15), strict=True)]
    (axes,) = eval_plots.plot_perplexity(rows).axes
    hollow = {tuple(p) for line in axes.lines if line.get_markerfacecolor() == "white" for p in line.get_xydata()}
    assert hollow == {(x, y) for x in range(5) for y in (2.0, 3.0)}
    assert axes.get_xlabel() == "" and "fewer than 10" in axes.get_legend().get_title().get_text()
    (axes,) = eval_plots.plot_perplexity(rows[5:9]).axes
    assert axes.get_xlabel().endswith("micro, tiny, short, medium, long, unlimited")
    assert axes.get_legend().get_title().get_text() == ""


def test_growth_shows_loss_and_control_at_each_step(tables):
    found = [t.statistics for t in (tables[1], tables[0])]
    cases = zip((0, 50), (0.7, 0.5), found, strict=True)
    rows = [{"step": step, "held-out loss": {"all": loss}, "statistics": s} for step, loss, s in cases]
    figure = eval_plots.plot_growth(rows)
    left, right = figure.axes
    assert points(left) == [(0, 0.7), (1, 0.5)] and "base model" in left.get_xlabel()
    assert {(x, s[key]) for x, s in enumerate(found) for key in ("spearman", "in_class")} <= set(points(right))
    assert "0 0.700, +0.00" in figure.alt
    assert eval_plots.plot_growth(rows[1:]).axes[0].get_xlabel() == "training step"
