"""Loading, labelling, formatting, tokenising and packing 2,000 stories of about 4,000 tokens: seconds, memory, padding waste.

python benchmarks/format.py [--stories 2000] [--repeat 3] [--output benchmarks/results/format-cpu.json]

The stories are sample stories cut and joined at random (fixed seed) to lengths around 4,000 tokens, written as YAML files into a
temporary folder. Every stage runs `repeat` times in one process; medians are reported. Memory is the peak of a fresh process
that runs everything once.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONTEXT, SEED = 10240, 0


def write_stories(folder: Path, count: int, tokens_each: int = 4000) -> None:
    """Two-person chats of log-normal length around `tokens_each`, from the turns of the sample stories."""
    import yaml

    from helpers.stories import load_stories

    sources = load_stories(ROOT / "data_samples" / "stories")
    rng = random.Random(SEED)
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    for k in range(count):
        story = rng.choice(sources)
        record = story.record()
        words = rng.lognormvariate(0, 0.4) * tokens_each / 3.3  # tokens a word with the tiny tokenizer and the format
        turns: list[dict[str, str]] = []
        while words > 0:
            pool = rng.choice(sources).record()["conversation"]
            start = 2 * rng.randrange(max(1, len(pool) // 2 - 8))
            for turn in pool[start : start + 16]:
                turns.append({"name": ("<SECOND>", "<FIRST>")[len(turns) % 2], "text": turn["text"]})
                words -= len(turn["text"].split())
        record["conversation"] = turns[: len(turns) // 2 * 2]
        text = yaml.dump(record, Dumper=dumper, allow_unicode=True, sort_keys=False, width=10**6)
        (folder / f"{k:05}.yaml").write_text(text, encoding="utf-8")


def run(folder: Path, tokenizer) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each stage, and what came out."""
    from helpers.data import labelled_stories
    from helpers.profiles import PROFILES
    from helpers.prompts import format_story
    from helpers.stories import load_stories
    from helpers.tokens import encode_all, pack, packed_row

    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal started
        seconds[name] = time.perf_counter() - started
        started = time.perf_counter()

    stories = load_stories(folder)
    stage("load")
    labelled = labelled_stories(PROFILES["a100-80"], stories)
    stage("label")
    characters = sum(len(format_story(story, lengths)) for story, lengths in labelled)
    stage("format")
    samples = [s.compact() for s in encode_all(labelled, tokenizer, CONTEXT)]
    stage("encode")
    bins = pack(samples, CONTEXT)
    stage("pack")
    rows = [packed_row(samples[i] for i in members) for members in bins]
    stage("rows")
    sizes = [len(s) for s in samples]
    order = sorted(sizes)
    bucketed = sum(4 * max(order[i : i + 4]) for i in range(0, len(order), 4))
    facts = {
        "stories": len(stories),
        "megabytes": characters / 1e6,
        "tokens": sum(sizes),
        "rows": len(rows),
        "waste: padded to the longest": 1 - sum(sizes) / (len(sizes) * max(sizes)),
        "waste: length-bucketed, batches of 4": 1 - sum(sizes) / bucketed,
        "waste: packed": 1 - sum(sizes) / (len(rows) * CONTEXT),
    }
    return seconds, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokenizer", default=str(ROOT / "data_samples" / "tiny_base"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    from helpers import data_card, environment
    from helpers.files import write_json

    tokenizer = data_card.load_tokenizer(options.tokenizer)
    if options.once:
        run(options.once, tokenizer)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(peak * (1 if sys.platform == "darwin" else 1024))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_stories(folder, options.stories)
        runs = [run(folder, tokenizer) for _ in range(options.repeat)]
        command = [sys.executable, __file__, "--once", name, "--tokenizer", options.tokenizer]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    seconds = {k: statistics.median(s[k] for s, _ in runs) for k in runs[0][0]}
    facts = runs[0][1]
    total = sum(seconds.values())
    result = {
        "seconds": seconds | {"all": total},
        "runs": options.repeat,
        "result": facts,
        "stories/s": facts["stories"] / total,
        "MB/s": facts["megabytes"] / total,
        "tokens/s in encode": facts["tokens"] / seconds["encode"],
        "peak memory, GB": peak / 1e9,
        "context": CONTEXT,
        "tokenizer": Path(options.tokenizer).name,
        "seed": SEED,
        "hardware": environment.hardware(),
        "python": platform.python_version(),
        "versions": environment.versions(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip(),
    }
    print(json.dumps(result, indent=1))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
