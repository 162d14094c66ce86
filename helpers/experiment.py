"""The whole evaluation of a finished run by one call: length tables, controls, side effects, conclusions.

run_dir/evaluation/1-adapter.json 2-adapter-deep.json 3-base.json …   one length table each
run_dir/evaluation/replies/                                           every reply, so that it can be continued
run_dir/behaviour.json                                                everything else
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers import behaviour, conclusions
from helpers.controls import random_adapter, shuffled_labels
from helpers.evaluation import DEEP, FIRST, LengthTable, Size, held_out, measure_length_control, size_of
from helpers.generation import SAMPLERS, Progress, Sampling
from helpers.lengths import LENGTHS
from helpers.profiles import ROOT, Profile
from helpers.training import load_result, profile_of, train, write_json

Say = Callable[[str], None]
RECORDED = ROOT / "benchmarks" / "results" / "length-control-tiny.json"


def recorded() -> dict[str, Any]:
    """The committed results of `benchmarks/length_control.py`: three seeds, controls and ablations of the tiny profile."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def recorded_tables(place: str = "first") -> dict[str, LengthTable]:
    """Their length tables by variant, and of the controls that need no training. place: "first" or "deep"."""
    variants = recorded()["variants"]
    tables = {n: dataclasses.replace(LengthTable.from_compact(v["tables"][place]), label=n) for n, v in variants.items()}
    for data in variants.get("seed 42", {}).get("controls", {}).values():
        table = LengthTable.from_compact(data)
        if (table.reply == DEEP) == (place == "deep"):
            tables[table.label.removesuffix(", deep")] = table
    return tables


def load_run(run_dir: str | Path):
    """(profile, model, tokenizer) of a finished run: its base in 4 bit with its adapter.

    ValueError if the base's weights are no longer those that the adapter was trained on.
    """
    from transformers import AutoTokenizer

    from helpers import resume
    from helpers.qlora import load_lora
    from helpers.quantization import load_4bit

    result, profile = load_result(run_dir), profile_of(run_dir)
    resume.check_settings(Path(run_dir), resume.settings(profile))
    model = load_lora(load_4bit(profile.base_path, dtype=profile.dtype), result.adapter)
    return profile, model, AutoTokenizer.from_pretrained(result.adapter)


