"""All figures of the course. They take results (tables, dataclasses, log rows), never models.

Every function draws one figure, returns it, and gives it a text alternative (`figure.alt`). Colours are Okabe and Ito's,
which remain distinct with every kind of colour vision; a second cue (marker, hatch, label) always goes with them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
)
INK = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE = {
    # Dark ink on an opaque page, whatever the editor's theme has set: a transparent figure cannot be read on a dark page.
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "white"),
    **dict.fromkeys(INK, BLACK),
    "grid.color": "#b0b0b0",
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


class Picture(Figure):
    """A figure that hands a notebook its text alternative: as alt text of the image, and where images cannot be shown."""

    alt = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        from IPython.core.pylabtools import print_figure

        png = print_figure(self, "png", bbox_inches="tight", dpi=self.dpi)
        return {"image/png": png, "text/plain": self.alt or repr(self)}, {"image/png": {"alt": self.alt}}


def new_figure(width: float = 8.0, height: float = 3.4, rows: int = 1, columns: int = 1, **kwargs):
    """(figure, axes) in the course's style, which stays set: legends and titles are styled when they are drawn."""
    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(width, height), FigureClass=Picture, **kwargs)


def finish(figure: Figure, alt: str) -> Figure:
    """Attach the text alternative and close the figure for pyplot, so that a notebook shows it once, as the cell's value."""
    figure.alt = alt
    figure.canvas.manager.set_window_title(alt) if figure.canvas.manager else None
    plt.close(figure)
    return figure


# ------------------------------------------------------------------------------- data and prompts (notebooks 01 and 02)


def _per_doubling(words: Sequence[int], edges: Sequence[int]) -> tuple[list[float], list[float]]:
    """Histogram over whole numbers: (edges half a word lower, count per doubling of the word count in each bin)."""
    shifted = [e - 0.5 for e in edges]
    heights = []
    for low, high in itertools.pairwise(shifted):
        heights.append(sum(low < w < high for w in words) / math.log2(high / low))
    return shifted, heights


def plot_word_counts(words: dict[str, Sequence[int]]) -> Figure:
    """Words per message of each speaker: on a linear axis, and on a logarithmic one with the log-normal fits."""
    figure, (left, right) = new_figure(9.0, 3.4, columns=2)
    edges = [1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 57, 80, 113, 160, 226, 320]
    bins = list(range(0, 301, 10))
    looks = ((BLUE, "", "-"), (ORANGE, "///", "--"))
    for (name, counts), (colour, hatch, line) in zip(words.items(), looks, strict=False):
        n = len(counts)
        style = dict(facecolor=colour, edgecolor=colour, alpha=0.4, hatch=hatch, label=name)
        left.hist(counts, bins, weights=[100 / n] * n, **style)
        shifted, heights = _per_doubling(counts, edges)
        right.stairs([100 * h / n for h in heights], shifted, fill=True, **style)
        logs = [math.log(w) for w in counts]
        normal = statistics.NormalDist(statistics.mean(logs), statistics.pstdev(logs))
        xs = [math.exp(k / 20) for k in range(-10, 120)]
        right.plot(
            xs, [100 * math.log(2) * normal.pdf(math.log(x)) for x in xs], line, color=colour, lw=2, label=f"{name}, log-normal"
        )
    left.set(title="The same messages on a linear axis …", xlabel="words in a message", ylabel="% of the messages (per 10 words)")
    right.set(
        title="… and on a logarithmic one", xlabel="words in a message (log scale)", ylabel="% of the messages (per doubling)"
    )
    right.set(xscale="log", xlim=(0.7, 400))
    right.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    right.set_xticks([], minor=True)
    left.legend(frameon=False)
    right.legend(fontsize=8, frameon=False)
    return finish(figure, f"Histograms of words per message for {' and '.join(words)}: long right tails on a linear axis, "
                          "bells on a logarithmic one, each with its log-normal curve.")  # fmt: skip


