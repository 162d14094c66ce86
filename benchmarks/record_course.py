"""Record the course's own run: results JSON, the README's measured blocks and what each notebook took, as its first cell says it.

python benchmarks/record_course.py            after `make notebooks`
python benchmarks/record_course.py --readme   only renders the README from the committed JSON
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "course-tiny.json"
NBSP = "\N{NO-BREAK SPACE}"
PICTURE = RESULTS.with_name("length-control.png")
PHONE = RESULTS.with_name("length-control-phone.png")


def record() -> dict:
    from helpers.evaluation import LengthTable
    from helpers.training import load_result, total_seconds

    run = ROOT / "runs" / "course-tiny"
    facts = load_result(run).facts
    tables = {}
    for path in sorted((run / "evaluation").glob("*.json")):
        table = LengthTable.load(path)
        tables[path.stem] = {"label": table.label, "rows": table.rows, "statistics": table.statistics, "sampling": table.sampling}
    base = json.loads((ROOT / "data_samples" / "tiny_base" / "provenance.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    history = load_result(run).history
    first, last = history[0], history[-1]
    course = json.loads((ROOT / "build" / "course.json").read_text(encoding="utf-8"))
    from helpers.eval_plots import plot_lengths

    adapter, base_table = (LengthTable.load(run / "evaluation" / f"{name}.json") for name in ("1-adapter", "3-base"))
    for path, phone in ((PHONE, True), (PICTURE, False)):
        figure = plot_lengths(adapter, control=base_table, phone=phone)
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return {
        "picture": figure.alt,
        "notebooks": course["notebooks"],
        "date": course["date"],
        "training": {k: facts[k] for k in ("steps", "trainable", "tokens_per_second", "corpus")}
        | {"seconds": total_seconds(history)},
        "log": {k: [first[k], last[k]] for k in ("loss", "router/z", "router/entropy")},
        "audit": facts["audit"],
        "evaluation": tables,
        "base": {k: base[k] for k in ("parameters", "tokens", "perplexity")},
        "hardware": facts["hardware"],
        "versions": facts["versions"],
        "seed": 42,
        "commit": commit,
    }


def figure(results: dict, old: str) -> str:
    """What the reader will have built: the picture, and the effect in one sentence."""
    ours, base = (results["evaluation"][k]["statistics"] for k in ("1-adapter", "3-base"))
    return "\n".join(
        [
            "<picture>",
            f'<source media="(max-width: 600px)" srcset="{PHONE.relative_to(ROOT).as_posix()}">',
            f'<img src="{PICTURE.relative_to(ROOT).as_posix()}" alt="{results["picture"]}">',
            "</picture>",
            "",
            "*What you will have built: ask for a length and get it. Each dot is a reply of the `tiny` model. Grey bands show "
            "the word counts its class allows. Box: quartiles of the replies' words. Pink: the untrained model's mean, which "
            "hardly depends on the request. Spearman correlation between the length asked for and the words that came, over "
            f"{ours['replies']} replies: **{ours['spearman']:+.2f}**; before the training: {base['spearman']:+.2f}.*",
        ]
    )


def notebooks(results: dict, old: str) -> str:
    """The table of the notebooks: the first two cells of a row are written by hand, the others are what was measured."""
    runs = {
        f.stem.removeprefix("course-"): json.loads(f.read_text(encoding="utf-8")) for f in RESULTS.parent.glob("course-*.json")
    }
    runs |= {"tiny": results}
    machines = [f"{where(run)}, `{profile}`" for profile, run in runs.items()]
    lines = ["| " + " | ".join(["notebook", "you learn", *machines]) + " |", "|---" * (2 + len(runs)) + "|"]
    for row in re.findall(r"^\| \[\d\d .*$", old, flags=re.MULTILINE):
        cells = [c.strip() for c in row.strip("|").split("|")][:2]
        name = re.search(r"\(notebooks/(.+)\.ipynb\)", row)[1]
        took = [run["notebooks"][name] for run in runs.values()]
        lines.append(
            "| "
            + " | ".join([*cells, *(f"{t['seconds'] / 60:.1f}{NBSP}min, {t['memory_gib']:.1f}{NBSP}GiB" for t in took)])
            + " |"
        )
    whole = "; ".join(
        f"{sum(t['seconds'] for t in run['notebooks'].values()) / 60:.0f} minutes with `{profile}` on {where(run)}, {run['date']}"
        for profile, run in runs.items()
    )
    return "\n".join([*lines, "", f"Together: {whole}."])


def where(run: dict) -> str:
    machine = run["hardware"]
    return f"{machine['cores']} CPU cores" if machine["device"] == "cpu" else machine["name"]


def profiles(results: dict, old: str) -> str:
    """What fits which device: the profiles, with the memory of a training step as `helpers.budget` estimates it."""
    from helpers import budget
    from helpers.profiles import PROFILES

    lines = [
        "| profile | base model | GPU memory from | a training step needs | passes × rows × tokens |",
        "|---|---|---|---|---|",
    ]
    for p in PROFILES.values():
        peak = budget.estimate(p).peak / budget.GIB
        chosen = f"{p.memory_gib:g} GiB" if p.memory_gib else "no GPU"
        base = "a small Mixtral that ships with the course" if p.name == "tiny" else p.base.partition("/")[2] + f", {p.dtype}"
        size = f"{p.accumulation} × {p.micro_batch} × {p.context:,}"
        lines.append(f"| `{p.name}` | {base} | {chosen} | {peak:.{1 if peak > 1 else 2}f} GiB | {size} |")
    return "\n".join(lines)


@functools.cache
def rehearsed():
    """The card's step; seconds, so it is made once."""
    from helpers.profiles import PROFILES
    from helpers.rehearsal import rehearse

    return rehearse(PROFILES["a100-80"])


