"""Figures of a training run: they read log rows and audit tables."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from helpers.lengths import LENGTHS
from helpers.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW, finish, new_figure

Rows = Sequence[dict[str, Any]]
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85}  # keeps a text readable on a hatch

# --------------------------------------------------------------------------------------------- 4 bit (notebook 04)


def plot_nf4(levels: Sequence[float], normal: Sequence[float], counts: Sequence[int]) -> Figure:
    """The 16 NF4 levels with the density they were made for, and how often each code occurs in real weights."""
    import math

    figure, (left, right) = new_figure(10, 3.0, columns=2)
    xs = [i / 100 for i in range(-100, 101)]
    left.plot(xs, [math.exp(-0.5 * (2.7 * x) ** 2) for x in xs], color=SKY, label="normal density (scaled)")
    left.vlines(levels, 0, 1, color=BLUE, lw=1.2)
    left.plot(levels, [1.0] * len(levels), "o", color=BLUE, ms=4, label="NF4 levels")
    left.set(xlabel="weight / largest |weight| of its block of 64", ylabel="density", title="16 levels, dense where weights are")
    left.legend(loc="lower center", fontsize=8, frameon=True, framealpha=0.95)
    total = sum(counts)
    right.bar(range(16), [c / total for c in counts], color=BLUE, label="expert weights")
    right.plot(range(16), normal, "D", color=ORANGE, ms=4, label="normal numbers")
    right.set(xlabel="code", ylabel="share of weights", title="How often each code is used", xticks=range(0, 16, 3))
    right.legend(fontsize=8)
    return finish(figure, "NF4 levels are dense around 0; real expert weights use the 16 codes as normal numbers do.")


def plot_qlora_layer(table: Rows, experts: int = 8, shown: int = 4) -> Figure:
    """What is trained and what is frozen in one layer; bits per weight by part from an audit table (`Audit.table`)."""
    figure, (left, right) = new_figure(10, 3.4, columns=2, width_ratios=(1.5, 1))
    bits = {row["part"]: row["bits/weight"] for row in table if row["part"] != "all"}
    packed = {row["part"]: row["4-bit"] > 0.99 for row in table}

    def weight(x: float, y: float, width: float, text: str, part: str) -> None:
        left.add_patch(Rectangle((x, y), width, 0.18, facecolor=SKY, hatch="//" if packed[part] else "", edgecolor="white"))
        left.text(x + width / 2, y + 0.09, text, ha="center", va="center", fontsize=8, bbox=LABEL)

    def lora(x: float, y: float) -> None:
        left.add_patch(Rectangle((x, y), 0.012, 0.18, facecolor=RED))
        left.add_patch(Rectangle((x + 0.016, y), 0.05, 0.03, facecolor=RED))

    for i, name in enumerate(("q", "k", "v", "o")):
        weight(0.25 * i, 0.78, 0.15, name, "attention")
        lora(0.25 * i + 0.16, 0.78)
    weight(0.0, 0.47, 0.15, "router", "router")
    left.text(0.2, 0.56, "decides which experts run; has the losses of notebook 3", va="center", fontsize=8)
    for i in range(shown):
        weight(0.25 * i, 0.16, 0.15, f"expert {i if i < shown - 1 else experts - 1}", "experts")
        lora(0.25 * i + 0.16, 0.16)
    left.text(0.25 * (shown - 1) - 0.05, 0.23, "…", fontsize=11)
    left.add_patch(Rectangle((0.0, 0.0), 0.012, 0.08, facecolor=RED))
    left.text(0.03, 0.02, "LoRA factors A and B: trained", fontsize=8)
    left.add_patch(Rectangle((0.4, 0.0), 0.03, 0.08, facecolor=SKY))
    left.text(0.44, 0.02, "plain: not quantised", fontsize=8)
    left.set(xlim=(-0.01, 1), ylim=(0, 1.0), title="One layer.  Hatched: frozen, NF4")
    left.axis("off")
    parts = list(bits)
    for y, part in enumerate(parts):
        hatch = "//" if packed[part] else ""
        right.barh(y, bits[part], color=RED if part == "adapters" else SKY, hatch=hatch, edgecolor="white")
        right.text(bits[part], y, f" {bits[part]:.1f}", va="center", fontsize=8)
    right.set(yticks=range(len(parts)), yticklabels=parts, xlabel="bits per weight (hatched: 4 bit)", title="In the recorded run")
    right.invert_yaxis()
    right.margins(x=0.15)
    right.grid(False, axis="y")
    said = ", ".join(f"{part} {value:.1f}" for part, value in bits.items())
    return finish(figure, f"Frozen 4-bit attention and experts with trained LoRA factors beside them; bits per weight: {said}.")


def plot_audit(tables: dict[str, Rows]) -> Figure:
    """Bytes by part, one bar a loading method. tables: name → `Audit.table`."""
    figure, axes = new_figure(9, 0.9 + 0.7 * len(tables))
    colours = {
        "experts": BLUE,
        "attention": ORANGE,
        "router": GREEN,
        "embeddings": SKY,
        "head": PURPLE,
        "norms": YELLOW,
        "adapters": RED,
    }
    labelled = set()
    for y, (_name, table) in enumerate(tables.items()):
        left = 0.0
        for row in table:
            if row["part"] == "all":
                continue
            part = row["part"]
            hatch = "//" if row["4-bit"] > 0.99 else ""
            axes.barh(
                y, row["MiB"], left=left, color=colours.get(part, BLACK), hatch=hatch, edgecolor="white",
                label=part if part not in labelled else None,
            )  # fmt: skip
            labelled.add(part)
            left += row["MiB"]
        axes.text(left, y, f" {left:.2f} MiB", va="center", fontsize=9)
    axes.set(yticks=range(len(tables)), yticklabels=list(tables), xlabel="MiB of weights (hatched: in 4 bit)")
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.legend(fontsize=8, ncols=3, loc="lower right")
    sizes = (f"{name}: {sum(r['MiB'] for r in t if r['part'] != 'all'):.2f} MiB of weights" for name, t in tables.items())
    experts = (next((r for r in t if r["part"] == "experts"), None) for t in tables.values())
    held = (f", {r['MiB']:.2f} of them experts ({r['4-bit']:.0%} in 4 bit)" if r else "" for r in experts)
    return finish(figure, "; ".join(a + b for a, b in zip(sizes, held, strict=True)) + ".")


# -------------------------------------------------------------------------------------------- training (notebook 04)


def plot_training(rows: Rows, title: str = "") -> Figure:
    """By step: loss with that on held-out stories, gradient norm and learning rate, routers; expert load; speed and memory.

    ValueError for a run without a row: one that was stopped before its first.
    """
    if not rows:
        raise ValueError("the log has no row yet: the run was stopped before its first one")
    steps = [r["step"] for r in rows]
    figure, grid = new_figure(12, 6.2, rows=2, columns=3)
    loss, rate, router, load, over_time, machine = grid.flat
    first = int(len(rows) > 10)  # the first row is one step on few stories: far off, it would press all others together
    loss.plot(steps[first:], [r["loss"] for r in rows[first:]], color=BLUE, marker="o", ms=3, label="training")
    if held := [r for r in rows if "held_out" in r]:
        loss.plot(
            [r["step"] for r in held], [r["held_out"]["all"] for r in held], color=ORANGE, marker="D", ls="--", label="held out"
        )
        loss.legend(fontsize=8)
    without = f", without step {steps[0]}" if first else ""
    loss.set(ylabel="nats per token", title=f"loss on replies{without} {title}".rstrip())
    rate.plot(steps, [r["grad_norm"] for r in rows], color=ORANGE, marker="s", ms=3, label="gradient norm")
    _beside(rate, steps, [r["learning_rate"] for r in rows], GREEN, "learning rate (right)")
    rate.set(ylabel="gradient norm", title="gradient norm and learning rate")
    router.plot(steps, [r["router/z"] for r in rows], color=RED, marker="^", ms=3, label="z-loss: mean logsumexp²")
    router.plot(steps, [r["router/entropy"] for r in rows], color=PURPLE, ls="-.", label="router entropy (nats)")
    router.plot(steps, [r["router/balance"] for r in rows], color=BLACK, ls=":", label="balancing loss (1 = even)")
    router.set(ylabel="value of each", title="routers", ylim=(0, 1.4 * router.get_ylim()[1]))
    router.legend(fontsize=8, loc="upper right")
    _heat(figure, load, rows[-1]["load"], f"load of each expert, step {steps[-1]}", "expert", "layer", "share of the assignments")
    busiest = [[max(layer) * len(layer) for layer in r["load"]] for r in rows]
    _heat(
        figure, over_time, list(zip(*busiest, strict=True)), "load of the busiest expert", "step", "layer", "times an even share"
    )
    for axes in grid.flat:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))  # numbers of four digits do not touch
    # One column a row of the log, however many steps lie between two of them.
    over_time.xaxis.set_major_formatter(lambda at, _: f"{steps[round(at)]}" if 0 <= round(at) < len(steps) else "")
    machine.plot(steps, [r["tokens_per_second"] for r in rows], color=BLUE, marker="o", ms=3, label="tokens per second")
    machine.set(xlabel="step", ylabel="tokens per second", title="speed and memory", ylim=(0, None))
    if all("memory_gib" in r for r in rows):
        _beside(machine, steps, [r["memory_gib"] for r in rows], RED, "memory, GiB (right)")
    text = f"Training run to step {steps[-1]}: loss {rows[0]['loss']:.2f} to {rows[-1]['loss']:.2f}"
    return finish(figure, f"{text}, with gradient norm, learning rate, router losses, expert load by layer, speed and memory.")


def _beside(axes, xs: Sequence[float], ys: Sequence[float], colour: str, label: str) -> None:
    """A second curve with its own scale at the right, and one legend for both in the room above them."""
    twin = axes.twinx()
    twin.plot(xs, ys, color=colour, ls="--", label=label)
    twin.set_ylabel(label.removesuffix(" (right)"))
    for scale in (axes, twin):
        scale.set_ylim(0, 1.4 * scale.get_ylim()[1])
    twin.grid(False)
    lines = axes.get_lines() + twin.get_lines()
    axes.legend(lines, [line.get_label() for line in lines], fontsize=8, loc="upper right")


def _heat(figure: Figure, axes, table, title: str, xlabel: str, ylabel: str, unit: str) -> None:
    image = axes.imshow(table, cmap="cividis", aspect="auto", vmin=0, interpolation="nearest")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(False)
    figure.colorbar(image, ax=axes).set_label(unit, fontsize=8)


class LiveTraining:
    """A progress function for `training.train`: one figure, redrawn in place, for at most `share` of the run's time.

    A redraw takes half a second or so, however long a step takes. So after each one it waits until the run has gone on long
    enough to have earned the next. `cost` is the share of the time since the first row that drawing has taken.
    """

    def __init__(self, share: float = 0.01, seconds: float = 5.0, clock=time.monotonic):
        self.share, self.seconds, self.clock = share, seconds, clock
        self.handle, self.begun = None, None
        self.spent = self.last = 0.0
        self.longest = 1.0  # a guess, until there is a measured one; too low, and the first one is never earned back
        self.drawn = 0

    @property
    def cost(self) -> float:
        return self.spent / max(self.clock() - self.begun, 1e-9) if self.begun is not None else 0.0

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        now = self.clock()
        if self.begun is None:
            self.begun = self.last = now
        earned = self.share * (now - self.begun) - self.spent
        if len(rows) < 2 or now - self.last < self.seconds or earned < self.longest:
            return
        self.draw(rows)
        self.last = self.clock()
        self.longest = max(self.longest, self.last - now)
        self.spent += self.last - now
        self.drawn += 1

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """The whole run, once it is over, in the place of what was drawn on the way. It is not part of `cost`."""
        if rows:
            self.draw(rows)

    def draw(self, rows: list[dict[str, Any]]) -> None:
        from IPython.display import display

        figure = plot_training(rows, f"({rows[-1]['step']}/{rows[-1]['of']})")
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)


def plot_router_pair(runs: dict[str, Rows]) -> Figure:
    """z-loss, router entropy and loss by step for runs that differ in one setting. runs: name → log rows."""
    figure, grid = new_figure(10, 3.2, columns=3)
    looks = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", ":"))
    for (name, rows), (colour, marker, line) in zip(runs.items(), looks, strict=False):
        steps = [r["step"] for r in rows]
        for axes, key in zip(grid.flat, ("router/z", "router/entropy", "loss"), strict=True):
            axes.plot(steps, [r[key] for r in rows], color=colour, marker=marker, ls=line, ms=4, label=name)
    for axes, label in zip(grid.flat, ("z-loss: mean logsumexp²", "router entropy (nats)", "loss (nats per token)"), strict=True):
        axes.set(xlabel="step", title=label)
    grid.flat[0].legend(fontsize=8)
    last = "; ".join(f"{name}: z {rows[-1]['router/z']:.2f}, loss {rows[-1]['loss']:.3f}" for name, rows in runs.items())
    return finish(figure, f"Router losses of runs with the same seed, at the end: {last}.")


def plot_spoilt(runs: dict[str, Rows]) -> Figure:
    """Training loss and held-out loss by step, of several runs, on a logarithmic axis. runs: name → log rows."""
    figure, (left, right) = new_figure(10, 3.2, columns=2)
    looks = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", ":"))
    ends = []
    for (name, rows), (colour, marker, line) in zip(runs.items(), looks, strict=True):
        held = [(r["step"], r["held_out"]["all"]) for r in rows if "held_out" in r]
        style = {"color": colour, "marker": marker, "ls": line, "ms": 4, "label": name}
        left.plot([r["step"] for r in rows], [r["loss"] for r in rows], **style)
        right.plot(*zip(*held, strict=True), **style)
        ends.append(f"{name}: training {rows[-1]['loss']:.2f}, held out {held[-1][1]:.2f}")
    for axes, title in ((left, "loss on the stories that are trained on"), (right, "loss on stories never seen")):
        axes.set(xlabel="step", ylabel="nats per token", title=title, yscale="log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[-1] in "25" else "")
    left.legend(fontsize=8)
    low, high = min(left.get_ylim()[0], right.get_ylim()[0]), max(left.get_ylim()[1], right.get_ylim()[1])
    for axes in (left, right):
        axes.set_ylim(low, high)
    return finish(figure, f"Training and held-out loss by step; at the end {'; '.join(ends)}.")


def plot_held_out(first: dict[str, float], last: dict[str, float]) -> Figure:
    """Loss on held-out stories by length class, before and after. first, last: `held_out` of two log rows."""
    names = [n for n in LENGTHS if n in first and n in last]
    figure, axes = new_figure(9, 3.0)
    places = range(len(names))
    axes.bar(
        [x - 0.2 for x in places], [first[n] for n in names], 0.4, color=SKY, edgecolor=BLACK, hatch="..", label="before training"
    )
    axes.bar([x + 0.2 for x in places], [last[n] for n in names], 0.4, color=BLUE, edgecolor=BLACK, label="after training")
    axes.set(xticks=list(places), ylabel="nats per token", title="loss on held-out replies by their length class")
    axes.set_xticklabels(names, rotation=20)
    axes.legend(fontsize=8)
    return finish(
        figure, f"Held-out loss by length class; over all replies {first['all']:.3f} before and {last['all']:.3f} after."
    )


def plot_step_profile(profile: dict[str, Any]) -> Figure:
    """Where a step's time and memory go. profile: of `step_profile.profile_step`."""
    figure, (time_axes, memory_axes) = new_figure(10, 3.2, columns=2)
    parts = profile["seconds"]
    total = sum(sum(p.values()) for p in parts.values())
    for (kind, colour, hatch), left in zip((("forward", SKY, ""), ("backward", BLUE, "//")), (None, "forward"), strict=True):
        offsets = [parts[p][left] / total if left else 0 for p in parts]
        axes_values = [parts[p][kind] / total for p in parts]
        time_axes.barh(list(parts), axes_values, left=offsets, color=colour, edgecolor=BLACK, hatch=hatch, label=kind)
    time_axes.invert_yaxis()
    time_axes.set(xlabel="share of the step's time", title=f"one step: {total:.2f} s for {profile['tokens']:,} tokens")
    time_axes.legend(fontsize=8)
    memory = profile["mib"]
    memory_axes.barh(list(memory), list(memory.values()), color=ORANGE, edgecolor=BLACK)
    for y, value in enumerate(memory.values()):
        memory_axes.text(value, y, f" {value:.1f}", va="center", fontsize=8)
    memory_axes.invert_yaxis()
    memory_axes.margins(x=0.15)
    memory_axes.set(xlabel="MiB", title="memory that is held")
    largest = max(parts, key=lambda p: sum(parts[p].values()))
    share = sum(parts[largest].values()) / total
    return finish(
        figure, f"Time of a training step by part; the largest share, {share:.0%}, is that of {largest}. Memory by what holds it."
    )


