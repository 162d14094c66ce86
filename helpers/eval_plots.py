"""Figures of the length experiment (notebook 5). They take length tables and rows, never models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from helpers.length_stats import word_class
from helpers.lengths import LENGTHS, word_range
from helpers.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, finish, new_figure

if TYPE_CHECKING:
    from helpers.evaluation import LengthTable

LOOKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (RED, "v"), (SKY, "P"), (BLACK, "X"))
FEW = 10  # replies of a class, below which its perplexity says little
TICKS, TOP = (1, 3, 10, 30, 100, 300), 420


def signed(value: float) -> str:
    """With two decimals, and never as minus zero."""
    return f"{round(value, 2) + 0.0:+.2f}"


def _word_axis(axes, conditions: Sequence[str | None]) -> None:
    """A logarithmic axis of words, a column for each condition, the classes' own ranges shaded."""
    known = [(x, word_range(name)) for x, name in enumerate(conditions) if name in LENGTHS]
    for x, (low, high) in known:
        label = "words of the class" if x == known[0][0] else None  # in the legend, once
        axes.fill_between([x - 0.46, x + 0.46], low - 0.5, (high or 320) + 0.5, color="#dddddd", zorder=0, lw=0, label=label)
    axes.set(yscale="log", ylabel="words in the reply (log scale)", xticks=range(len(conditions)), ylim=(0.6, TOP))
    axes.set_xticklabels([c or "(none)" for c in conditions], rotation=20, ha="right")
    axes.set_yticks(TICKS, [str(t) for t in TICKS])
    axes.set_yticks([], minor=True)
    axes.grid(False, axis="x")


def plot_lengths(table: LengthTable, control: LengthTable | None = None, phone: bool = False) -> Figure:
    """Every reply as a dot, quartiles as a box, the mean with its 95 % interval; shaded: what each class means.

    Of `control`, the mean as a line across the class's column, in a band that is its interval. `phone`: narrow, so that its
    words can be read on one.
    """
    figure, axes = new_figure(*(4.6, 4.2) if phone else (10, 4.4))
    conditions = table.conditions
    _word_axis(axes, conditions)
    if phone:
        axes.tick_params("x", rotation=60)
    for x, (c, row) in enumerate(zip(conditions, table.rows, strict=True)):
        chosen = table.of(c)
        places = [x - 0.22 + 0.3 * ((i * 0.618) % 1 - 0.5) for i in range(len(chosen))]
        for end, marker, colour in (("eos", "o", BLUE), ("stop", "o", PURPLE), ("limit", "^", RED)):
            dots = [(p, max(r["words"], 0.7)) for p, r in zip(places, chosen, strict=True) if r["end"] == end]
            if dots:
                axes.plot(*zip(*dots, strict=True), marker, color=colour, ms=2.6, alpha=0.35, mew=0)
        low, high = (TOP if row[k] is None else max(row[k], 0.7) for k in ("q25", "q75"))  # None: beyond what was cut off
        axes.fill_between([x + 0.04, x + 0.2], low, high, facecolor=SKY, edgecolor=BLUE, lw=1)
        if row["median"] is not None:
            axes.plot([x + 0.04, x + 0.2], [row["median"]] * 2, color=BLACK, lw=2)
        spread = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
        axes.errorbar(x + 0.32, row["mean"], spread, fmt="D", color=ORANGE, mec=BLACK, ms=5, capsize=3, ecolor=BLACK)
    natural = sorted(table.natural)
    if natural:
        middle = natural[len(natural) // 2]
        of_theirs = "their own replies' median" if phone else "median of the conversations' own replies"
        axes.axhline(middle, color=BLACK, ls=":", lw=1, label=of_theirs)
    what, signs = f"{table.label}, reply {table.reply + 1}", "boxes quartiles with median, diamonds means with 95 % interval"
    axes.set_title(f"{what}; diamonds: means, 95 % interval" if phone else f"{what}: dots replies, {signs}")
    text = f"Words of single replies by the length asked for, on a log axis. Means: {_means(table)}."
    if control is not None:
        for x, row in zip(map(conditions.index, control.conditions), control.rows, strict=True):  # as wide as the class
            ends, label = [x - 0.46, x + 0.46], f"{control.label}: mean, 95 % interval" if x == 0 else None
            axes.fill_between(ends, row["low"], row["high"], color=PURPLE, alpha=0.3, lw=0, zorder=0.5)
            axes.plot(ends, [row["mean"]] * 2, color=PURPLE, lw=2, zorder=0.6, label=label)
        text += f" Of the {control.label}: {_means(control)}."
    axes.legend(loc="upper left", fontsize=8 if phone else 9)
    return finish(figure, text)


def _means(table: LengthTable) -> str:
    return ", ".join(f"{r['length']} {r['mean']:.{0 if r['mean'] >= 10 else 1}f}" for r in table.rows)


def plot_class_matrix(table: LengthTable) -> Figure:
    """Share of replies of each asked class (rows) that fell into each class (columns)."""
    asked = [c for c in LENGTHS if c in table.conditions]
    shares = []
    for c in asked:
        got = [word_class(w) for w in table.words(c)]
        shares.append([got.count(k) / len(got) for k in range(len(LENGTHS))])
    figure, axes = new_figure(7.4, 4.4)
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(shares):
        for x, value in enumerate(row):
            if value >= 0.05:
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color="white" if value < 0.6 else BLACK)
    axes.set(xlabel="class of the reply", ylabel="class asked for", xticks=range(10), yticks=range(len(asked)))
    axes.set_yticklabels(asked)
    axes.set_xticklabels(LENGTHS, rotation=45, ha="right")
    axes.set_title(f"{table.label}: asked and obtained")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="share of replies", format=lambda v, _: f"{v:.0%}")
    return finish(
        figure, f"Heat map of asked against obtained class, {table.label}: {table.statistics['in_class']:.0%} on the diagonal."
    )