def hours(gpu: str) -> float:
    """The least that the card's training takes on a GPU, by the rehearsal's roofline."""
    from helpers.rehearsal import CARD_TOKENS

    counted = rehearsed()
    return CARD_TOKENS / (counted.rows * counted.tokens) * counted.least_seconds(gpu) / 3600


@functools.cache
def on_a_gpu() -> dict:
    """What `benchmarks/experts_gpu.py` measured at Mixtral-8x7B's shapes."""
    return json.loads((RESULTS.parent / "experts-h200.json").read_text(encoding="utf-8"))


def large(results: dict, old: str) -> str:
    """What Mixtral's profile takes: computed where nobody has measured it."""
    from helpers import budget, environment
    from helpers.profiles import PROFILES
    from helpers.rehearsal import CARD_TOKENS

    card = PROFILES["a100-80"]
    download, run = environment.DOWNLOAD_GIB[card.base], environment.run_gib(card)
    z = budget.of_profile(card).sizes
    largest = z["experts"] * 2 * z["inner"] * z["hidden"] * 2 / budget.GIB  # a layer's gate and up, in 16 bit
    took = on_a_gpu()["cases"]["steps"]["steps"][-1]["hours_of_the_card"]
    above = took / hours("H200")
    return (
        f"This downloads {download} GiB, and a run leaves up to {run:.0f} GiB on the disk. Beside its 4-bit size, loading takes "
        f"the memory of two of the model's largest tensors ({2 * largest:.1f} GiB; tested on smaller models), because the "
        f"weights are packed while they stream in. The card's {CARD_TOKENS / 1e6:.1f} million tokens (an estimate) would take "
        f"{took:.1f} hours on an H200, at the speed measured there ([below](#gpu)): {above:.2f} times the bound that the work of "
        f"every kernel sets. An A100-80 was not at hand; as far above its bound, it would take "
        f"{above * hours('A100-80'):.1f} hours."
    )


