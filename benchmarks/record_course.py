"""Record the course's own run: results JSON, the README's tables and what each notebook took, as its first cell says it.

python benchmarks/record_course.py            after `make notebooks`
python benchmarks/record_course.py --readme   only renders the README from the committed JSON
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "course-tiny.json"
PICTURE = RESULTS.with_name("length-control.png")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


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

    figure = plot_lengths(LengthTable.load(run / "evaluation" / "1-adapter.json"))
    figure.savefig(PICTURE, dpi=110, bbox_inches="tight", metadata={"Software": None})
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


def render(results: dict) -> str:
    """The README's results block."""
    tables = results["evaluation"]
    adapter, deep, base = (tables[k] for k in ("1-adapter", "2-adapter-deep", "3-base"))
    lines = [f"![{results['picture']}]({PICTURE.relative_to(ROOT).as_posix()})", ""]
    lines += ["| asked for | mean words | 95 % interval | in class | base model, mean words |", "|---|---|---|---|---|"]
    for ours, theirs in zip(adapter["rows"], base["rows"], strict=True):
        share = "" if ours["in class"] is None else f"{ours['in class']:.0%}"
        lines.append(
            f"| {ours['length']} | {ours['mean']:.1f} | {ours['low']:.1f}–{ours['high']:.1f} | {share} | {theirs['mean']:.1f} |"
        )
    a, d, b = (t["statistics"] for t in (adapter, deep, base))
    experts = next(r for r in results["audit"] if r["part"] == "experts")
    training, where = results["training"], results["hardware"]
    what = "Spearman correlation between the class asked for and the words of a single reply"
    versions = ", ".join(f"{k} {results['versions'][k]}" for k in ("torch", "transformers", "peft", "bitsandbytes"))
    speed = f"{training['steps']} steps, {training['seconds'] / 60:.1f} minutes, {training['tokens_per_second']:,} tokens/s"
    lines += [
        "",
        f"{what}: **{a['spearman']:+.2f}** at the first reply ({a['replies']} replies), **{d['spearman']:+.2f}** deep in the "
        f"conversation ({d['replies']}), **{b['spearman']:+.2f}** for the untouched base model. {a['within_one']:.0%} of replies "
        "are within one class of the one asked for.",
        "",
        f"{experts['4-bit']:.0%} of the expert weights are NF4, {experts['bits/weight']:.2f} bits each with their scales. "
        f"The run: {speed} on {where['cores']} cores ({where['name']}), with {versions}.",
    ]
    data = json.loads((RESULTS.parent / "format-cpu.json").read_text(encoding="utf-8"))
    made, seconds, memory = data["result"], data["seconds"]["all"], data["peak memory, GB"]
    padded, packed = made["waste: padded to the longest"], made["waste: packed"]
    lines += [
        "",
        f"Data: {made['stories']:,} stories of {made['tokens'] / made['stories']:,.0f} tokens are read, labelled, formatted, "
        f"tokenised and packed in {seconds:.0f} s with {memory:.2f} GB of memory ({data['hardware']['cores']} cores), "
        f"{packed:.1%} of the packed places empty; padded to the longest {padded:.0%} (`benchmarks/format.py`).",
    ]
    lines += ["", *peers(), "", "| notebook, profile `tiny` | minutes | memory |", "|---|---|---|"]
    for name, took in results["notebooks"].items():
        lines.append(f"| {name[:2]} | {took['seconds'] / 60:.1f} | {took['memory_gib']:.1f} GiB |")
    lines += ["", f"Made on {results['date']} on {where['cores']} cores ({where['name']}), without a GPU."]
    return "\n".join(lines)


def peers() -> list[str]:
    """What the other benchmarks found, one line each."""
    facts = {n: json.loads((RESULTS.parent / f"{n}.json").read_text("utf-8")) for n in ("training-cpu", "router-losses-cpu")}
    lengths = json.loads((RESULTS.parent / "length-control-tiny.json").read_text(encoding="utf-8"))["variants"]
    medium = facts["training-cpu"]["sizes"]["medium"]
    compared = [
        f"{times['speed_of_ours']:.1f} times as fast as {name} with {times['memory_of_ours']:.0%} of its memory"
        for name, times in medium["variants"].items()
        if name != "ours"
    ]
    experts = json.loads((RESULTS.parent / "experts-cpu.json").read_text(encoding="utf-8"))
    share = max(times["share"] for times in facts["router-losses-cpu"]["times"].values())
    rho = {name: v["tables"]["first"]["statistics"]["spearman"] for name, v in lengths.items()}
    layer = [
        f"{row['ours_takes']:.2f} of the time and {row['ours_needs']:.2f} of the memory of {name}"
        for name, row in experts["results"].items()
        if "ours_needs" in row and not name.startswith("nf4")
    ]
    size = experts["settings"]
    return [
        f"One expert layer on CPU, forward and backward with LoRA (hidden {size['hidden']}, intermediate {size['intermediate']}, "
        f"{size['tokens']:,} tokens, rank {size['rank']}) takes {'; '.join(layer)} (`benchmarks/experts.py`).",
        "",
        f"A whole training step on CPU ({medium['model']}): {'; '.join(compared)} (`benchmarks/training.py`).",
        "",
        f"The router losses take at most {share:.2%} of a training step (`benchmarks/router_losses.py`).",
        "",
        "Spearman at the first reply, 40 conversations (`benchmarks/length_control.py`): "
        + ", ".join(f"{name} {value:+.2f}" for name, value in rho.items())
        + ".",
    ]


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
    head, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n{render(results)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="only render the README")
    if not parser.parse_args().readme:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
        write_notebooks(json.loads(RESULTS.read_text(encoding="utf-8")))
    write_readme(json.loads(RESULTS.read_text(encoding="utf-8")))