def plot_side_by_side(tables: Sequence[LengthTable], title: str = "Early and deep in the conversation") -> Figure:
    """Mean words with 95 % intervals by asked length, one colour and marker a table."""
    figure, axes = new_figure(10, 4.0)
    conditions = tables[0].conditions
    _word_axis(axes, conditions)
    width = 0.7 / len(tables)
    for k, (table, (colour, marker)) in enumerate(zip(tables, LOOKS, strict=False)):
        xs = [x + (k - (len(tables) - 1) / 2) * width for x in range(len(conditions))]
        rows = [next((r for r in table.rows if r["length"] == (c or "(none)")), None) for c in conditions]
        points = [(x, r) for x, r in zip(xs, rows, strict=True) if r]
        means = [max(r["mean"], 0.7) for _, r in points]
        spread = [[r["mean"] - r["low"] for _, r in points], [r["high"] - r["mean"] for _, r in points]]
        axes.errorbar(
            [x for x, _ in points],
            means,
            spread,
            fmt=marker,
            color=colour,
            ms=6,
            mec=BLACK,
            mew=0.5,
            capsize=2,
            label=table.label,
        )
    axes.set_title(f"{title}: mean words with 95 % intervals; shaded: the classes' ranges")
    axes.legend(fontsize=8, loc="upper left")
    text = "; ".join(f"{t.label} {signed(t.statistics['spearman'])}" for t in tables)
    return finish(figure, f"Mean words by asked length with intervals. Spearman over single replies: {text}.")