def plot_length_classes(words: Sequence[int], bounds: Sequence[int], names: Sequence[str]) -> Figure:
    """Words per reply on a logarithmic axis, cut into the classes, with the log-normal curve of the same median and spread."""
    figure, axes = new_figure(9.0, 3.6)
    ends = [1, *bounds, max(2 * bounds[-1], max(words) + 1)]
    edges = sorted({round(math.sqrt(a * b)) for a, b in itertools.pairwise(ends)} | set(ends))
    shifted, heights = _per_doubling(words, edges)
    top = max(heights) * 1.4
    for i, (low, high) in enumerate(itertools.pairwise(e - 0.5 for e in ends)):
        inside = [(h, e) for h, *e in zip(heights, shifted, shifted[1:], strict=False) if low <= e[0] < high]
        corners = [e[0] for _, e in inside] + [high]
        colour, hatch = ((SKY, ""), (BLUE, "..."))[i % 2]
        axes.stairs([h for h, _ in inside], corners, fill=True, facecolor=colour, alpha=0.75, hatch=hatch, edgecolor="white")
        axes.text(math.sqrt(low * high), top * 0.98, names[i], rotation=90, ha="center", va="top", fontsize=9)
        if i:
            axes.axvline(low, color=BLACK, lw=1, ls=":")
    logs = [math.log(w) for w in words]
    normal = statistics.NormalDist(statistics.fmean(logs), statistics.pstdev(logs))
    xs = [0.5 * (2 * ends[-1]) ** (k / 200) for k in range(201)]
    axes.plot(xs, [len(words) * math.log(2) * normal.pdf(math.log(x)) for x in xs], color=RED, lw=2)
    axes.set(
        xscale="log",
        xlim=(0.5, ends[-1]),
        ylim=(0, top),
        xlabel="words in a reply (log scale); ticks: first word count of each class",
    )
    axes.set(ylabel="replies per doubling of the words")
    axes.set_title("The ten length classes over the character's replies (the area of a bar counts); line: log-normal")
    axes.set_xticks([1, *bounds], [str(b) for b in (1, *bounds)])
    axes.set_xticks([], minor=True)
    axes.grid(False, axis="x")
    return finish(
        figure,
        f"Histogram of reply lengths in words with the bounds {', '.join(map(str, bounds))} between ten classes, "
        "and the log-normal curve with the replies' own median and spread.",
    )


