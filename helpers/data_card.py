"""What is in a folder of stories, measured: `python -m helpers stories FOLDER`.

`describe` returns plain numbers, `render` a Markdown text. data_samples/README.md holds the text between two marks, and a test
checks that it is what the folder gives.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.data import labelled_stories
from helpers.files import write_text
from helpers.lengths import LENGTHS, count_words, length_class, word_range
from helpers.profiles import PROFILES
from helpers.schema import Story
from helpers.tokens import encode_all, pack

BEGIN, END = "<!-- statistics: begin -->", "<!-- statistics: end -->"
CONTEXTS = (2048, 4096, 10240)


def load_tokenizer(name: str):
    """A tokenizer by folder or Hub id; "mixtral" is Mixtral-8x7B's own, offline, from the package mistral-common."""
    from transformers import AutoTokenizer

    if name != "mixtral":
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            why = (str(error).splitlines() or [""])[0]
            raise ValueError(f"no tokenizer can be loaded from {name} ({why}): name a folder with one, or a Hub id") from error
    import importlib.util
    import json
    import shutil
    import tempfile

    package = importlib.util.find_spec("mistral_common")
    if package is None or importlib.util.find_spec("sentencepiece") is None:
        raise ValueError('the tokenizer "mixtral" needs two packages: pip install mistral-common sentencepiece')
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(Path(package.origin).parent / "data" / "tokenizer.model.v1", Path(folder) / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
        (Path(folder) / "tokenizer_config.json").write_text(
            json.dumps(settings | {"unk_token": "<unk>", "legacy": True}), encoding="utf-8"
        )
        return AutoTokenizer.from_pretrained(folder)


def describe(stories: Sequence[Story], tokenizer=None, tokenizer_name: str = "") -> dict[str, Any]:
    """Counts of stories, turns, words and classes; with a tokenizer also tokens, the share cut at each context, and packing.

    Tokens are those of the training samples of the card's recipe: prompt format, modifiers, an end-of-sequence token a reply.
    """
    if not stories:
        raise ValueError("no stories to describe")
    words = {who: [count_words(m.text) for s in stories for m in s.messages if m.speaker == who] for who in ("character", "user")}
    classes = Counter(length_class(m.text) for s in stories for m in s.replies)
    result: dict[str, Any] = {
        "stories": len(stories),
        "turns": sum(len(s.messages) for s in stories),
        "turns a story": _spread([len(s.messages) for s in stories]),
        "words": sum(map(sum, words.values())),
        "speakers": {
            who: {"turns": len(counts), "words": sum(counts), "a turn": _spread(counts), "log-normal": _log_normal(counts)}
            for who, counts in words.items()
            if counts
        },
        "classes": {name: classes[name] for name in LENGTHS},
        "repairs": sum(len(s.repairs) for s in stories),
    }
    if tokenizer is not None:
        samples = [s.compact() for s in encode_all(labelled_stories(PROFILES["a100-80"], stories), tokenizer)]
        sizes = [len(s) for s in samples]
        result["tokens"] = {
            "tokenizer": tokenizer_name,
            "all": sum(sizes),
            "trained": sum(s.trained for s in samples),
            "a story": _spread(sizes),
            "above 9,000": sum(n > 9000 for n in sizes),
            "longer than": {str(c): sum(n > c for n in sizes) for c in CONTEXTS},
            "cut at": {str(c): sum(max(0, n - c) for n in sizes) / sum(sizes) for c in CONTEXTS},
        }
        if max(sizes) <= CONTEXTS[-1]:
            rows = len(pack(samples, CONTEXTS[-1]))
            result["tokens"]["packed"] = {"context": CONTEXTS[-1], "rows": rows, "fill": sum(sizes) / (rows * CONTEXTS[-1])}
    return result


def _spread(counts: Sequence[int]) -> dict[str, float]:
    return {"shortest": min(counts), "median": statistics.median(counts), "longest": max(counts)}


def _log_normal(counts: Sequence[int]) -> dict[str, float]:
    logs = [math.log(c) for c in counts]
    return {"median": math.exp(statistics.fmean(logs)), "sigma": statistics.pstdev(logs)}


def render(facts: dict[str, Any]) -> str:
    """The statistics as Markdown."""
    turns = facts["turns a story"]
    lines = [
        f"{facts['stories']} stories, {facts['turns']:,} turns, {facts['words']:,} words; "
        f"{turns['shortest']} to {turns['longest']} turns a story, median {turns['median']:g}.",
        "",
        "| speaker | turns | words | median words a turn | longest | log-normal: median, sigma |",
        "|---|---|---|---|---|---|",
    ]
    for who, s in facts["speakers"].items():
        fit = s["log-normal"]
        lines.append(
            f"| {who} | {s['turns']:,} | {s['words']:,} | {s['a turn']['median']:g} | {s['a turn']['longest']} | "
            f"{fit['median']:.1f}, {fit['sigma']:.2f} |"
        )
    lines += ["", "| length class | words | replies |", "|---|---|---|"]
    for name, count in facts["classes"].items():
        low, high = word_range(name)
        lines.append(f"| {name} | {f'{low}–{high}' if high else f'{low} or more'} | {count} |")
    if tokens := facts.get("tokens"):
        size = tokens["a story"]
        lines += [
            "",
            f"As training samples with the tokenizer {tokens['tokenizer']}: {tokens['all']:,} tokens, "
            f"{tokens['trained'] / tokens['all']:.0%} of them in the character's replies; {size['shortest']:,} to "
            f"{size['longest']:,} tokens per story, median {size['median']:,.0f}, {tokens['above 9,000']} above 9,000.",
            "",
            "| context | stories that do not fit | tokens beyond it |",
            "|---|---|---|",
        ]
        lines += [f"| {int(c):,} | {tokens['longer than'][c]} | {tokens['cut at'][c]:.1%} |" for c in tokens["longer than"]]
        if packed := tokens.get("packed"):
            lines += [
                "",
                f"Packed into {packed['rows']} rows of {packed['context']:,} tokens, which are {packed['fill']:.1%} full.",
            ]
    return "\n".join(lines)


def write_card(file: Path, text: str) -> None:
    """Put `text` between the marks of a Markdown file, or make the file."""
    old = file.read_text(encoding="utf-8") if file.exists() else f"# Data card\n\n{BEGIN}\n{END}\n"
    before, found, rest = old.partition(BEGIN)
    _, found_too, after = rest.partition(END)
    if not (found and found_too):
        raise ValueError(f"{file} has no lines {BEGIN} and {END}: add them where the statistics belong")
    write_text(file, f"{before}{BEGIN}\n{text}\n{END}{after}")
