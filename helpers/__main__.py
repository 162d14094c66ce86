"""`python -m helpers COMMAND`: the functions of the notebooks for long runs, and the upkeep of the course."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

ATTENTIONS = ("sdpa_documents", "sdpa", "eager", "flex_attention", "flash_attention_2")


def _folder(text: str) -> Path:
    """argparse type: a folder's path, which an unset shell variable is not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path of the folder is empty")
    return Path(text)


def _number(kind: type, least: float, above: bool = False, most: float = math.inf):
    """An argument's type: a finite number within bounds, so that a wrong one is answered at once and by its name."""
    bound = f"above {least:g}" if above else f"of at least {least:g}"
    what = f"{'a whole number' if kind is int else 'a number'} {bound}" + (f" and at most {most:,}" if most < math.inf else "")

    def read(text: str):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            value, finite = math.nan, False
        if not finite or value < least or (above and value == least) or value > most:
            raise argparse.ArgumentTypeError(f"{text!r}: must be {what}")
        return value

    return read


_count, _positive, _amount = _number(int, 1), _number(float, 0, above=True), _number(float, 0)
_seed = _number(int, 0, most=2**32 - 1)


def _lines_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".jsonl":
        raise argparse.ArgumentTypeError(f"{text!r}: rows are written as JSON lines, into a file whose name ends with .jsonl")
    return path


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
    from helpers.stories import StoryError, duplicates, load_stories, save_stories

    environment.quiet()
    _check_outputs(options)
    problems: list[StoryError] = []
    stories = load_stories(options.path, problems)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    for story in stories:
        for repair in story.repairs:
            print(f"repaired: {story.source}: {repair}", file=sys.stderr)
    for text in duplicates(stories):
        print(f"twice: {text}", file=sys.stderr)
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
            _write(options.trl, (json.dumps(row, ensure_ascii=False) + "\n" for row in interchange.trl_rows(labelled)))
        if options.axolotl:
            tokenizer = tokenizer or data_card.load_tokenizer(profile.base_path)
            rows = interchange.axolotl_rows(labelled, tokenizer, profile.context, profile.long_stories)
            _write(options.axolotl, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            config = interchange.axolotl_yaml(profile, options.axolotl.name)
            _write(options.axolotl.with_suffix(".yaml"), [config])
    return 1 if problems else 0


def _check_outputs(options) -> None:
    """ValueError, before anything is written, for an output that would replace a story, another output, or a file not ours."""
    named = {"--card": options.card, "--jsonl": options.jsonl, "--trl": options.trl, "--axolotl": options.axolotl}
    outputs = {option: file for option, file in named.items() if file}
    config = options.axolotl.with_suffix(".yaml") if options.axolotl else None
    if config:
        outputs["--axolotl (its configuration)"] = config
    home, written = options.path.resolve(), {}
    for option, file in outputs.items():
        place = file.resolve()
        if place == home or (file.exists() and options.path.exists() and file.samefile(options.path)):
            raise ValueError(f"{option} {file} is the file that the stories are read from: write into another one")
        if option != "--card" and options.path.is_dir() and home in place.parents:
            raise ValueError(f"{option} {file} lies in the folder of the stories, and would be read as one: write elsewhere")
        if place in written:
            raise ValueError(f"{option} and {written[place]} would both write {file}: give each a file of its own")
        written[place] = option
    if config and config.exists() and "base_model:" not in config.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"--axolotl would write its configuration into {config}, which is there and is none: choose another name for the rows"
        )


def _write(file: Path, lines) -> None:
    from helpers.files import write_lines

    write_lines(file, lines)
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
        return _rehearse(profile, changes, options.fused_kernels)
    if options.fused_kernels:
        raise ValueError("--fused-kernels goes with --rehearse: the estimate is for torch's own kernels")
    print(budget.estimate(profile, **changes))
    for gpu, gib in budget.GPUS.items():
        found = budget.suggest(model, gib, checkpointing=True if options.checkpointing is None else options.checkpointing)
        print(f"{gpu:<8} at most " + ("nothing of this model" if found is None else f"{found[0]} x {found[1]:,} tokens"))
    return 0