def plot_class_shares(shares: dict[str, Sequence[float]], names: Sequence[str]) -> Figure:
    """Share of replies in each class, one bar per data set."""
    figure, axes = new_figure(8.5, 3.2)
    width = 0.8 / len(shares)
    looks = itertools.cycle(((BLUE, ""), (ORANGE, "///"), (GREEN, "..."), (PURPLE, "xxx")))
    for k, ((label, values), (colour, hatch)) in enumerate(zip(shares.items(), looks, strict=False)):
        places = [i - 0.4 + width * (k + 0.5) for i in range(len(names))]
        axes.bar(places, [100 * v for v in values], width, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.axhline(100 / len(names), color=BLACK, lw=1, ls="--", label="even share")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(ylabel="% of the replies", xlabel="length class", title="Replies per length class")
    axes.grid(False, axis="x")
    axes.set_ylim(0, 100 * 1.22 * max(map(max, shares.values())))
    axes.legend(loc="upper right", ncols=1 + len(shares), frameon=False)
    said = []
    for label, values in shares.items():
        (least, rarest), (most, commonest) = (pick(zip(values, names, strict=True)) for pick in (min, max))
        said.append(f"{label}: from {least:.0%} ({rarest}) to {most:.0%} ({commonest})")
    return finish(figure, f"Share of the replies in each of {len(names)} length classes. {'; '.join(said)}.")


def plot_story_tokens(tokens: dict[str, Sequence[int]], contexts: Sequence[int]) -> Figure:
    """Each story as a mark at its number of tokens; the contexts as lines."""
    figure, axes = new_figure(9.0, 1.5 + 0.75 * len(tokens))
    looks = ((BLUE, "o"), (GREEN, "D"), (ORANGE, "x"))
    for row, ((label, counts), (colour, marker)) in enumerate(zip(tokens.items(), looks, strict=False)):
        heights = [row + 0.25 * (2 * (0.618 * i % 1) - 1) for i in range(len(counts))]  # spread, the same every time
        axes.scatter(counts, heights, s=28, color=colour, marker=marker, alpha=0.7, label=label)
    for context in contexts:
        axes.axvline(context, color=RED, ls="--", lw=1.3)
        axes.text(context, len(tokens) - 0.42, f"{round(context / 1000)}k ", ha="right", va="top", color=RED)
    axes.set(
        xscale="log",
        ylim=(-0.6, len(tokens) - 0.4),
        xlabel="tokens in a story (log scale); dashed: contexts. Height within a band means nothing",
    )
    axes.set(title="Stories against the context: what stands right of a line does not fit into it")
    axes.set_yticks(range(len(tokens)), list(tokens))
    axes.set_xticks([128, 256, 512, 1024, 2048, 4096, 8192], ["128", "256", "512", "1,024", "2,048", "4,096", "8,192"])
    axes.set_xticks([], minor=True)
    axes.grid(False, axis="y")
    longer = (
        f"{label}: " + ", ".join(f"{sum(n > c for n in counts) / len(counts):.0%} beyond {c:,}" for c in contexts)
        for label, counts in tokens.items()
    )
    return finish(figure, f"Tokens per story against the contexts. {'; '.join(longer)}.")


def plot_prompt(pieces: Sequence, width: int = 128, lines: int = 3) -> Figure:
    """A formatted story as one band for each of its pieces (`prompts.segments`): what is only read, and what is trained."""
    bands = []
    for piece in pieces:
        wrapped = [part for line in piece.text.strip().splitlines() for part in textwrap.wrap(line, width) or [""]]
        if len(wrapped) > lines:
            wrapped = [*wrapped[: lines - 1], f"… ({len(piece.text):,} characters in all)"]
        bands.append((wrapped, piece))
    figure, axes = new_figure(9.0, 0.5 + sum(0.22 * len(wrapped) + 0.14 for wrapped, _ in bands))
    top = 0.0
    for wrapped, piece in bands:
        height = len(wrapped) + 0.6
        look = dict(facecolor=SKY, hatch="//", alpha=0.35) if piece.trained else dict(facecolor="#eeeeee")
        axes.add_patch(Rectangle((0, top), 1, height, edgecolor="white", lw=2, **look))
        box = dict(facecolor="white", edgecolor="none", pad=1.5, alpha=0.85) if piece.trained else None
        text = "\n".join(wrapped).replace("$", r"\$")
        axes.text(0.01, top + height / 2, text, va="center", family="monospace", fontsize=7.5, bbox=box)
        axes.text(1.01, top + height / 2, "trained" if piece.trained else "read", va="center", fontsize=9)
        top += height
    axes.set(xlim=(0, 1), ylim=(top, 0), title="One story as the model meets it.  Hatched: the loss falls on these tokens")
    axes.axis("off")
    trained = sum(piece.trained for piece in pieces)
    return finish(
        figure, f"A prompt in {len(pieces)} pieces. Trained: {trained}, the replies of the character; all others are read."
    )


def plot_loss_masks(masks: dict[str, tuple[Sequence[bool], Sequence[int]]], context: int | None = None) -> Figure:
    """One strip per setting: which tokens carry loss, and (triangles) where the end-of-sequence tokens are.

    With `context`, a line stands where a row ends.
    """
    figure, axes = new_figure(9.0, 1.2 + 0.62 * len(masks))
    for row, (trained, ends) in enumerate(masks.values()):
        axes.broken_barh([(0, len(trained))], (row - 0.3, 0.6), facecolor="#dddddd", edgecolor="none")
        start = 0
        for value, run in itertools.groupby(trained):
            n = len(list(run))
            if value:
                axes.broken_barh([(start, n)], (row - 0.3, 0.6), facecolor=SKY, hatch="///", edgecolor=BLUE)
            start += n
        axes.plot([e + 0.5 for e in ends], [row + 0.4] * len(ends), "^", color=RED, ms=6, clip_on=False)
    if context is not None:
        axes.axvline(context, color=BLACK, ls="--", lw=1.3)
        axes.text(context, -0.57, " context", va="top", fontsize=9)
    axes.set_yticks(range(len(masks)), list(masks))
    axes.set(ylim=(len(masks) - 0.4, -0.6), xlim=(0, None), xlabel="token position in the sample")
    axes.set(title="Hatched: tokens with loss.  Grey: tokens without.  Triangles: end of sequence")
    axes.grid(False)
    counts = (f"{name}: {sum(trained)} of {len(trained)} tokens, {len(ends)} ends" for name, (trained, ends) in masks.items())
    return finish(figure, f"Strips that mark the tokens with loss, and the end-of-sequence tokens. {'; '.join(counts)}.")


def plot_packed_rows(rows: Sequence[Sequence[int]], context: int, names: Sequence[Sequence[str]]) -> Figure:
    """Rows of a packed batch, filled by samples; `rows` holds their lengths, `names` what to write on them."""
    figure, axes = new_figure(9.0, 1.2 + 0.34 * len(rows))
    looks = ((BLUE, ""), (ORANGE, "///"), (GREEN, "..."), (SKY, "\\\\\\"), (PURPLE, "xx"))
    for row, (lengths, labels) in enumerate(zip(rows, names, strict=True)):
        start = 0
        for k, (n, label) in enumerate(zip(lengths, labels, strict=True)):
            colour, hatch = looks[k % len(looks)]
            axes.barh(row, n, left=start, height=0.78, color=colour, hatch=hatch, edgecolor="white", lw=1.5)
            box = dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none", alpha=0.85)
            axes.text(start + n / 2, row, label, ha="center", va="center", fontsize=8, bbox=box)
            start += n
        axes.barh(row, context - start, left=start, height=0.78, color="#eeeeee", edgecolor="none")
    fill = sum(map(sum, rows)) / (context * len(rows))
    axes.axvline(context, color=BLACK, lw=1.5)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, context * 1.01), xlabel="tokens; grey: unused", ylabel="packed row")
    axes.set_yticks(range(len(rows)))
    axes.set(title=f"{sum(map(len, rows))} stories in {len(rows)} rows of {context:,} tokens, {fill:.1%} filled (numbers: story)")
    axes.grid(False)
    return finish(figure, f"{len(rows)} packed rows of {context} tokens, filled to {fill:.1%} by stories laid end to end.")


