"""`python -m helpers doctor | course | train | evaluate | share`: the notebooks' functions, for long runs."""

from __future__ import annotations

import argparse
import dataclasses
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


def _train(options) -> int:
    from helpers.profiles import choose

    profile, why = choose(options.profile)  # before the slow imports: a wrong name is answered at once
    from helpers import environment, training
    from helpers.stories import load_stories

    environment.quiet()
    changes = {k: v for k in ("max_steps", "seed", "z_coef", "base") if (v := getattr(options, k)) is not None}
    profile = dataclasses.replace(profile, **changes)
    print(f"profile {profile.name} ({why}), base {profile.base}")
    for reason in profile.reasons:
        print(f"  - {reason}")
    stories = load_stories(options.stories) if options.stories else None
    result = training.train(profile, stories, options.output, resume=not options.no_resume)
    if not result.finished:
        print(f"stopped after step {result.step} of {result.total_steps}; the same command continues from there")
        return 130
    print(f"finished after {result.step} steps; adapter in {result.adapter}")
    return 0


def _load(run_dir: Path):
    from transformers import AutoTokenizer

    from helpers.qlora import load_lora
    from helpers.quantization import load_4bit
    from helpers.training import load_result, profile_of

    result = load_result(run_dir)
    profile = profile_of(run_dir)
    model = load_lora(load_4bit(profile.base_path, dtype=profile.dtype), result.adapter)
    return profile, model, AutoTokenizer.from_pretrained(result.adapter)


def _evaluate(options) -> int:
    from helpers import environment
    from helpers.evaluation import held_out, measure_length_control
    from helpers.generation import Sampling

    environment.quiet()
    profile, model, tokenizer = _load(options.run)
    stories = held_out(profile, options.conversations, options.reply)
    sampling = Sampling(temperature=options.temperature, seed=options.seed)

    def progress(done: int, total: int) -> None:
        print(f"\r{done}/{total} replies", end="", file=sys.stderr, flush=True)

    for label in ("adapter", "base"):
        with model.disable_adapter() if label == "base" else _nothing():
            table = measure_length_control(model, tokenizer, stories, sampling, options.reply, label=label, progress=progress)
        print(file=sys.stderr)
        print(table)
        table.save(options.run / "evaluation" / f"{label}-reply{options.reply}.json")
    return 0


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def _share(options) -> int:
    from helpers import sharing

    print(sharing.write_model_card(options.run))
    for target in options.target or sharing.TARGETS:
        print(sharing.export(options.run, target))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("doctor", help="is this machine ready?").set_defaults(run_command=_doctor)

    course = commands.add_parser("course", help="run the notebooks in order; page in build/")
    course.add_argument("--in-place", action="store_true", help="write the outputs into notebooks/ as well")
    course.add_argument("--only", nargs="*", help="parts of notebook names")
    course.set_defaults(run_command=_course)

    train = commands.add_parser("train", help="train adapters, or continue an interrupted run")
    train.add_argument("--output", type=Path, required=True, help="run folder; an unfinished run in it is continued")
    train.add_argument("--profile", help="tiny, t4, l4, a100-40 or a100-80; default: what fits")
    train.add_argument("--stories", type=Path, help="folder of story files; default: the profile's")
    train.add_argument("--base", help="another base model: folder or Hub id")
    train.add_argument("--max-steps", type=int)
    train.add_argument("--seed", type=int)
    train.add_argument("--z-coef", type=float)
    train.add_argument("--no-resume", action="store_true", help="refuse a folder that already holds a run")
    train.set_defaults(run_command=_train)

    evaluate = commands.add_parser("evaluate", help="measure length control of a finished run, and of its base")
    evaluate.add_argument("run", type=Path)
    evaluate.add_argument("--conversations", type=int, default=40)
    evaluate.add_argument("--reply", type=int, default=0, help="which reply of the conversation; 0 = the first")
    evaluate.add_argument("--temperature", type=float, default=0.8)
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.set_defaults(run_command=_evaluate)

    share = commands.add_parser("share", help="model card and presets for other software")
    share.add_argument("run", type=Path)
    share.add_argument("--target", nargs="*", help="some of the exports; default: all")
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


if __name__ == "__main__":
    sys.exit(main())
