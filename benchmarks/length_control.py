"""Length control of the tiny profile: three seeds, controls that must not show it, ablations, and how it grows with training.

python benchmarks/length_control.py FOLDER                   trains what FOLDER lacks and measures it (about 10 minutes a variant)
python benchmarks/length_control.py FOLDER --only "no z-loss" one of them; results of the others are kept
python benchmarks/length_control.py FOLDER --only "base model" growth   cases, which need less: see CASES

Everything continues where it was interrupted. Results: benchmarks/results/length-control-tiny.json, from which notebook 5 and
the pictures take what a reader has no time to train.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "length-control-tiny.json"

# name → (what is changed in the profile, anything else that is changed, what it is for)
VARIANTS = {
    "seed 42": ({}, None, "the course's own run"),
    "seed 43": ({"seed": 43}, None, "another seed: other stories, other adapter"),
    "seed 44": ({"seed": 44}, None, "another seed: other stories, other adapter"),
    "shuffled labels": ({}, "shuffled", "control: modifiers dealt out at random"),
    "loss on everything": ({}, "all", "ablation: every token trained, as the card family does"),
    "no z-loss": ({"z_coef": 0.0}, None, "ablation: router z-loss coefficient 0 instead of 1e-3"),
    "attention only": ({"lora_experts": False}, None, "ablation: no LoRA on the experts"),
}
FULL = ("seed 42", "seed 43", "seed 44")  # measured with all samples; the others once a conversation
MANY, SAMPLES = 200, 2  # conversations and replies to each, for a control whose interval would otherwise touch 0
STEPS = (0, 50, 100, 200, 400, 800, 1600)  # of the course's own run; 0 is the base model


def train(name: str, folder: Path) -> Path:
    from helpers import data, training
    from helpers.controls import shuffled_labels
    from helpers.profiles import PROFILES

    changes, special, _ = VARIANTS[name]
    profile = dataclasses.replace(PROFILES["tiny"], **changes)
    run = folder / name.replace(" ", "-")
    if (run / "result.json").exists():
        return run
    labelled = shuffled_labels(data.labelled_stories(profile), profile.seed) if special == "shuffled" else None
    # the course itself has no use for a loss on everything, so only this script puts one in
    build = functools.partial(data.build_corpus, loss="all" if special == "all" else "replies")
    with mock.patch.object(training, "build_corpus", build):
        training.train(profile, labelled, run)
    return run


def measure(name: str, run: Path) -> dict:
    from helpers.behaviour import verbosity
    from helpers.evaluation import DEEP, FIRST, held_out, measure_length_control, size_of
    from helpers.experiment import evaluate_run, load_run, without_modifier
    from helpers.generation import print_progress
    from helpers.training import load_result

    facts = load_result(run).facts
    began = time.process_time()  # other programs and pauses disturb it less
    extra: dict = {}
    if name == "seed 42":
        extra = evaluate_run(run, progress=print_progress)
        extra["texts to read"] = texts_to_read(run)
        extra["controls"] = {p.stem: compact(p) for p in sorted((run / "evaluation").glob("[3-9]-*.json"))}
        tables = {
            "first": compact(run / "evaluation" / "1-adapter.json"),
            "deep": compact(run / "evaluation" / "2-adapter-deep.json"),
        }
    else:
        profile, model, tokenizer = load_run(run)
        size = size_of(profile)
        settings = dict(batch_size=size.batch_size, progress=print_progress, folder=run / "evaluation" / "replies", label=name)
        tables = {}
        for place, reply in (("first", FIRST), ("deep", DEEP)):
            stories = held_out(profile, size.conversations, reply)
            samples = size.samples if name in FULL else 1
            table = measure_length_control(model, tokenizer, stories, reply=reply, samples=samples, **settings)
            print(table)
            tables[place] = table.compact()
            if place == "first":
                more = {k: v for k, v in settings.items() if k != "label"}
                free, own = without_modifier(model, tokenizer, profile, size, **more)
                extra = {"temperature 1.0": free.unasked, "verbosity": verbosity(free, own)}
    return {
        "what": VARIANTS[name][2],
        "tables": tables,
        **extra,
        "seconds": {"training": round(facts["seconds"]), "evaluation, processor": round(time.process_time() - began)},
        "steps": facts["steps"],
    }


def compact(path: Path) -> dict:
    from helpers.evaluation import LengthTable

    return LengthTable.load(path).compact()


def texts_to_read(run: Path, conversations: int = 4, samples: int = 2) -> list[dict]:
    """Replies with their texts, for the explorer: a few conversations under every length."""
    from helpers.evaluation import LengthTable, held_out
    from helpers.profiles import PROFILES

    table = LengthTable.load(run / "evaluation" / "1-adapter.json")
    stories = held_out(PROFILES["tiny"], conversations)
    said = [s.before_reply(0).messages[-1].text for s in stories]
    keys = ("condition", "story", "sample", "words", "end", "text")
    chosen = [r for r in table.replies if r["story"] < conversations and r["sample"] < samples]
    return [
        {"names": list(s.names), "persona": s.personas.character, "scenario": s.scenario, "said": said[i],
         "replies": [{k: r[k] for k in keys} for r in chosen if r["story"] == i]}
        for i, s in enumerate(stories)
    ]  # fmt: skip


def base_model(folder: Path) -> dict:
    """The base model, without adapter, asked as often as it takes to tell a trace of the effect from chance."""
    from transformers import AutoTokenizer

    from helpers.evaluation import held_out, measure_length_control, size_of
    from helpers.generation import print_progress
    from helpers.profiles import PROFILES
    from helpers.quantization import load_4bit

    profile = PROFILES["tiny"]
    model, tokenizer = load_4bit(profile.base_path, dtype=profile.dtype), AutoTokenizer.from_pretrained(profile.base_path)
    settings = dict(batch_size=size_of(profile).batch_size, progress=print_progress, folder=folder / "base-model" / "replies")
    table = measure_length_control(model, tokenizer, held_out(profile, MANY), samples=SAMPLES, label="base model", **settings)
    print(table)
    return table.compact()


def growth(folder: Path) -> list[dict]:
    """Held-out loss and control at some steps of one run, which stops at each and goes on from its checkpoint."""
    from transformers import AutoTokenizer

    from helpers import files, training
    from helpers.evaluation import held_out, measure_length_control, size_of
    from helpers.held_out import HeldOutLoss, held_out_stories
    from helpers.profiles import PROFILES
    from helpers.qlora import load_lora
    from helpers.quantization import load_4bit

    profile, rows = PROFILES["tiny"], []
    size, stories = size_of(profile), held_out(profile, size_of(profile).conversations)
    tokenizer = AutoTokenizer.from_pretrained(profile.base_path)
    loss = HeldOutLoss(held_out_stories(profile), tokenizer, profile.context, tokenizer.pad_token_id)
    for step in STEPS:
        kept = folder / "growth" / f"step-{step}.json"
        if not kept.exists():  # the run keeps its last checkpoints only
            model = load_4bit(profile.base_path, dtype=profile.dtype)
            if step:
                run = training.train(profile, None, folder / "growth" / "run", stop_after=step)
                assert run.step == step, f"the run is at step {run.step}: delete {folder / 'growth'} and begin again"
                model = load_lora(model, run.adapter if run.finished else run.run_dir / f"checkpoint-{step}")
            table = measure_length_control(model, tokenizer, stories, label=f"step {step}", batch_size=size.batch_size)
            print(table)
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(kept, {"step": step, "held-out loss": loss(model), "statistics": table.statistics})
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
    return rows


def unknown_modifiers(folder: Path) -> dict[str, list[dict]]:
    """Mean words for words in the place of a length that no training has seen, and for the ten lengths, by seed."""
    from helpers import behaviour
    from helpers.evaluation import held_out, size_of
    from helpers.experiment import load_run
    from helpers.generation import print_progress
    from helpers.lengths import LENGTHS

    found = {}
    for name in FULL:
        run = train(name, folder)
        profile, model, tokenizer = load_run(run)
        size = size_of(profile)
        asker = behaviour.Asker(model, tokenizer, None, size.batch_size, print_progress, run / "evaluation" / "replies")
        words = (*behaviour.UNKNOWN, *LENGTHS)
        rows = behaviour.unknown_modifiers(asker, held_out(profile, size.conversations), words)
        found[name] = behaviour.mean_by(rows, "asked")
    return found


# name → (what makes its result, what it is for); each takes minutes, and is not a whole variant
CASES = {
    "base model": (base_model, f"control: the base model asked {MANY} conversations, {SAMPLES} replies to each"),
    "growth": (growth, "the course's own run, measured at several of its steps"),
    "unknown modifiers": (unknown_modifiers, "words that no training has seen, and the ten lengths, at three seeds"),
}


def main() -> None:
    from helpers import environment, files

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs are, or will be")
    names = [*VARIANTS, *CASES]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    options = parser.parse_args()
    environment.quiet()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"variants": {}}
    for name in options.only:
        print(f"--- {name}", flush=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        origin = {"hardware": environment.hardware(), "versions": environment.versions(), "commit": commit}
        if name in VARIANTS:
            results["variants"][name] = measure(name, train(name, options.folder))
            results["variants"] = {n: results["variants"][n] for n in VARIANTS if n in results["variants"]}
            results |= origin
        else:
            make, what = CASES[name]
            case = {"what": what, "result": make(options.folder), "seed": 42, **origin}
            results["cases"] = results.get("cases", {}) | {name: case}
        files.write_text(RESULTS, json.dumps(results, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