def plot_attention_blocks(position_ids: Sequence[int]) -> Figure:
    """Who may look at whom in a packed row: positions above, the block-diagonal causal pattern below."""
    documents, current = [], -1
    for p in position_ids:
        current += p == 0
        documents.append(current)
    n = len(documents)
    seen = [[float(documents[q] == documents[k] and k <= q) for k in range(n)] for q in range(n)]
    figure, (top, bottom) = new_figure(5.2, 5.6, rows=2, height_ratios=(1, 3), sharex=True)
    top.plot(range(n), position_ids, "o-", color=BLUE, ms=4, lw=1)
    top.set(ylabel="position", title="Positions restart with each story …")
    bottom.imshow(seen, cmap="Blues", vmin=0, vmax=1.4, aspect="auto", interpolation="nearest")
    bottom.set(
        xlabel="token that is looked at", ylabel="token that looks", title="… so attention stays inside it (blue: may look at)"
    )
    for d in range(current + 1):
        first, last = documents.index(d), n - 1 - documents[::-1].index(d)
        side = dict(x=first - 0.8, ha="right") if first > n / 2 else dict(x=last + 0.8, ha="left")
        bottom.text(y=(first + last) / 2, s=f"story {d}", va="center", fontsize=9, **side)
    bottom.grid(False)
    return finish(figure, "Restarting positions of a packed row, and the block-diagonal causal attention that follows from them.")


# ------------------------------------------------------------------------------------ routers and experts (notebook 03)

GOLD = "#B8A000"  # Okabe and Ito's yellow, darker: small marks of the other one vanish on a white page
EXPERT_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GOLD, BLACK)


def _box(axes, x: float, y: float, text: str, width: float, height: float = 0.12, fill: str = "white", **look) -> None:
    """A labelled box of a diagram, centred on (x, y)."""
    look = {"edgecolor": BLACK, "lw": 1.2} | look
    axes.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, facecolor=fill, **look))
    ground = dict(facecolor="white", edgecolor="none", pad=1.2, alpha=0.85) if look.get("hatch") else None
    axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=ground)


def _arrow(axes, start: tuple[float, float], end: tuple[float, float], **look) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": BLACK, "lw": 1.2, "shrinkA": 0, "shrinkB": 0} | look)