def plot_effects(tables: Mapping[str, LengthTable], limit: float = 0.1) -> Figure:
    """The effect size of each table: Spearman over single replies with its 95 % interval; the band is what a control may show."""
    figure, axes = new_figure(8.5, 0.9 + 0.36 * len(tables))
    axes.axvspan(-limit, limit, color="#dddddd", lw=0, label=f"|Spearman| up to {limit}")
    for y, (name, table) in enumerate(tables.items()):
        s = table.statistics
        clear = s["spearman_low"] > limit
        spread = [[s["spearman"] - s["spearman_low"]], [s["spearman_high"] - s["spearman"]]]
        axes.errorbar(s["spearman"], y, xerr=spread, fmt="o" if clear else "s", color=BLUE if clear else ORANGE, capsize=3)
        axes.text(1.07, y, f"{signed(s['spearman'])}   {s['within_one']:.0%} within one", va="center", fontsize=9)
        assert not math.isnan(s["spearman"]), name
    axes.set(
        yticks=range(len(tables)),
        yticklabels=list(tables),
        xlim=(-0.3, 1.04),
        xlabel="Spearman: asked class and words of a reply",
    )
    axes.set_ylim(len(tables) - 0.5, -0.5)
    axes.legend(loc="lower right", fontsize=8, frameon=True)
    axes.set_title("Effect of the modifier on single replies, with 95 % intervals over conversations")
    text = "; ".join(f"{n} {signed(t.statistics['spearman'])}" for n, t in tables.items())
    return finish(figure, f"Spearman correlations with intervals. {text}.")


def plot_perplexity(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity of the conversations' own replies by class, with their modifiers and without; few replies are hollow."""
    figure, axes = new_figure(8.5, 3.2)
    for kind, (colour, marker) in zip(("without", "with"), (LOOKS[1], LOOKS[0]), strict=True):
        values = [r[kind] for r in rows]
        axes.plot(values, marker + "-", color=colour, label=f"{kind} modifiers")
        few = [(x, v) for x, (v, r) in enumerate(zip(values, rows, strict=True)) if r["replies"] < FEW]
        if few:
            axes.plot(*zip(*few, strict=True), marker, color=colour, mfc="white")
    axes.set_xticks(range(len(rows)), [f"{r['length']}\nn = {r['replies']}" for r in rows], fontsize=8)
    axes.set(ylabel="perplexity", title="Held-out replies, with their modifiers and without")
    axes.legend(title=f"hollow: fewer than {FEW} replies" if any(r["replies"] < FEW for r in rows) else None)
    missing = [name for name in LENGTHS if name not in {r["length"] for r in rows}]
    if missing:
        axes.set_xlabel(f"left out, because no reply of these conversations is of it: {', '.join(missing)}", fontsize=9)
    gains = ", ".join(f"{r['length']} {r['without']:.2f} to {r['with']:.2f}" for r in rows)
    return finish(figure, f"Perplexity of held-out replies without and with their modifier: {gains}.")


def plot_growth(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A run at several of its steps: held-out loss on the left, on the right what its replies do. Steps are evenly spaced."""
    figure, (left, right) = new_figure(10, 3.6, 1, 2)
    xs, steps = range(len(rows)), [f"{r['step']:,}" for r in rows]
    loss, found = [r["held-out loss"]["all"] for r in rows], [r["statistics"] for r in rows]
    left.plot(xs, loss, "o-", color=BLACK)
    left.set(title="Held-out loss", ylabel="nats per token")
    rho = [s["spearman"] for s in found]
    spread = [[r - s["spearman_low"] for r, s in zip(rho, found, strict=True)]]
    spread += [[s["spearman_high"] - r for r, s in zip(rho, found, strict=True)]]
    right.errorbar(xs, rho, spread, fmt="o-", color=BLUE, capsize=3, label="Spearman, 95 % interval")
    right.plot(xs, [s["in_class"] for s in found], "s--", color=ORANGE, label="share in the class asked for")
    right.set(title="Control of the length", ylim=(-0.15, 1.05))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.set_xticks(xs, steps)
        axes.set_xlabel("training step (0: the base model)" if rows[0]["step"] == 0 else "training step")
    each = zip(rows, loss, found, strict=True)
    text = "; ".join(f"{r['step']} {x:.3f}, {signed(s['spearman'])}, {s['in_class']:.0%}" for r, x, s in each)
    return finish(figure, f"Held-out loss, Spearman and share in class by training step: {text}.")
