"""Thin widgets. Each is a few controls around a plain function of this module, which notebooks also call by itself, so that
the page shows its result without a kernel. Core ipywidgets classes only (the ones that versions 7 and 8 share); callbacks
set the value of an HTML box, so there are no output areas in which an error could hide.
"""

from __future__ import annotations

import html
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence

import ipywidgets

from helpers.lengths import LENGTHS, count_words, length_class
from helpers.prompts import CLOSING, CLOSING_SHORT, generation_prompt, generation_segments
from helpers.stories import PLACEHOLDERS, Message, Pair, Story, StoryError, clean
from helpers.tokens import IGNORED, Encoded, encode_segments

NO_MODIFIER = "(none)"


class Panel(ipywidgets.VBox):
    """A VBox with a readable text form for pages without a kernel."""

    def __repr__(self) -> str:
        return "(interactive panel: run this cell to use it; the output above is its static twin)"


def _live(controls: Sequence, render: Callable[[], str], rows: Sequence) -> Panel:
    """Controls above an HTML box that shows `render()` after every change."""
    box = ipywidgets.HTML()

    def refresh(_=None) -> None:
        style = "white-space:pre-wrap;line-height:1.35;max-height:32em;overflow-y:auto;margin:0;padding:.6em"
        box.value = f'<pre style="{style}">{html.escape(render())}</pre>'

    for control in controls:
        control.observe(refresh, names="value")
    refresh()
    return Panel([*rows, box])


def _row(*controls) -> ipywidgets.HBox:
    """Controls side by side, and below one another where the page is too narrow for that, as on a phone."""
    for control in controls:
        control.layout.max_width = "calc(100% - 4px)"  # less its margins
    return ipywidgets.HBox(controls, layout=ipywidgets.Layout(flex_flow="row wrap"))


def visible(text: str) -> str:
    """Text with every newline shown as ⏎ (and still broken there)."""
    return text.replace("\n", "⏎\n")


# ---------------------------------------------------------------------------------------------------- story browser