def plot_moe_layer(logits: Sequence[float], top_k: int = 2) -> Figure:
    """One token's way through a Mixture-of-Experts layer, computed from its router logits, and where the two losses look."""
    largest = max(logits)
    total = sum(math.exp(x - largest) for x in logits)
    shares = [math.exp(x - largest) / total for x in logits]
    chosen = sorted(sorted(range(len(logits)), key=lambda e: -shares[e])[:top_k])
    weights = {e: shares[e] / sum(shares[c] for c in chosen) for e in chosen}
    z = (largest + math.log(total)) ** 2
    figure, axes = new_figure(9.0, 3.9)
    _box(axes, 0.06, 0.5, "one token's\nhidden state", 0.12, 0.16)
    _box(axes, 0.22, 0.5, f"router\n{len(logits)} logits", 0.12, 0.16, SKY)
    _box(axes, 0.40, 0.5, f"softmax,\ntop {top_k}", 0.12, 0.16, SKY)
    _box(axes, 0.93, 0.5, "weighted\nsum", 0.12, 0.16)
    for start, end in ((0.12, 0.16), (0.28, 0.34)):
        _arrow(axes, (start, 0.5), (end, 0.5))
    for e, (logit, share) in enumerate(zip(logits, shares, strict=True)):
        y = 0.95 - 0.9 * e / max(1, len(logits) - 1)
        used = e in weights
        look = dict(fill=ORANGE, hatch="//") if used else dict(edgecolor="#999999")
        _box(axes, 0.65, y, f"expert {e}:  logit {logit:+.1f}, share {share:.0%}", 0.31, 0.09, **look)
        if used:
            _arrow(axes, (0.46, 0.5), (0.494, y))
            _arrow(axes, (0.806, y), (0.87, 0.5))
            axes.text(0.845, y, f"× {weights[e]:.2f}", fontsize=9, va="center")
    for x, title, what in ((0.22, "z-loss", f"logsumexp² = {z:.1f}"), (0.40, "balancing loss", "all experts used?")):
        _box(axes, x, 0.1, f"{title}\n{what}", 0.165, 0.16, edgecolor=RED, ls="--")
        _arrow(axes, (x, 0.42), (x, 0.18), color=RED, ls="--")
    axes.set(xlim=(-0.01, 1), ylim=(0, 1.02), title="A Mixture-of-Experts layer, and the two losses on its router (dashed)")
    axes.axis("off")
    said = " and ".join(f"expert {e} with weight {w:.2f}" for e, w in weights.items())
    return finish(figure, f"One token through a router and {len(logits)} experts: {said} run; the z-loss looks at the logits, "
                          "the balancing loss at the choices.")  # fmt: skip