def evaluate_run(
    run_dir: str | Path,
    size: Size | None = None,
    sampling: Sampling | None = None,
    controls: bool = False,
    progress: Progress | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Measure a run and write the results into its folder; interrupted, the same call continues.

    The base model and a random adapter are measured as controls, once a conversation. `controls=True` adds an adapter trained
    with shuffled labels (in `run_dir/controls/shuffled`), which costs as much as the run itself.
    """
    run_dir, sampling = Path(run_dir), sampling or SAMPLERS["course"]
    profile, model, tokenizer = load_run(run_dir)
    size = size or size_of(profile)
    folder = run_dir / "evaluation"
    stories = {reply: held_out(profile, size.conversations, reply) for reply in (FIRST, DEEP)}
    kept = folder / "replies"

    def measure(name: str, label: str, reply: int = FIRST, samples: int = 1, of=model, **more) -> LengthTable:
        with_settings = {"sampling": sampling, "batch_size": size.batch_size, "progress": progress, "folder": kept, **more}
        table = measure_length_control(of, tokenizer, stories[reply], reply=reply, samples=samples, label=label, **with_settings)
        table.save(folder / f"{name}.json")
        say(f"{table}\n")
        return table

    adapter = measure("1-adapter", "adapter", samples=size.samples)
    deep = measure("2-adapter-deep", "adapter, deep", DEEP, size.samples)
    switches = {"base model": model.disable_adapter, "random adapter": lambda: random_adapter(model)}
    found = [*conclusions.about_adapter(adapter), *conclusions.about_adapter(deep)]
    for number, (label, switch) in enumerate(switches.items()):
        with switch():
            first = measure(f"{3 + 2 * number}-{label.split()[0]}", label)
            later = measure(f"{4 + 2 * number}-{label.split()[0]}-deep", f"{label}, deep", DEEP)
        found += conclusions.about_control(first, adapter) + conclusions.about_control(later, deep)
    if controls:
        other = _shuffled(run_dir, profile)
        first = measure("7-shuffled", "shuffled labels", of=other)
        later = measure("8-shuffled-deep", "shuffled labels, deep", DEEP, of=other)
        found += conclusions.about_control(first, adapter) + conclusions.about_control(later, deep)

    asker = behaviour.Asker(model, tokenizer, sampling, size.batch_size, progress, kept)
    free, own = without_modifier(
        model, tokenizer, profile, size, sampling.seed, batch_size=size.batch_size, progress=progress, folder=kept
    )
    results = side_effects(asker, stories[FIRST], stories[DEEP], adapter, free, own)
    found += results.pop("conclusions")
    results |= {"temperature 1.0": free.unasked, "conclusions": [dataclasses.asdict(c) for c in found]}
    write_json(run_dir / "behaviour.json", results)
    say(conclusions.render(found))
    return results


def without_modifier(model, tokenizer, profile: Profile, size: Size, seed: int = 0, **settings) -> tuple[LengthTable, list]:
    """(first replies without modifier at temperature 1, the model's own distribution; their conversations).

    Four times as many conversations as for the lengths, with half the samples: what personas do shows between conversations.
    """
    stories, warm = held_out(profile, 4 * size.conversations), dataclasses.replace(SAMPLERS["plain"], seed=seed)
    options = {"samples": max(1, size.samples // 2), "conditions": (None,), "label": "T 1.0", **settings}
    return measure_length_control(model, tokenizer, stories, warm, **options), stories


def side_effects(
    asker: behaviour.Asker, stories, deep_stories, adapter: LengthTable, free: LengthTable, free_stories
) -> dict[str, Any]:
    """All that `behaviour` measures, as rows by name, and the conclusions about it. `free`: of `without_modifier`."""
    changes = behaviour.change_of_length(asker, stories)
    texts = behaviour.text_report(adapter, stories, behaviour.known_names(stories))
    talk = behaviour.verbosity(free, free_stories)
    found = [
        *conclusions.about_no_modifier(free, talk),
        *conclusions.about_changes(changes, LENGTHS),
        *conclusions.about_names(texts),
    ]
    return {
        "change of length": behaviour.mean_by(changes, "first", "then"),
        "carry-over": behaviour.mean_by(behaviour.carry_over(asker, deep_stories), "history", "asked"),
        "unknown modifiers": behaviour.mean_by(behaviour.unknown_modifiers(asker, stories), "asked"),
        "perplexity": behaviour.reply_perplexity(asker.model, asker.tokenizer, stories),
        "texts": texts,
        "verbosity": talk,
        "conclusions": found,
    }


def _shuffled(run_dir: Path, profile: Profile):
    """The control that has to be trained: the run's own recipe on labels dealt out at random."""
    from helpers.data import labelled_stories

    target = run_dir / "controls" / "shuffled"
    train(profile, shuffled_labels(labelled_stories(profile), profile.seed), target)
    return load_run(target)[1]


def summary(tables: Sequence[LengthTable]) -> str:
    """One line a table: correlation with its interval, shares, cut-off."""
    lines = [f"{'':<24}{'Spearman':>9}{'95 % interval':>18}{'in class':>10}{'±1 class':>10}{'bits':>7}{'cut off':>9}"]
    for table in tables:
        s = table.statistics
        interval = f"[{s['spearman_low']:+.2f}, {s['spearman_high']:+.2f}]"
        lines.append(
            f"{table.label:<24}{s['spearman']:>+9.2f}{interval:>18}"
            f"{s['in_class']:>10.0%}{s['within_one']:>10.0%}{s['information']:>7.2f}{s['cut_off']:>9.1%}"
        )
    return "\n".join(lines)