def outcome(results: dict, old: str) -> str:
    """The length table, the run, and what the other benchmarks found."""
    tables = results["evaluation"]
    adapter, deep, base = (tables[k] for k in ("1-adapter", "2-adapter-deep", "3-base"))
    lines = ["| asked for | mean words | 95 % interval | in class | base model, mean words |", "|---|---|---|---|---|"]
    for ours, theirs in zip(adapter["rows"], base["rows"], strict=True):
        share = "" if ours["in class"] is None else f"{ours['in class']:.0%}"
        lines.append(
            f"| {ours['length']} | {ours['mean']:.1f} | {ours['low']:.1f}–{ours['high']:.1f} | {share} | {theirs['mean']:.1f} |"
        )
    a, d, b = (t["statistics"] for t in (adapter, deep, base))
    experts = next(r for r in results["audit"] if r["part"] == "experts")
    training, machine = results["training"], results["hardware"]
    took = training["seconds"] / 60
    versions = ", ".join(f"{k} {results['versions'][k]}" for k in ("torch", "transformers", "peft", "bitsandbytes"))
    lines += [
        "",
        "* Spearman correlation between the class asked for and the words of a single reply: "
        f"**{a['spearman']:+.2f}** at the first reply ({a['replies']} replies), **{d['spearman']:+.2f}** deep in the "
        f"conversation ({d['replies']}), **{b['spearman']:+.2f}** for the untouched base model. {a['within_one']:.1%} of replies "
        "are within one class of the one asked for.",
        f"* {experts['4-bit']:.0%} of the expert weights are NF4, {experts['bits/weight']:.2f} bits each with their scales.",
        f"* The run: {training['steps']:,} steps in {took:.1f} minutes, {training['tokens_per_second']:,} tokens/s.",
    ]
    data = json.loads((RESULTS.parent / "format-cpu.json").read_text(encoding="utf-8"))
    made, seconds, memory = data["result"], data["seconds"]["all"], data["peak memory, GB"]
    padded, packed = made["waste: padded to the longest"], made["waste: packed"]
    lines += [
        f"* Data: {made['stories']:,} stories of {made['tokens'] / made['stories']:,.0f} tokens each are read, labelled, "
        f"formatted, tokenised and packed in {seconds:.0f} s with {memory:.2f} GB of memory ({data['hardware']['cores']} cores), "
        f"{packed:.1%} of the packed rows is empty; padded to the longest story, {padded:.0%} would be (`benchmarks/format.py`).",
        *peers(),
        "",
        f"Made on {results['date']} on {machine['cores']} cores ({machine['name']}), without a GPU, with {versions}.",
    ]
    return "\n".join(lines)


def gpu(results: dict, old: str) -> str:
    """Whole steps of Mixtral on a GPU, beside what the budget and the roofline said before."""
    found = on_a_gpu()
    cases, versions = found["cases"], found["versions"]
    steps = cases["steps"]["steps"]
    lines = [
        f"| a pass on one {found['hardware']['name']} | seconds | tokens/s | share of its matrix speed | peak memory "
        "| budgeted |",
        "|---|---|---|---|---|---|",
        *(
            f"| {s['rows']} × {s['row']:,} tokens | {s['seconds']:.2f} | {s['tokens_per_second']:,.0f} "
            f"| {s['share_of_ceiling']:.0%} | {s['peak_gib']:.1f} GiB | {s['budget_gib']:.1f} GiB |"
            for s in steps
        ),
    ]
    card, least = steps[-1], rehearsed().least_seconds("H200")
    waits = cases["profile"]["waits_a_step"]
    a_layer = max(waits.values()) / found["settings"]["layers"]
    low, high = steps[0]["quartiles"]
    using = ", ".join(f"{k} {versions[k]}" for k in ("torch", "transformers", "peft", "bitsandbytes"))
    return "\n".join(
        [
            *lines,
            "",
            f"Mixtral-8x7B's real shapes, all {found['settings']['layers']} layers, random weights that were never anything but "
            f"NF4; LoRA of rank {found['settings']['rank']} with dropout on attention, experts and router; gradient "
            "checkpointing; no router losses; each row is one document, every token is trained. Forward, backward and Adam, "
            f"median of {card['repeats']} (of the shortest, the quartiles are {low:.2f} and {high:.2f} s). *Share*: the FLOPs, "
            f"recomputation included, divided by the time and by the {cases['ceiling']['tflops']:.0f} TFLOP/s of a large bf16 "
            "product in the same process. *Peak*: of tensors; torch's allocator reserved up to "
            f"{max(s['reserved_gib'] for s in steps):.1f} GiB. *Budgeted*: by `helpers.budget`, before. The largest takes "
            f"{card['seconds'] / least:.2f} times what its kernels must take by the data sheet (`helpers.rehearsal`). For "
            f"{cases['profile']['tokens']:,} tokens Python waits {sum(waits.values())} times for the GPU, {a_layer:.0f} times a "
            "layer to learn how many rows each expert has. Made by `benchmarks/experts_gpu.py` at commit "
            f"{found['commit'][:7]} with {using}.",
        ]
    )