def plot_router_plane(panels: dict[str, tuple[Sequence, Sequence, Sequence[int]]]) -> Figure:
    """Tokens in a plane, with a colour and a shape for their first expert, and the router's rows as numbered arrows.

    panels: title → (tokens (T, 2), router (E, 2), first choice (T,)).
    """
    figure, row = new_figure(8.0, 3.9, columns=len(panels), sharex=True, sharey=True)
    for axes, (title, (tokens, router, chosen)) in zip(row, panels.items(), strict=True):
        arrows = [(float(x), float(y)) for x, y in router]
        places = [k / 25 - 3.2 for k in range(161)]
        best = [[max(range(len(arrows)), key=lambda e: arrows[e][0] * x + arrows[e][1] * y) % 8 for x in places] for y in places]
        look = dict(cmap=ListedColormap(EXPERT_COLOURS), vmin=0, vmax=7, alpha=0.15, interpolation="nearest")
        axes.imshow(best, extent=(-3.2, 3.2, -3.2, 3.2), origin="lower", **look)
        for e, (colour, marker) in enumerate(zip(EXPERT_COLOURS, "osD^Pv*X", strict=True)):
            mine = [t for t, first in zip(tokens, chosen, strict=True) if int(first) % 8 == e]
            x, y = ([float(t[i]) for t in mine] for i in (0, 1))
            axes.scatter(x, y, c=colour, marker=marker, s=16, alpha=0.8, edgecolors=BLACK, linewidths=0.2)
        for e, (x, y) in enumerate(arrows):
            axes.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="->", color=BLACK, lw=0.9, mutation_scale=8, shrinkB=0))
            box = dict(boxstyle="circle,pad=0.2", facecolor="white", edgecolor=EXPERT_COLOURS[e % 8], lw=2)
            far = 2.85 / math.hypot(x, y)  # out where the tokens are few
            axes.text(far * x, far * y, str(e), ha="center", va="center", fontsize=9, bbox=box)
        axes.set(title=title, xlabel="hidden feature 0", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
        axes.grid(False)
    row[0].set_ylabel("hidden feature 1")
    return finish(figure, "Points in a plane; each goes to the expert whose router row, an arrow, it points along most. "
                          "The ground is tinted in its expert's colour.")  # fmt: skip


def plot_saturation(scales: Sequence[float], top: Sequence[float], entropy: Sequence[float], slope: Sequence[float]) -> Figure:
    """What happens to a softmax when its logits are multiplied: largest share, entropy, largest derivative."""
    figure, axes = new_figure(7.0, 3.2)
    axes.plot(scales, top, "o-", color=BLUE, ms=4, label="largest routing probability")
    axes.plot(scales, entropy, "s--", color=ORANGE, ms=4, label="entropy in nats")
    axes.plot(scales, slope, "^:", color=GREEN, ms=5, label="largest derivative dp/dx")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(scales), [f"{s:g}" for s in scales])
    axes.set(xlabel="the same eight logits, multiplied by …", ylabel="probability, slope; entropy in nats", ylim=(-0.05, None))
    axes.set(title="Large logits saturate the softmax")
    axes.legend()
    return finish(figure, "As logits grow, the largest probability goes to 1, the entropy and the derivative to 0.")


def plot_rounding(logits: Sequence[float], rounded: Sequence[float], shares: dict[str, Sequence[float]]) -> Figure:
    """Left: bf16 rounding of numbers around 128. Right: the softmax share of a logit that moves through them."""
    figure, (left, right) = new_figure(9.0, 3.4, columns=2)
    left.plot(logits, logits, color=BLACK, lw=1, ls=":", label="exact")
    left.plot(logits, rounded, color=RED, lw=1.8, label="bf16")
    left.axvline(128, color=BLACK, lw=0.8, alpha=0.4)
    left.set(xlabel="logit", ylabel="logit after rounding", title="bf16 has steps of 1 above 128")
    left.legend()
    looks = itertools.cycle((("#bbbbbb", "-", 5.0), (RED, "-", 1.8), (BLUE, "--", 1.4)))
    for (name, values), (colour, style, width) in zip(shares.items(), looks, strict=False):
        right.plot(logits, values, color=colour, ls=style, lw=width, label=name)
    right.set(xlabel="logit of one expert; ten others at 128", ylabel="its softmax share", title="… and the softmax jumps too")
    right.legend()
    return finish(figure, "bf16 rounds logits above 128 to whole numbers, so a softmax share moves in jumps; near 0 it does not.")


def plot_z_descent(logits: Sequence[Sequence[float]], logsumexp: Sequence[float], floor: float) -> Figure:
    """Gradient descent on the z-loss alone: each logit of one token, and their logsumexp, by step."""
    figure, axes = new_figure(7.5, 3.3)
    for e, path in enumerate(zip(*logits, strict=True)):
        axes.plot(path, color=BLUE, lw=1.1, alpha=0.75, label="the eight logits" if e == 0 else None)
    axes.plot(logsumexp, color=RED, lw=2.4, ls="--", label="logsumexp")
    axes.axhline(0, color=BLACK, lw=0.8)
    axes.axhline(floor, color=GREEN, lw=1.4, ls=":", label="−ln 8")
    axes.set(xlabel="step of gradient descent", ylabel="logit", title="The z-loss pulls the logsumexp to 0, not the logits")
    axes.legend(loc="upper right", ncols=3)
    return finish(figure, "Under the z-loss alone the logsumexp falls to 0 and the logits settle below 0, still apart.")