def _rehearse(profile, changes: dict, fused_kernels: bool) -> int:
    from helpers import budget, rehearsal

    checkpointing = changes.pop("checkpointing")
    if checkpointing is not None:
        profile = dataclasses.replace(profile, gradient_checkpointing=checkpointing)
    print("running the step on tensors without storage: less than a minute …", flush=True)
    found = rehearsal.rehearse(profile, **changes, fused_kernels=fused_kernels)
    print(found)
    guess = budget.estimate(profile, **changes)
    print(f"estimated: {guess.peak / budget.GIB:.2f} GiB")
    if profile.dtype != "float32":  # whose speed the data sheets of these GPUs do not tell
        print(f"its {found.kernels.total():,} kernels, each at the data sheet's speed, of {found.flops / 1e12:,.0f} TFLOP:")
        known = [gpu for gpu in rehearsal.SPEEDS if (gpu, profile.dtype) != ("T4", "bfloat16")]
        fitting = [gpu for gpu in known if budget.GPUS.get(gpu, math.inf) * budget.GIB > found.peak]
        for gpu in fitting:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in found.shares(gpu).items())
            print(f"  {found.bound(gpu)}\n    {shares}")
    return 0


def _train(options) -> int:
    from helpers.profiles import choose

    profile, why = choose(options.profile)  # before the slow imports: a wrong name is answered at once
    from helpers import environment

    environment.quiet()
    from helpers import training
    from helpers.stories import StoryError, duplicates, load_stories

    changes = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if options.epochs is not None:
        changes["max_steps"] = -1  # a profile's number of steps would win
    profile = dataclasses.replace(profile, **changes)
    if not Path(profile.base_path).is_dir() and (profile.base.count("/") > 1 or profile.base.startswith((".", "/", "~"))):
        raise ValueError(f"--base {profile.base}: there is no such folder, and a Hub id has the form name/model")

    def say(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(text, flush=True)

    say(f"profile {profile.name} ({why}), base {profile.base}")
    if changes or options.stories:
        own = [name.replace("_", " ") for name in changes] + ["stories"] * bool(options.stories)
        say(f"  yours: {', '.join(own)}. The profile itself is as it is because:")
    for reason in profile.reasons:
        say(f"  - {reason}")
    if not options.anyway:
        _check_machine(profile, options)
    stories = None
    try:
        if options.stories:
            problems = [] if options.skip_bad_stories else None
            stories = load_stories(options.stories, problems)
            for problem in problems or ():
                say(f"left out: {problem}")
            if not stories:
                raise ValueError(f"no story is left to train on: none in {options.stories} can be read")
            for text in duplicates(stories):
                say(f"twice: {text}")
        result = training.train(
            profile,
            stories,
            options.output,
            resume=not options.no_resume,
            log_every=options.log_every,
            shrink=options.shrink,
            attention=options.attention,
            fused_kernels=options.fused_kernels,
            skip_too_long=options.skip_bad_stories,
            keep_checkpoints=options.keep_checkpoints,
            say=say,
        )
    except StoryError as error:
        if not Path(options.stories or "").exists():
            raise
        raise ValueError(f"{error}\n(--skip-bad-stories leaves out such stories, --context N changes the length)") from error
    if not result.finished:
        say(f"stopped after step {result.step} of {result.total_steps}; the same command continues from there")
        return 130
    say(f"finished after {result.step} steps; adapter in {result.adapter}")
    return 0


_SETTINGS = ("max_steps", "epochs", "seed", "z_coef", "balance_coef", "base", "context", "micro_batch", "accumulation")
_SETTINGS += ("learning_rate", "lora_r")


def _check_machine(profile, options) -> None:
    """ValueError for what would fail after an hour: a profile for a larger GPU, a disk without room for the run."""
    from helpers import budget, environment

    anyway = "or say --anyway"
    short = environment.lacking_memory(profile)
    # A shorter context or smaller micro-batch may fit all the same; --shrink gets down to one row.
    rows = 1 if options.shrink else profile.micro_batch
    if (
        short
        and options.base is None  # of another base, the profile's number says nothing
        and not budget.estimate(profile, rows).fits(environment.gpu_memory_gib() or 0.0)
    ):
        raise ValueError(f"profile {profile.name} {short}: leave out --profile for the one that fits here, {anyway}")
    disk = environment.check_disk(profile, options.output, options.keep_checkpoints)
    if not disk.ok:
        raise OSError(f"not enough room on the disk ({disk.detail}): {disk.todo}, {anyway}")


def _evaluate(options) -> int:
    from helpers import environment

    environment.quiet()
    from helpers.evaluation import size_of
    from helpers.experiment import evaluate_run, finished
    from helpers.generation import SAMPLERS, print_progress

    size = size_of(finished(options.run)[1])  # says what to type if there is no finished run
    changes = {k: v for k in ("conversations", "samples", "batch_size") if (v := getattr(options, k)) is not None}
    sampling = dataclasses.replace(SAMPLERS["course"], temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    size = dataclasses.replace(size, **changes)
    more = {"stories": options.stories, "training_stories": options.training_stories}
    try:
        evaluate_run(options.run, size, sampling, options.controls, print_progress, **more)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same evaluate again: it keeps the replies and training steps it has", file=sys.stderr)
        return 130
    return 0


def _chat(options) -> int:
    from helpers import environment

    environment.quiet()
    from helpers.chat import save_transcript, terminal
    from helpers.evaluation import conversations_of, held_out
    from helpers.experiment import load_run
    from helpers.generation import SAMPLERS

    own = conversations_of(options.stories) if options.stories else None  # before the model, which may take minutes
    sampling = dataclasses.replace(SAMPLERS["course"], temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    try:
        profile, model, tokenizer = load_run(options.run)
    except KeyboardInterrupt:
        print("\nstopped before the talk began", file=sys.stderr)
        return 130
    chat = terminal(model, tokenizer, held_out(profile, 6) if own is None else own, sampling=sampling)
    if chat.story.messages:
        try:
            print(f"the talk is kept in {save_transcript(chat, options.run / 'chats')}")
        except OSError as error:
            print(f"{chat.transcript()}\n\nthe talk could not be written to {options.run / 'chats'}: {error}", file=sys.stderr)
            return 2
    return 0


def _share(options) -> int:
    from helpers import environment

    environment.quiet()
    from helpers import sharing

    for name in ("send", "public"):
        if getattr(options, name) and not options.push:
            raise ValueError(f"--{name} belongs to --push USER/NAME: without it nothing is uploaded")
    length = None if options.length == "none" else options.length
    targets = [name for part in options.target or () for name in part.split(",")] or sharing.TARGETS
    folders = {"merged": options.merged, "per_expert": options.per_expert}
    sharing.check_request(
        options.run, targets, options.char, options.user, length, options.base_name, repo_id=options.push, **folders
    )
    datasets = [name for part in options.dataset or () for name in part.split(",")]
    names = {"char": options.char, "user": options.user, "base_name": options.base_name}
    for path in sharing.bundle(options.run, datasets, options.license, length, targets=targets, **names):
        print(path)
    for target in targets:
        print(sharing.export(options.run, target, length=length, **names))
    if options.merged:
        print(sharing.merge_run(options.run, options.merged))
    if options.per_expert:
        print(sharing.export_per_expert(options.run, options.per_expert))
    if options.push:
        sharing.push_to_hub(options.run, options.push, send=options.send, private=not options.public)
    return 0


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="from the likeliest tokens up to this share (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of the drawing (default: %(default)s)")


def command_line() -> argparse.ArgumentParser:
    from helpers.profiles import KEPT_CHECKPOINTS

    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("doctor", help="is this machine ready?").set_defaults(run_command=_doctor)

    course = commands.add_parser("course", help="run the notebooks in order; page in build/")
    course.add_argument("--in-place", action="store_true", help="write the outputs into notebooks/ as well")
    course.add_argument("--only", nargs="+", help="parts of notebook names")
    course.set_defaults(run_command=_course)

    compare = commands.add_parser("compare", help="do the committed outputs still hold? (`make test` asks)")
    compare.add_argument("folder", help="notebooks of the same names that were run")
    compare.set_defaults(run_command=_compare)

    stamp = commands.add_parser("stamp", help="after a fork: write the repository's address into badges and set-up cells")
    stamp.add_argument("url", nargs="?", help="https://github.com/you/moe-course; without it, the present one again")
    stamp.add_argument("--ref", default="main", help="branch or tag that the badges open (default: main)")
    stamp.set_defaults(run_command=_stamp)

    stories = commands.add_parser("stories", help="check and describe your stories; write them for other programs")
    stories.add_argument("path", type=Path, help="a folder of stories, or one .yaml, .json or .jsonl file")
    stories.add_argument("--tokenizer", help='folder or Hub id, to count tokens; "mixtral" is Mixtral-8x7B\'s own, offline')
    stories.add_argument("--card", type=Path, help="write the statistics into this Markdown file, between its marks")
    stories.add_argument("--jsonl", type=_lines_file, help="write the stories as JSON lines, cleaned")
    stories.add_argument("--axolotl", type=_lines_file, help="write rows for Axolotl (.jsonl) and its configuration (.yaml)")
    stories.add_argument("--trl", type=_lines_file, help="write rows for TRL's SFTTrainer (.jsonl)")
    stories.add_argument("--profile", help="whose omission rate, seed and recipe the exports take")
    stories.set_defaults(run_command=_stories)

    budget = commands.add_parser("budget", help="memory of a training step by part, and what fits which GPU")
    budget.add_argument("--profile", help="tiny, t4, l4, a100-40 or a100-80; default: what fits this machine")
    budget.add_argument("--micro-batch", type=_count, help="rows a forward pass; default: the profile's")
    budget.add_argument("--context", type=_count, help="tokens per row; default: the profile's")
    either = budget.add_mutually_exclusive_group()
    either.add_argument("--checkpointing", action="store_const", const=True, help="with gradient checkpointing, always")
    either.add_argument("--no-checkpointing", dest="checkpointing", action="store_const", const=False, help="without it")
    budget.add_argument("--rehearse", action="store_true", help="count instead: run the step on tensors without storage")
    budget.add_argument("--fused-kernels", action="store_true", help="with --rehearse: the kernels of train's --fused-kernels")
    budget.set_defaults(run_command=_budget)

    train = commands.add_parser("train", help="train adapters, or continue an interrupted run")
    train.add_argument("--keep-checkpoints", type=_number(int, 1), default=KEPT_CHECKPOINTS, help="how many (%(default)s)")
    train.add_argument("--output", type=_folder, required=True, help="run folder; an unfinished run in it is continued")
    train.add_argument("--profile", help="tiny, t4, l4, a100-40 or a100-80; default: what fits")
    train.add_argument("--stories", type=Path, help="folder of stories, or a .jsonl file; default: the profile's")
    train.add_argument(
        "--skip-bad-stories", action="store_true", help="leave out stories that cannot be read or are too long, and say which"
    )
    train.add_argument("--base", help="another base model: folder or Hub id")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=_count, help="end after this step")
    length.add_argument("--epochs", type=_positive, help="how often each story is seen, instead of a number of steps")
    train.add_argument("--context", type=_count, help="tokens in a packed row: the longest story that fits whole")
    train.add_argument("--learning-rate", type=_positive, help="the highest one, after the warm-up")
    train.add_argument("--lora-r", type=_count, help="rank of the adapters; their factor alpha stays the profile's")
    train.add_argument("--seed", type=_seed, help="of the adapters' first values, the order of the data, dropout and labels")
    train.add_argument("--z-coef", type=_amount, help="weight of the router z-loss; 0 leaves it out")
    train.add_argument("--balance-coef", type=_amount, help="weight of the balancing loss; 0 leaves it out")
    train.add_argument("--micro-batch", type=_count, help="rows in one forward pass of one process")
    train.add_argument("--accumulation", type=_count, help="forward passes of a process for one step; halve it for two GPUs")
    train.add_argument(
        "--log-every", type=_count, help="steps from one row of log.jsonl to the next; default: 10, or 1 in a short run"
    )
    train.add_argument(
        "--shrink", action="store_true", help="if memory runs out, go on with half the micro-batch, added up twice"
    )
    train.add_argument("--attention", choices=ATTENTIONS, help="how packed rows are computed; default: the best here")
    train.add_argument(
        "--fused-kernels",
        action="store_true",
        help="Triton kernels for what experts do between products; for GPUs from Ampere on, and not yet run on one",
    )
    train.add_argument("--anyway", action="store_true", help="although the GPU or the disk is too small for the profile")
    train.add_argument("--no-resume", action="store_true", help="refuse a folder that already holds a run")
    train.set_defaults(run_command=_train)

    evaluate = commands.add_parser("evaluate", help="measure length control of a finished run, and of its base")
    evaluate.add_argument("run", type=Path, help="folder of a finished run")
    evaluate.add_argument("--conversations", type=int, help="held-out conversations (default: by profile)")
    evaluate.add_argument("--samples", type=int, help="replies per conversation and length (default: by profile)")
    evaluate.add_argument("--batch-size", type=int, help="rows that are sampled at once (default: by profile)")
    evaluate.add_argument("--controls", action="store_true", help="also train and measure an adapter on shuffled labels")
    evaluate.add_argument("--stories", type=Path, help="conversations to measure: a folder of stories, or a .jsonl file")
    evaluate.add_argument(
        "--training-stories", type=Path, help="with --controls: where the stories are that the run was trained on"
    )
    _sampling_options(evaluate)
    evaluate.set_defaults(run_command=_evaluate)

    chat = commands.add_parser("chat", help="talk to a character of a finished run")
    chat.add_argument("run", type=Path, help="folder of a finished run")
    chat.add_argument("--stories", type=Path, help="characters of your own: a folder of stories, or a .jsonl file")
    _sampling_options(chat)
    chat.set_defaults(run_command=_chat)

    share = commands.add_parser("share", help="model card, chat template, presets, checksums; upload")
    share.add_argument("run", type=Path, help="folder of a finished run")
    share.add_argument("--target", action="append", help="only this export (several: a,b or once more); default: all")
    share.add_argument("--char", default="Character", help="the character's name in files for servers that know no names")
    share.add_argument("--user", default="User", help="the user's name in them")
    share.add_argument("--length", default="medium", help="the length that the presets ask for, or none")
    share.add_argument("--merged", type=Path, help="also write base and adapter as one bf16 checkpoint into this folder")
    share.add_argument("--per-expert", type=Path, help="also write the adapter in transformers 4's layout (vLLM, llama.cpp)")
    share.add_argument("--base-name", metavar="ORG/NAME", help="the base's Hub id, if it was trained from a folder")
    share.add_argument("--dataset", action="append", help="Hub id of the training data, for the card (several: a,b or once more)")
    share.add_argument("--license", help="Hub license id, for the card")
    share.add_argument("--push", metavar="USER/NAME", help="list what an upload would send; nothing is sent")
    share.add_argument("--send", action="store_true", help="with --push: send that list and nothing else")
    share.add_argument("--public", action="store_true", help="with --push: not private")
    share.set_defaults(run_command=_share)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    try:
        return options.run_command(options)
    except KeyboardInterrupt:
        again = "; the same command goes on from what is there" if options.run_command in (_train, _evaluate) else ""
        print(f"\ninterrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        ours = isinstance(error, (ValueError, OSError, FloatingPointError))
        if os.environ.get("COURSE_TRACEBACK") or not (ours or _foreseen(error)):
            raise
        print(f"error: {error if ours else _sentence(error)}", file=sys.stderr)
        return 2


LIBRARIES = ("httpx", "requests", "urllib3", "huggingface_hub", "safetensors", "tokenizers", "yaml", "bitsandbytes")


def _foreseen(error: Exception) -> bool:
    """Failures that come from outside: of the network, of a file, of a model that a library or an audit refuses."""
    return isinstance(error, (RuntimeError, ImportError)) or type(error).__module__.split(".")[0] in LIBRARIES


def _sentence(error: Exception) -> str:
    """One line of an error; an OutOfMemoryError of ours says all there is to say, others say where to look."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; to import torch here would make every command slow
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{first} ({type(error).__name__}; with COURSE_TRACEBACK=1 in the environment, the same command shows where)"


if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):  # into a file or a pipe, Windows would write its old code page
        stream.reconfigure(encoding="utf-8")
    if sys.stdin is not None and not sys.stdin.isatty():  # and read it; a console is UTF-8 already
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(main())