def story_page(story: Story, first: int = 0, count: int = 4, width: int = 100) -> str:
    """`count` turns of a story from turn `first` on, each with speaker, words and length class, as plain text."""
    turns = story.messages[first : first + count]
    lines = [f"{story.names.character} (character) and {story.names.user} (user), {len(story.messages)} turns"]
    if first == 0:
        lines += ["", *textwrap.wrap("Scenario: " + story.scenario, width)]
    for number, m in enumerate(turns, start=first + 1):
        length = f", {length_class(m.text)}" if m.speaker == "character" else ""
        words = count_words(m.text)
        lines += ["", f"[{number}] {story.name_of(m.speaker)} ({m.speaker}, {words} word{'s' if words != 1 else ''}{length})"]
        for paragraph in m.text.split("\n"):
            lines += textwrap.wrap(paragraph, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def story_browser(stories: Sequence[Story]) -> Panel:
    """Choose a story, move through its turns."""
    titles = [(f"{i + 1}. {s.names.character} and {s.names.user}", i) for i, s in enumerate(stories)]
    which = ipywidgets.Dropdown(options=titles, description="story")
    first = ipywidgets.IntSlider(min=1, max=len(stories[0].messages), description="from turn")
    count = ipywidgets.IntSlider(value=4, min=1, max=12, description="turns")

    def render() -> str:
        story = stories[which.value]
        first.max = len(story.messages)  # also pulls the value back into the story
        return story_page(story, first.value - 1, count.value)

    return _live((which, first, count), render, (_row(which), _row(first, count)))


# ---------------------------------------------------------------------------------------------------- prompt builder


# The two personas and the scenario that the builder begins with.
SETTING = (
    "<FIRST> keeps the lighthouse.",
    "<SECOND> sails the mail boat.",
    "<SECOND> knocks at the lighthouse in a storm.",
)


def prompt_preview(
    char: str,
    user: str,
    length: str | None,
    text: str,
    tokenizer=None,
    setting: Sequence[str] = SETTING,
    closing: str = CLOSING,
) -> str:
    """The generation prompt for one user message, newlines visible, with its token count; or what is wrong, in a sentence.

    `setting`: both personas and the scenario. <FIRST> and <SECOND> in them stand for the names, as in story files.
    """
    filled = list(setting)
    for placeholder, name in zip(PLACEHOLDERS, (char, user), strict=True):
        filled = [part.replace(placeholder, name) for part in filled]
    first, second, scenario = map(clean, filled)
    try:
        story = Story(Pair(char, user), Pair(first, second), scenario, (Message("user", clean(text)),))
    except StoryError as error:
        return f"cannot be formatted: {error}"
    shown = visible(generation_prompt(story, length, closing=closing))
    if tokenizer is not None:
        tokens = encode_segments(generation_segments(story, length, closing=closing), tokenizer)
        shown += f"\n\n[{len(tokens)} tokens]"
    return shown


def prompt_builder(tokenizer=None, char: str = "Ferro", user: str = "Ana", text: str = "Is anyone there?") -> Panel:
    """Names, length, setting, closing sentence and user text → the prompt, live."""
    names = ipywidgets.Text(value=char, description="character"), ipywidgets.Text(value=user, description="user")
    length = ipywidgets.Dropdown(options=[NO_MODIFIER, *LENGTHS], value="medium", description="length")
    closing = ipywidgets.Dropdown(options=[("the card's", CLOSING), ("short", CLOSING_SHORT)], description="closing")
    described = ("persona 1", "persona 2", "scenario")
    setting = [ipywidgets.Textarea(value=v, description=d, rows=2) for d, v in zip(described, SETTING, strict=True)]
    said = ipywidgets.Textarea(value=text, description="user text", rows=2)

    def render() -> str:
        chosen = None if length.value == NO_MODIFIER else length.value
        parts = [part.value for part in setting]
        return prompt_preview(names[0].value, names[1].value, chosen, said.value, tokenizer, parts, closing.value)

    rows = (_row(*names), _row(length, closing), _row(*setting[:2]), _row(setting[2], said))
    return _live((*names, length, closing, *setting, said), render, rows)


# -------------------------------------------------------------------------------------------------------- token view


def token_pieces(encoded: Encoded, tokenizer) -> list[tuple[str, bool]]:
    """(text, trained) for each token. A token that ends inside a character is shown together with the next one."""
    pieces, done = [], 0
    decoded = ""
    for i in range(len(encoded)):
        whole = tokenizer.decode(encoded.input_ids[: i + 1], skip_special_tokens=False)
        if whole.endswith("\ufffd") and i + 1 < len(encoded):
            continue
        pieces.append((whole[len(decoded) :], any(label != IGNORED for label in encoded.labels[done : i + 1])))
        decoded, done = whole, i + 1
    return pieces


def token_text(pieces: Sequence[tuple[str, bool]]) -> str:
    """Tokens as plain text: `|` between them, runs of trained tokens in ⟦ ⟧."""
    out, inside = [], False
    for text, trained in pieces:
        out.append("⟧" * (inside and not trained) + ("⟦" if trained and not inside else "|" * bool(out)) + visible(text))
        inside = trained
    return "".join(out) + "⟧" * inside


def token_html(pieces: Sequence[tuple[str, bool]]) -> str:
    """Tokens as HTML: trained ones are coloured and underlined, the others grey; shades alternate to show the borders."""
    spans = []
    for i, (text, trained) in enumerate(pieces):
        shown = html.escape(text).replace("\n", "⏎<br>")
        if trained:
            back = ("#9ecae9", "#c9e3f5")[i % 2]
            spans.append(f'<u style="background:{back};color:#00304d;text-decoration-thickness:2px">{shown}</u>')
        else:
            back = ("#f0f0f0", "#e2e2e2")[i % 2]
            spans.append(f'<span style="background:{back};color:#555">{shown}</span>')
    return f'<div style="font-family:monospace;line-height:1.7;white-space:pre-wrap">{"".join(spans)}</div>'


# -------------------------------------------------------------------------------------------------- router playground


def router_playground(scale: float = 1.0, experts: int = 8, shift: float = 0.0, dtype: str = "bfloat16") -> dict:
    """One token's router: logits as they should be and as `dtype` stores them, and what follows from the stored ones.

    The logits are evenly spread quantiles of a normal distribution, the largest first, times `scale`, plus `shift`.
    Returns exact, stored, softmax (of the exact ones), routed (softmax of the stored ones) and gradient, each (E,) in fp64,
    and the numbers entropy, logsumexp and z of the stored ones.
    """
    import torch

    normal = statistics.NormalDist()
    exact = torch.tensor([normal.inv_cdf(1 - (i + 0.5) / experts) for i in range(experts)], dtype=torch.float64) * scale + shift
    stored = exact.to(getattr(torch, dtype)).double()
    routed, lse = stored.softmax(-1), torch.logsumexp(stored, -1)
    numbers = {"entropy": torch.special.entr(routed).sum(), "logsumexp": lse, "z": lse.square()}
    vectors = {"exact": exact, "stored": stored, "softmax": exact.softmax(-1), "routed": routed, "gradient": 2 * lse * routed}
    return vectors | {name: value.item() for name, value in numbers.items()}


def router_playground_page(scale: float = 1.0, experts: int = 8, shift: float = 0.0, dtype: str = "bfloat16") -> str:
    """`router_playground` as a table of at most eight experts, and the numbers below it."""
    r = router_playground(scale, experts, shift, dtype)
    sign = "-" if shift < 0 else "+"
    lines = [f"one token, {experts} experts: logits x {scale:g} {sign} {abs(shift):g}, stored in {dtype}", ""]
    lines += ["expert       exact      stored   softmax   after rounding           z-loss gradient"]
    for e in range(experts):
        if experts > 8 and 6 <= e < experts - 1:
            lines += ["   ..."] * (e == 6)
            continue
        exact, stored, softmax, routed, gradient = (r[k][e] for k in ("exact", "stored", "softmax", "routed", "gradient"))
        bar = "█" * round(16 * routed.item())
        lines += [f"{e:6}{exact:12.4f}{stored:12.4f}{softmax:10.4f}{routed:10.4f} {bar:<16}{gradient:14.4f}"]
    logit, share = ((r[a] - r[b]).abs().max() for a, b in (("exact", "stored"), ("softmax", "routed")))
    distinct = len(r["stored"].unique())
    lines += ["", f"rounding     a logit is off by up to {logit:.2g}, a share by {share:.2g}; different logits left: {distinct}"]
    lines += [f"entropy      {r['entropy']:.4f} nats (all experts alike: ln {experts} = {math.log(experts):.4f})"]
    lines += [f"z-loss       {r['z']:.4f} = the square of the logsumexp, {r['logsumexp']:.4f}"]
    largest = max(r["gradient"].tolist(), key=abs)
    lines += [f"its gradient {largest:.4f} at the largest, {r['gradient'].sum():.4f} in all = 2 x logsumexp"]
    return "\n".join(lines)


def router_playground_panel() -> Panel:
    """Scale and shift of the logits, number of experts and precision → the page, live."""
    scale = ipywidgets.FloatLogSlider(value=1, base=2, min=-3, max=7, step=1, description="logits x")
    shift = ipywidgets.FloatSlider(value=0, min=-32, max=160, step=0.5, description="plus")
    experts = ipywidgets.Dropdown(options=[2, 4, 8, 16, 64, 128], value=8, description="experts")
    dtype = ipywidgets.Dropdown(options=["bfloat16", "float16", "float32"], description="stored in")
    controls = (scale, experts, shift, dtype)
    rows = (_row(scale, shift), _row(experts, dtype))
    return _live(controls, lambda: router_playground_page(*(c.value for c in controls)), rows)


# -------------------------------------------------------------------------------------------------------- NF4 explorer

NF4_SHAPES = ("normal", "uniform", "heavy tails")


def nf4_explorer(outlier: float = 0.0, blocksize: int = 64, shape: str = "normal", double_quant: bool = True) -> dict:
    """What NF4 does to 4,096 random weights of standard deviation 1, the first of which is `outlier` (0: left as drawn).

    `levels` (16) and `shares` (16): how often each is used; `bits` a weight, with scales; `scale` of the first block; `zeros`:
    share of its other weights that became 0; `error`, `error_there` and `error_elsewhere`: root mean square error of all
    weights, of those other weights of the first block, and of the other blocks.
    """
    import bitsandbytes.functional as bnbf
    import torch

    g = torch.Generator().manual_seed(0)
    weights = torch.randn(4096, generator=g)
    if shape == "uniform":
        weights = (torch.rand(4096, generator=g) - 0.5) * math.sqrt(12)
    elif shape == "heavy tails":  # the product of two normal numbers: variance 1, kurtosis 9
        weights = weights * torch.randn(4096, generator=g)
    if outlier:
        weights[0] = outlier
    blocks = weights.view(-1, blocksize)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = bnbf.get_4bit_type("nf4", device="cpu")
    codes = (blocks / scales).unsqueeze(-1).sub(levels).abs().argmin(-1)
    if double_quant:
        mean = scales.mean()
        small, state = bnbf.quantize_blockwise((scales - mean).flatten(), blocksize=256)
        scales = (bnbf.dequantize_blockwise(small, state) + mean).view(-1, 1)
    values = levels[codes] * scales
    off = (values - blocks).square()
    return {
        "levels": levels.tolist(),
        "shares": (torch.bincount(codes.flatten(), minlength=16) / 4096).tolist(),
        "bits": 4 + (8 / blocksize + 32 / (blocksize * 256) if double_quant else 32 / blocksize),
        "scale": scales[0].item(),
        "zeros": (values[0, 1:] == 0).float().mean().item(),
        "error": off.mean().sqrt().item(),
        "error_there": off[0, 1:].mean().sqrt().item(),
        "error_elsewhere": off[1:].mean().sqrt().item(),
    }


def nf4_page(outlier: float = 0.0, blocksize: int = 64, shape: str = "normal", double_quant: bool = True) -> str:
    """`nf4_explorer` as a bar chart in text, and the numbers below it."""
    r = nf4_explorer(outlier, blocksize, shape, double_quant)
    first = f", the first set to {outlier:g}" if outlier else ""
    lines = [f"4,096 weights, {shape}, standard deviation 1{first}; blocks of {blocksize}", "", " level   share"]
    top = max(r["shares"])
    for level, share in zip(r["levels"], r["shares"], strict=True):
        lines.append(f"{level:+.3f}  {share:6.1%}  {'█' * round(40 * share / top)}")
    lines += [
        "",
        f"bits per weight         {r['bits']:.3f}   (bf16: 16)",
        f"error of all weights    {r['error']:.3f}   of their standard deviation",
        f"scale of block 1        {r['scale']:.2f}",
        f"error of its others     {r['error_there']:.3f}   {r['zeros']:.0%} of them became 0",
    ]
    return "\n".join(lines)


def nf4_panel() -> Panel:
    """Move an outlier through the first block, change the block size, the distribution, and how scales are stored."""
    outlier = ipywidgets.FloatSlider(value=0, min=0, max=40, step=1, description="outlier")
    blocksize = ipywidgets.Dropdown(options=[32, 64, 128, 256, 1024, 4096], value=64, description="block")
    shape = ipywidgets.Dropdown(options=NF4_SHAPES, description="weights")
    double = ipywidgets.Checkbox(value=True, description="double quantisation")
    controls = (outlier, blocksize, shape, double)
    rows = (_row(outlier, blocksize), _row(shape, double))
    return _live(controls, lambda: nf4_page(*(c.value for c in controls)), rows)