def plot_router_runs(runs: dict[str, dict[str, Sequence[dict[str, float]]]], quantities: dict[str, str]) -> Figure:
    """Log rows by step. runs: group → name of run → rows; quantities: key in the rows → axis title. A row of panels per group."""
    figure, grid = new_figure(11.0, 2.6 * len(runs), rows=len(runs), columns=len(quantities), sharex=True, sharey="col")
    looks = ((BLACK, ":"), (SKY, "--"), (RED, "-"), (GREEN, "-."))
    for line, (group, members) in zip(grid, runs.items(), strict=True):
        for axes, (key, title) in zip(line, quantities.items(), strict=True):
            for (name, rows), (colour, style) in zip(members.items(), looks, strict=False):
                axes.plot(range(1, len(rows) + 1), [r[key] for r in rows], color=colour, ls=style, lw=1.6, label=name)
            axes.set_title(title, fontsize=10)
        line[0].set_ylabel(group)
    for axes in grid[-1]:
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=4)
    grid[0][0].legend(fontsize=8)
    key, title = next(iter(quantities.items()))
    ends = (f"{group}, {name} {rows[-1][key]:.2f}" for group, members in runs.items() for name, rows in members.items())
    return finish(figure, f"By training step: {', '.join(quantities.values())}. The {title} ends at: {'; '.join(ends)}.")


def plot_expert_load(loads: dict[str, Sequence[Sequence[float]]]) -> Figure:
    """Heat maps of the share of assignments that each expert gets in each layer. loads: title → (L, E); 1 / E is balance."""
    tables = {title: [[float(v) for v in layer] for layer in load] for title, load in loads.items()}
    layers, experts = len(next(iter(tables.values()))), len(next(iter(tables.values()))[0])
    top = max(v for table in tables.values() for layer in table for v in layer)
    figure, row = new_figure(4.6 * len(tables), 1.1 + 0.45 * layers, columns=len(tables), squeeze=False, sharey=True)
    for axes, (title, table) in zip(row[0], tables.items(), strict=True):
        image = axes.imshow(table, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        for y, layer in enumerate(table):
            for x, value in enumerate(layer):
                ink = "white" if value < 0.5 * top else BLACK
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color=ink)
        axes.set(xlabel="expert", title=title, xticks=range(experts), yticks=range(layers))
        axes.grid(False)
    row[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=list(row[0]), label="share of assignments", format=lambda v, _: f"{v:.0%}")
    return finish(
        figure,
        f"Share of assignments of {experts} experts in {layers} layers, where balance is {1 / experts:.1%}. Busiest expert: "
        + "; ".join(f"{title} {max(v for layer in table for v in layer):.0%}" for title, table in tables.items())
        + ".",
    )


def plot_expert_boxes(layouts: dict[str, Sequence[tuple[int, int, int]]]) -> Figure:
    """Assignments sorted by expert, on the diagonal of rows against experts.

    layouts: title → (rows computed for an assignment, rows of padding, assignments dropped) of each expert.
    """
    figure, row = new_figure(3.1 * len(layouts), 3.9, columns=len(layouts), sharey=True)
    for axes, (title, boxes) in zip(row, layouts.items(), strict=True):
        top = 0
        for e, (used, padding, dropped) in enumerate(boxes):
            labels = ("assignments", "padding", "dropped") if e == 0 else (None,) * 3
            axes.bar(e, used, 0.94, bottom=top, color=BLUE, edgecolor="white", lw=0.5, label=labels[0])
            axes.bar(e, padding, 0.94, bottom=top + used, color="white", hatch="////", edgecolor=ORANGE, lw=0.5, label=labels[1])
            top += used + padding
            axes.plot([], [], "X", color=RED, label=labels[2])
            if dropped:
                axes.text(e, top + 12, f"\u2717 {dropped}", ha="center", va="top", color=RED, fontsize=8, fontweight="bold")
        axes.set(title=title, xlabel="expert", xticks=range(len(boxes)))
        axes.grid(False, axis="x")
    row[0].set(ylabel="row")
    row[0].invert_yaxis()
    row[0].legend(loc="lower left", fontsize=8)
    sums = (
        f"{title}: {sum(used + padding for used, padding, _ in boxes)} rows, {sum(lost for *_, lost in boxes)} dropped"
        for title, boxes in layouts.items()
    )
    return finish(figure, f"Rows that the experts compute, one box per expert down the diagonal. {'; '.join(sums)}.")