def plot_adapter_norms(norms: dict[str, float]) -> Figure:
    """Root mean square of each lora_B (zero at the start) by layer and part: how far each has moved."""
    cells: dict[str, dict[int, float]] = defaultdict(dict)
    for name, norm in norms.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if name.endswith(".lora_B") and layer:
            part = name.removesuffix(".lora_B").removesuffix(".weight").rpartition(".")[2]
            cells[("experts " if ".experts." in name else "") + part][int(layer[1])] = norm
    layers = sorted({n for row in cells.values() for n in row})
    table = [[cells[p].get(n, 0.0) for n in layers] for p in cells]
    figure, axes = new_figure(6.5, 0.9 + 0.4 * len(cells))
    image = axes.imshow(table, cmap="cividis", aspect="auto", vmin=0)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            axes.text(
                x, y, f"{value:.3f}", ha="center", va="center", color="white" if value < 0.6 * image.get_clim()[1] else BLACK
            )
    axes.set(xlabel="layer", xticks=range(len(layers)), yticks=range(len(cells)), yticklabels=list(cells))
    axes.set_title("root mean square of lora_B")
    axes.grid(False)
    figure.colorbar(image, ax=axes)
    return finish(
        figure, f"Root mean square of lora_B by part and layer: from {min(map(min, table)):.3f} to {max(map(max, table)):.3f}."
    )
