"""`python -m helpers COMMAND`: the functions of the notebooks for long runs, and the upkeep of the course."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path


def _doctor(_options) -> int:
    from helpers import environment

    checks = environment.doctor()
    print(environment.report(checks))
    return 0 if all(c.ok for c in checks) else 1


def _course(options) -> int:
    from helpers.course import run_course

    run_course(in_place=options.in_place, only=options.only)
    return 0


def _compare(options) -> int:
    from helpers.outputs import compare

    found = compare(options.folder)
    print("\n".join(found) or "the committed outputs are what the notebooks print")
    return 1 if found else 0


def _stamp(options) -> int:
    from helpers import repository

    for path in repository.stamp(options.url or repository.address()[0], options.ref):
        print("stamped", path.relative_to(repository.ROOT))
    print("address:", *repository.address())
    return 0


def _stories(options) -> int:
    import json

    from helpers import data_card, environment
    from helpers.data import labelled_stories
    from helpers.profiles import choose
    from helpers.stories import StoryError, load_stories, save_stories

    environment.quiet()
    problems: list[StoryError] = []
    stories = load_stories(options.path, problems)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    for story in stories:
        for repair in story.repairs:
            print(f"repaired: {story.source}: {repair}", file=sys.stderr)
    if not stories:
        return 2
    name = "mixtral" if options.tokenizer is None and options.card else options.tokenizer
    tokenizer = data_card.load_tokenizer(name) if name else None
    shown = "of Mixtral-8x7B" if name == "mixtral" else f"`{name}`"
    text = data_card.render(data_card.describe(stories, tokenizer, shown))
    print(text)
    if options.card:
        data_card.write_card(options.card, text)
    if options.jsonl:
        print(f"\n{save_stories(stories, options.jsonl)}")
    if options.axolotl or options.trl:
        from helpers import interchange

        profile = choose(options.profile)[0]
        labelled = labelled_stories(profile, stories)
        if options.trl:
            _write_lines(options.trl, interchange.trl_rows(labelled), json.dumps)
        if options.axolotl:
            import yaml

            tokenizer = tokenizer or data_card.load_tokenizer(profile.base_path)
            _write_lines(options.axolotl, interchange.axolotl_rows(labelled, tokenizer), json.dumps)
            config = interchange.axolotl_config(profile, options.axolotl.name)
            options.axolotl.with_suffix(".yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            print(options.axolotl.with_suffix(".yaml"))
    return 1 if problems else 0


def _write_lines(file: Path, rows, dumps) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.replace(file)
    print(file)


def _budget(options) -> int:
    from helpers.profiles import choose

    profile, why = choose(options.profile)
    from helpers import budget, environment

    environment.quiet()
    print(f"profile {profile.name} ({why})")
    model = budget.of_profile(profile)
    changes = {"micro_batch": options.micro_batch, "context": options.context, "checkpointing": options.checkpointing}
    if options.rehearse:
        return _rehearse(profile, changes)
    print(budget.estimate(profile, **changes))
    for gpu, gib in budget.GPUS.items():
        found = budget.suggest(model, gib, checkpointing=True if options.checkpointing is None else options.checkpointing)
        print(f"{gpu:<8} at most " + ("nothing of this model" if found is None else f"{found[0]} x {found[1]:,} tokens"))
    return 0


def _rehearse(profile, changes: dict) -> int:
    import dataclasses

    from helpers import budget, rehearsal

    checkpointing = changes.pop("checkpointing")
    if checkpointing is not None:
        profile = dataclasses.replace(profile, gradient_checkpointing=checkpointing)
    print("running the step on tensors without storage: less than a minute …", flush=True)
    print(rehearsal.rehearse(profile, **changes))
    guess = budget.estimate(profile, **changes)
    print(f"estimated: {guess.peak / budget.GIB:.2f} GiB")
    return 0


def _train(options) -> int:
    from helpers.profiles import choose

    profile, why = choose(options.profile)  # before the slow imports: a wrong name is answered at once
    from helpers import environment, training
    from helpers.stories import load_stories

    environment.quiet()
    changed = ("max_steps", "seed", "z_coef", "base", "micro_batch", "accumulation")
    profile = dataclasses.replace(profile, **{k: v for k in changed if (v := getattr(options, k)) is not None})
    say = print if os.environ.get("RANK", "0") == "0" else lambda _text: None  # of several processes, one speaks
    say(f"profile {profile.name} ({why}), base {profile.base}")
    for reason in profile.reasons:
        say(f"  - {reason}")
    stories = None
    if options.stories:
        problems = [] if options.skip_bad_stories else None
        stories = load_stories(options.stories, problems)
        for problem in problems or ():
            print(f"left out: {problem}", file=sys.stderr)
    changes = {"log_every": options.log_every, "shrink": options.shrink, "attention": options.attention}
    result = training.train(profile, stories, options.output, resume=not options.no_resume, **changes)
    if not result.finished:
        say(f"stopped after step {result.step} of {result.total_steps}; the same command continues from there")
        return 130
    say(f"finished after {result.step} steps; adapter in {result.adapter}")
    return 0


def _evaluate(options) -> int:
    from helpers import environment

    environment.quiet()
    from helpers.evaluation import size_of
    from helpers.experiment import evaluate_run
    from helpers.generation import SAMPLERS, print_progress
    from helpers.training import load_result, profile_of

    load_result(options.run)  # says what to type if there is no finished run
    size = size_of(profile_of(options.run))
    changes = {k: v for k in ("conversations", "samples", "batch_size") if (v := getattr(options, k)) is not None}
    sampling = dataclasses.replace(SAMPLERS["course"], temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    size = dataclasses.replace(size, **changes)
    evaluate_run(options.run, size, sampling, options.controls, print_progress)
    return 0


def _chat(options) -> int:
    from helpers import environment

    environment.quiet()
    from helpers.chat import terminal
    from helpers.evaluation import held_out
    from helpers.experiment import load_run
    from helpers.generation import SAMPLERS

    profile, model, tokenizer = load_run(options.run)
    sampling = dataclasses.replace(SAMPLERS["course"], temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    terminal(model, tokenizer, held_out(profile, 6), sampling=sampling)
    return 0


def _share(options) -> int:
    from helpers import environment, sharing

    environment.quiet()
    length = None if options.length == "none" else options.length
    for path in sharing.bundle(options.run, options.dataset or (), options.license, length):
        print(path)
    for target in options.target or sharing.TARGETS:
        print(sharing.export(options.run, target, options.char, options.user, length))
    if options.merged:
        print(sharing.merge_run(options.run, options.merged))
    if options.push:
        sharing.push_to_hub(options.run, options.push, send=options.send, private=not options.public)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("doctor", help="is this machine ready?").set_defaults(run_command=_doctor)

    course = commands.add_parser("course", help="run the notebooks in order; page in build/")
    course.add_argument("--in-place", action="store_true", help="write the outputs into notebooks/ as well")
    course.add_argument("--only", nargs="*", help="parts of notebook names")
    course.set_defaults(run_command=_course)

    compare = commands.add_parser("compare", help="do the committed outputs still hold? (`make test` asks)")
    compare.add_argument("folder", help="notebooks of the same names that were run")
    compare.set_defaults(run_command=_compare)

    stamp = commands.add_parser("stamp", help="after a fork: write the repository's address into badges and set-up cells")
    stamp.add_argument("url", nargs="?", help="https://github.com/you/moe-course; without it, the present one again")
    stamp.add_argument("--ref", default="main", help="branch or tag that the badges open (default: main)")
    stamp.set_defaults(run_command=_stamp)

    stories = commands.add_parser("stories", help="check and describe your stories; write them for other programs")
    stories.add_argument("path", type=Path, help="a folder of stories, or one .yaml or .jsonl file")
    stories.add_argument("--tokenizer", help='folder or Hub id, to count tokens; "mixtral" is Mixtral-8x7B\'s own, offline')
    stories.add_argument("--card", type=Path, help="write the statistics into this Markdown file, between its marks")
    stories.add_argument("--jsonl", type=Path, help="write the stories as JSON lines, cleaned")
    stories.add_argument("--axolotl", type=Path, help="write rows for Axolotl (.jsonl) and its configuration (.yaml)")
    stories.add_argument("--trl", type=Path, help="write rows for TRL's SFTTrainer (.jsonl)")
    stories.add_argument("--profile", help="whose omission rate, seed and recipe the exports take")
    stories.set_defaults(run_command=_stories)

    budget = commands.add_parser("budget", help="memory of a training step by part, and what fits which GPU")
    budget.add_argument("--profile", help="tiny, t4, l4, a100-40 or a100-80; default: what fits this machine")
    budget.add_argument("--micro-batch", type=int, help="rows a forward pass; default: the profile's")
    budget.add_argument("--context", type=int, help="tokens a row; default: the profile's")
    budget.add_argument("--checkpointing", action="store_const", const=True, help="with gradient checkpointing, always")
    budget.add_argument("--no-checkpointing", dest="checkpointing", action="store_const", const=False, help="without it")
    budget.add_argument("--rehearse", action="store_true", help="count instead: run the step on tensors without storage")
    budget.set_defaults(run_command=_budget)

    train = commands.add_parser("train", help="train adapters, or continue an interrupted run")
    train.add_argument("--output", type=Path, required=True, help="run folder; an unfinished run in it is continued")
    train.add_argument("--profile", help="tiny, t4, l4, a100-40 or a100-80; default: what fits")
    train.add_argument("--stories", type=Path, help="folder of stories, or a .jsonl file; default: the profile's")
    train.add_argument("--skip-bad-stories", action="store_true", help="leave out stories that cannot be read, and say which")
    train.add_argument("--base", help="another base model: folder or Hub id")
    train.add_argument("--max-steps", type=int)
    train.add_argument("--seed", type=int)
    train.add_argument("--z-coef", type=float)
    train.add_argument("--micro-batch", type=int, help="rows in one forward pass of one process")
    train.add_argument("--accumulation", type=int, help="forward passes of a process for one step; halve it for two GPUs")
    train.add_argument(
        "--log-every", type=int, help="steps from one row of log.jsonl to the next; default: 10, or 1 in a short run"
    )
    train.add_argument("--shrink", action="store_true", help="if memory runs out, go on with half the micro-batch, twice")
    train.add_argument(
        "--attention", help="sdpa_documents, sdpa, eager, flex_attention, flash_attention_2; default: the best here"
    )
    train.add_argument("--no-resume", action="store_true", help="refuse a folder that already holds a run")
    train.set_defaults(run_command=_train)

    evaluate = commands.add_parser("evaluate", help="measure length control of a finished run, and of its base")
    evaluate.add_argument("run", type=Path)
    evaluate.add_argument("--conversations", type=int, help="held-out conversations (default: by profile)")
    evaluate.add_argument("--samples", type=int, help="replies a conversation and length (default: by profile)")
    evaluate.add_argument("--batch-size", type=int, help="rows that are sampled at once (default: by profile)")
    evaluate.add_argument("--controls", action="store_true", help="also train and measure an adapter on shuffled labels")
    evaluate.add_argument("--temperature", type=float, default=0.8)
    evaluate.add_argument("--top-p", type=float, default=0.95)
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.set_defaults(run_command=_evaluate)

    chat = commands.add_parser("chat", help="talk to a character of a finished run")
    chat.add_argument("run", type=Path)
    chat.add_argument("--temperature", type=float, default=0.8)
    chat.add_argument("--top-p", type=float, default=0.95)
    chat.add_argument("--seed", type=int, default=0)
    chat.set_defaults(run_command=_chat)

    share = commands.add_parser("share", help="model card, chat template, presets, checksums; upload")
    share.add_argument("run", type=Path)
    share.add_argument("--target", nargs="*", help="some of the exports; default: all")
    share.add_argument("--char", default="Character", help="the character's name in files for servers that know no names")
    share.add_argument("--user", default="User", help="the user's name in them")
    share.add_argument("--length", default="medium", help="the length that the presets ask for, or none")
    share.add_argument("--merged", type=Path, help="also write base and adapter as one bf16 checkpoint into this folder")
    share.add_argument("--dataset", nargs="*", help="Hub ids of the training data, for the card")
    share.add_argument("--license", help="Hub license id, for the card")
    share.add_argument("--push", metavar="USER/NAME", help="list what an upload would send; nothing is sent")
    share.add_argument("--send", action="store_true", help="with --push: send that list and nothing else")
    share.add_argument("--public", action="store_true", help="with --push: not private")
    share.set_defaults(run_command=_share)

    options = parser.parse_args(arguments)
    try:
        return options.run_command(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; to import torch here would make every command slow
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # into a file or a pipe, Windows would write its old code page
        stream.reconfigure(encoding="utf-8")
    sys.exit(main())
