"""Record the course's own run: results JSON and the README's table, both from `runs/course-tiny`.

python benchmarks/record_course.py            after `make notebooks`
python benchmarks/record_course.py --readme   only renders the README from the committed JSON
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "course-tiny.json"
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
    return {
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
    lines = ["| asked for | mean words | 95 % interval | in class | base model, mean words |", "|---|---|---|---|---|"]
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
        f"{packed:.1%} of the packed places empty; padding to the longest would leave {padded:.0%} empty (`benchmarks/format.py`).",
    ]
    return "\n".join(lines)


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
    write_readme(json.loads(RESULTS.read_text(encoding="utf-8")))