def peers() -> list[str]:
    """What the other benchmarks found."""
    names = ("experts-cpu", "length-control-tiny", "router-losses-cpu", "training-cpu", "generation-cpu")
    experts, lengths, routers, training, sampling = (json.loads((RESULTS.parent / f"{n}.json").read_text("utf-8")) for n in names)
    share = max(times["share"] for times in routers["times"].values())
    rho = {name: v["tables"]["first"]["statistics"]["spearman"] for name, v in lengths["variants"].items()}
    size, medium = experts["settings"], training["sizes"]["medium"]
    layer = [
        f"| {name} | {row['ours_takes']:.2f} | {row['ours_needs']:.2f} |"
        for name, row in experts["results"].items()
        if "ours_needs" in row and not name.startswith("nf4")
    ]
    step = [
        f"| {name} | {1 / times['speed_of_ours']:.2f} | {times['memory_of_ours']:.2f} |"
        for name, times in medium["variants"].items()
        if name != "ours"
    ]
    ours, library = (
        max((way for name, way in sampling["ways"].items() if name.startswith(who)), key=lambda way: way["tokens per second"])
        for who in ("ours", "transformers")
    )
    once = ours["times the library one by one"]
    return [
        f"* The router losses take at most {share:.2%} of a training step (`benchmarks/router_losses.py`).",
        f"* Sampling in batches makes {once:.0f} times as many tokens per CPU second as transformers' `generate` one by one, and "
        f"{once / library['times the library one by one']:.1f} times as many as its batches of 64 (`benchmarks/generation.py`).",
        "* Spearman at the first reply, 40 conversations (`benchmarks/length_control.py`): "
        + ", ".join(f"{name} {round(value, 2) + 0.0:+.2f}" for name, value in rho.items())
        + ".",
        "",
        "Against other ways to train the same 4-bit experts, on CPU, we need this share of their time and memory:",
        "",
        "| for one expert layer, instead of | time | memory |",
        "|---|---|---|",
        *layer,
        "",
        "| for a whole training step, instead of | time | memory |",
        "|---|---|---|",
        *step,
        "",
        f"Layer: forward and backward with LoRA, hidden {size['hidden']:,}, intermediate {size['intermediate']:,}, "
        f"{size['tokens']:,} tokens, rank {size['rank']} (`benchmarks/experts.py`). "
        f"Step: {medium['model']} (`benchmarks/training.py`); the others pad their rows ({medium['padding_of_peers']:.0%} "
        "filler), because on a CPU they have no packing that keeps stories apart; only real tokens count.",
    ]


BLOCKS = {"figure": figure, "notebooks": notebooks, "profiles": profiles, "large": large, "results": outcome, "gpu": gpu}


def with_results(readme: str, results: dict) -> str:
    """The README with what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` renewed, for each of `BLOCKS`."""
    marks = {name: [f"<!-- {name}: {place} -->\n" for place in ("begin", "end")] for name in BLOCKS}
    for begin, end in marks.values():
        if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(end) < readme.index(begin):
            raise ValueError(f"README.md: the lines {begin.strip()} and {end.strip()} must stand there once each, in this order")
    for name, render in BLOCKS.items():
        begin, end = marks[name]
        head, rest = readme.split(begin)
        old, tail = rest.split(end)
        readme = f"{head}{begin}{render(results, old)}\n{end}{tail}"
    return readme


def needs(results: dict, name: str) -> str:
    """What a notebook took, for its first cell and the README."""
    took, where = results["notebooks"][name], results["hardware"]
    minutes, memory = took["seconds"] / 60, took["memory_gib"]
    return f"{minutes:.1f} minutes and {memory:.1f} GiB on {where['cores']} CPU cores ({where['name']}), {results['date']}"


def with_needs(results: dict, name: str, first_cell: str) -> str:
    """The notebook's first cell with its line **Measured** renewed."""
    line = f"**Measured:** {needs(results, name)}, profile `tiny`."
    new, count = re.subn(r"^\*\*Measured:\*\*.*$", line, first_cell, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{name}: the first cell has {count} lines that begin with **Measured:**, one is wanted")
    return new


def write_notebooks(results: dict) -> None:
    import nbformat

    for name in results["notebooks"]:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[0].source = with_needs(results, name, notebook.cells[0].source)
        nbformat.write(notebook, path)


def write_readme(results: dict) -> None:
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="only render the README")
    if not parser.parse_args().readme:
        from helpers.files import write_json

        write_json(RESULTS, record())
        write_notebooks(json.loads(RESULTS.read_text(encoding="utf-8")))
    write_readme(json.loads(RESULTS.read_text(encoding="utf-8")))
