"""The whole evaluation of a finished run by one call: length tables, controls, side effects, conclusions.

run_dir/evaluation/1-adapter.json 2-adapter-deep.json 3-base.json …   one length table each
run_dir/evaluation/replies/                                           every reply, so that it can be continued
run_dir/behaviour.json                                                everything else
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from helpers import behaviour, conclusions
from helpers.controls import random_adapter, shuffled_labels
from helpers.data import Labelled, build_corpus, labelled_stories
from helpers.evaluation import (
    DEEP,
    FIRST,
    LengthTable,
    Size,
    conversations_of,
    held_out,
    measure_length_control,
    size_of,
    with_room,
)
from helpers.files import write_json
from helpers.generation import SAMPLERS, Progress, Sampling
from helpers.lengths import LENGTHS, label_replies
from helpers.profiles import ROOT, Profile
from helpers.stories import Story, StoryError, load_stories
from helpers.tokens import encode
from helpers.training import OF_PROFILE, TrainingResult, free, load_result, profile_of, train, unfinished

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


def finished(run_dir: str | Path) -> tuple[TrainingResult, Profile]:
    """(result, profile) of a finished run whose adapter is there; FileNotFoundError or ValueError says what is amiss."""
    run_dir = Path(run_dir)
    result, profile = load_result(run_dir), profile_of(run_dir)
    if problem := unfinished(run_dir):
        raise FileNotFoundError(
            f"{problem}: delete {run_dir / 'result.json'} and give the same train command again; it takes the adapter from the "
            "last checkpoint, if that is still there"
        )
    return result, profile


def load_run(run_dir: str | Path):
    """(profile, model, tokenizer) of a finished run: its base in 4 bit with its adapter.

    ValueError if the base's weights are no longer those that the adapter was trained on.
    """
    from transformers import AutoTokenizer

    from helpers import resume
    from helpers.qlora import load_lora
    from helpers.quantization import load_4bit

    result, profile = finished(run_dir)
    resume.check_settings(Path(run_dir), resume.settings(profile))
    try:
        model = load_lora(load_4bit(profile.base_path, dtype=profile.dtype), result.adapter)
    except torch.OutOfMemoryError as error:
        first = (str(error).splitlines() or ["out of memory"])[0].rstrip(".")
        raise torch.OutOfMemoryError(
            f"{first}. {profile.base} in 4 bit does not fit beside what is in the GPU's memory: end other programs and "
            "notebooks that use it, or take a larger GPU"
        ) from None
    return profile, model, AutoTokenizer.from_pretrained(result.adapter)


@dataclasses.dataclass(frozen=True)
class Conversations:
    """What an evaluation asks."""

    source: str
    first: list[Story]
    deep: list[Story]  # asked for their fourth reply; may be empty
    free: list[Story]  # asked without modifier
    notes: tuple[str, ...] = ()

    @classmethod
    def of_profile(cls, profile: Profile, count: int) -> Conversations:
        generated = profile.stories.startswith("generated:")
        source = "the story generator, from seeds that no training uses" if generated else "data_samples/heldout"
        return cls(source, *(held_out(profile, n, reply) for n, reply in ((count, FIRST), (count, DEEP), (4 * count, FIRST))))

    @classmethod
    def given(cls, path: str | Path, count: int, tokenizer, context: int, room: int) -> Conversations:
        """Your own. ValueError if none leaves room for a reply of `room` tokens."""
        own = conversations_of(path)
        fitting = with_room(own, FIRST, tokenizer, context, room)
        notes = ["whether the training saw them is not known here: a conversation that it saw proves nothing"]
        if not fitting:
            raise ValueError(
                f"{path}: none of {len(own)} conversations leaves room for a reply of {room} tokens in a context of {context:,}: "
                "shorten their personas and first messages"
            )
        if left := len(own) - len(fitting):
            notes.append(f"{left} others are left out: no room for a reply of {room} tokens in a context of {context:,}")
        if len(fitting) > count:
            notes.append(f"they are the first of {len(fitting)} (--conversations takes more)")
        deep = with_room([s for s in own if len(s.replies) > DEEP], DEEP, tokenizer, context, room)
        return cls(str(path), fitting[:count], deep[:count], fitting[: 4 * count], tuple(notes))

    def digest(self, sampling: Sampling) -> str:
        """Twelve hex digits that stand for what is asked, and with which settings."""
        texts = [[s.record() for s in part] for part in (self.first, self.deep)]
        return hashlib.sha256(json.dumps([texts, dataclasses.asdict(sampling)], sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        deep = (
            f"{len(self.deep)} for reply {DEEP + 1}" if self.deep else f"none has a reply {DEEP + 1}, so nothing is asked there"
        )
        lines = [f"conversations: {len(self.first)} for reply 1, {deep}; from {self.source}", *self.notes]
        return "\n  - ".join(lines)


def evaluate_run(
    run_dir: str | Path,
    size: Size | None = None,
    sampling: Sampling | None = None,
    controls: bool = False,
    progress: Progress | None = None,
    say: Say = print,
    stories: str | Path | None = None,
    training_stories: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a run and write the results into its folder; interrupted, the same call continues.

    The base model and a random adapter are measured as controls, once a conversation. `controls=True` adds an adapter trained
    with shuffled labels (in `run_dir/controls/shuffled`), which costs as much as the run itself; `training_stories` says where
    the stories of the run are, if it does not know. `stories`: a file or folder of conversations to measure instead of the
    course's own held-out ones.
    """
    from transformers import AutoConfig, AutoTokenizer

    run_dir, sampling = Path(run_dir), sampling or SAMPLERS["course"]
    if training_stories and not controls:
        raise ValueError("training stories are only used to train the control: ask for controls as well (--controls)")
    result, profile = finished(run_dir)
    size = size or size_of(profile)
    tokenizer = AutoTokenizer.from_pretrained(result.adapter)
    context = AutoConfig.from_pretrained(profile.base_path).get_text_config().max_position_embeddings
    if stories is None:
        asked = Conversations.of_profile(profile, size.conversations)
    else:
        asked = Conversations.given(stories, size.conversations, tokenizer, context, sampling.max_new_tokens)
    say(f"{asked}\n")
    folder = run_dir / "evaluation"
    kept = folder / "replies"
    _set_aside(run_dir, asked, sampling, stories is not None, say)

    files: list[str] = []  # of this evaluation; an earlier one with other settings may have left more

    def measure(number: int, label: str, of, samples: int = 1) -> list[LengthTable]:
        """The tables of one model: at the first reply and, if a conversation is long enough, at the fourth."""
        tables = []
        for reply, part, where in ((FIRST, asked.first, ""), (DEEP, asked.deep, "deep")):
            if part:
                settings = {"sampling": sampling, "batch_size": size.batch_size, "progress": progress, "folder": kept}
                name = f"{label}, {where}" if where else label
                table = measure_length_control(of, tokenizer, part, reply=reply, samples=samples, label=name, **settings)
                file = f"{number + len(tables)}-{label.split()[0]}"
                files.append(f"{file}-{where}.json" if where else f"{file}.json")
                table.save(folder / files[-1])
                say(f"{table}\n")
                tables.append(table)
        return tables

    others: dict[str, list[LengthTable]] = {}
    if controls:  # before the run is loaded: a GPU may have no room for two models
        trained = _shuffled(run_dir, profile, training_stories)
        others["shuffled labels"] = measure(7, "shuffled labels", load_run(trained)[1])
        free()
    _, model, _ = load_run(run_dir)
    adapter = measure(1, "adapter", model, size.samples)
    with model.disable_adapter():
        base = measure(3, "base model", model)
    with random_adapter(model):
        noise = measure(5, "random adapter", model)
    found = [c for table in adapter for c in conclusions.about_adapter(table)]
    for tables in (base, noise, *others.values()):
        for control, own in zip(tables, adapter, strict=True):
            found += conclusions.about_control(control, own)

    asker = behaviour.Asker(model, tokenizer, sampling, size.batch_size, progress, kept)
    settings = {"batch_size": size.batch_size, "progress": progress, "folder": kept}
    plain, own = without_modifier(model, tokenizer, profile, size, sampling.seed, asked.free, **settings)
    fitting: dict[str, list[Story]] = {}
    if stories is not None:  # a change in mid-conversation needs room for two replies, perplexity for all of a conversation
        talks = [s for s in asked.first if len(s.replies) > 1]
        fitting["changing"] = with_room(talks, 1, tokenizer, context, 2 * sampling.max_new_tokens)
        fitting["whole"] = [s for s in asked.first if len(encode(s, tokenizer, label_replies(s, 0.0))) <= context]
        say(
            f"room in the context for a change of length in {len(fitting['changing'])} of {len(talks)} conversations with two "
            f"replies, for perplexity in {len(fitting['whole'])} of {len(asked.first)}\n"
        )
    results = side_effects(asker, asked.first, asked.deep, adapter[0], plain, own, **fitting)
    found += results.pop("conclusions")
    results |= {"temperature 1.0": plain.unasked, "conclusions": [dataclasses.asdict(c) for c in found]}
    results["conversations"] = {"from": asked.source, "first": len(asked.first), "deep": len(asked.deep)}
    results["conversations"]["held out"] = stories is None
    results["tables"] = sorted(files)
    write_json(run_dir / "behaviour.json", results)
    say(conclusions.render(found))
    return results


def _set_aside(run_dir: Path, asked: Conversations, sampling: Sampling, given: bool, say: Say) -> None:
    """Results of other conversations or settings go into a folder of their own: the model card would mix them with the new."""
    folder, digest = run_dir / "evaluation", asked.digest(sampling)
    note = folder / "replies" / "conversations.json"
    before = json.loads(note.read_text(encoding="utf-8"))["digest"] if note.exists() else None
    old = sorted(folder.glob("*.json"))
    if old and before != digest and (before or given):
        earlier = folder / f"earlier-{before or 'tables'}"
        earlier.mkdir(exist_ok=True)
        for path in (*old, *run_dir.glob("behaviour.json")):
            path.replace(earlier / path.name)
        say(f"{len(old)} tables of other conversations or settings were moved into {earlier}\n")
    write_json(note, {"digest": digest, "from": asked.source})


def without_modifier(
    model, tokenizer, profile: Profile, size: Size, seed: int = 0, stories: Sequence[Story] | None = None, **settings
) -> tuple[LengthTable, list[Story]]:
    """(first replies without modifier at temperature 1, the model's own distribution; their conversations).

    Four times as many conversations as for the lengths, with half the samples: what personas do shows between conversations.
    """
    stories = held_out(profile, 4 * size.conversations) if stories is None else list(stories)
    warm = dataclasses.replace(SAMPLERS["plain"], seed=seed)
    options = {"samples": max(1, size.samples // 2), "conditions": (None,), "label": "T 1.0", **settings}
    return measure_length_control(model, tokenizer, stories, warm, **options), stories


def side_effects(
    asker: behaviour.Asker,
    stories,
    deep_stories,
    adapter: LengthTable,
    free: LengthTable,
    free_stories,
    changing=None,
    whole=None,
) -> dict[str, Any]:
    """All that `behaviour` measures, as rows by name, and the conclusions about it.

    `free`: of `without_modifier`; `changing`, `whole`: the stories in which the length is changed in mid-conversation, and whose
    perplexity is measured, if not all.
    """
    changes = behaviour.change_of_length(asker, stories if changing is None else changing)
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
        "perplexity": behaviour.reply_perplexity(asker.model, asker.tokenizer, stories if whole is None else whole),
        "texts": texts,
        "verbosity": talk,
        "conclusions": found,
    }


def _shuffled(run_dir: Path, profile: Profile, training_stories: str | Path | None) -> Path:
    """Train the control: the run's own recipe and stories, with the labels dealt out at random. Returns its folder."""
    labelled = trained_on(run_dir, profile, training_stories)
    target = run_dir / "controls" / "shuffled"
    facts = load_result(run_dir).facts
    # In one process, so it adds up what several processes did at the same time: the same rows in a step.
    profile = dataclasses.replace(profile, accumulation=profile.accumulation * facts.get("processes", 1))
    labelled = shuffled_labels(labelled, profile.seed)
    result = train(profile, labelled, target, shrink=True, skip_too_long=True, attention=facts.get("attention"))
    if not result.finished:  # training ends a Ctrl-C with a checkpoint; here there is more to be stopped
        raise KeyboardInterrupt(f"the control's training stopped after step {result.step} of {result.total_steps}")
    return target


def trained_on(run_dir: str | Path, profile: Profile, path: str | Path | None = None) -> list[Labelled]:
    """The stories of a run with their labels, as it was trained on them: those at `path`, or the profile's.

    ValueError if the ids and labels made from them are not those of the run, or if nobody says where the stories are.
    """
    from transformers import AutoTokenizer

    facts = json.loads((Path(run_dir) / "run.json").read_text(encoding="utf-8"))
    if path is None and facts.get("stories", OF_PROFILE) != OF_PROFILE:
        raise ValueError(
            f"{run_dir} was trained on stories of yours: the control needs the same ones, so say where they are with "
            "--training-stories PATH"
        )
    stories = None
    if path is not None:
        problems: list[StoryError] = []
        stories = load_stories(path, problems)  # unreadable ones were left out of the training too
        if not stories:
            raise problems[0]
    labelled = labelled_stories(profile, stories)
    tokenizer = AutoTokenizer.from_pretrained(profile.base_path)
    # those that do not fit were left out as well, or there would be no run
    if build_corpus(labelled, tokenizer, profile.context, long=profile.long_stories, too_long=[]).digest != facts["data"]:
        raise ValueError(
            f"{path or 'the stories of the profile'}: not what {run_dir} was trained on (other ids or labels), so a control "
            "trained on them would compare two things at once; name the run's own stories with --training-stories PATH"
        )
    return labelled


def summary(tables: Sequence[LengthTable]) -> str:
    """One line a table: correlation with its interval, shares, cut-off."""
    lines = [f"{'':<24}{'Spearman':>9}{'95 % interval':>20}{'in class':>10}{'±1 class':>10}{'bits':>7}{'cut off':>9}"]
    for table in tables:
        s = table.statistics
        interval = f"[{s['spearman_low']:+.3f}, {s['spearman_high']:+.3f}]"
        lines.append(
            f"{table.label:<24}{s['spearman']:>+9.3f}{interval:>20}"
            f"{s['in_class']:>10.0%}{s['within_one']:>10.0%}{s['information']:>7.2f}{s['cut_off']:>9.1%}"
        )
    return "\n".join(lines)
