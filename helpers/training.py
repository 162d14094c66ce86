"""The training run: the card's recipe on any profile, with router losses, a log to plot, and exact resume.

The loop is that of `trainer`, a thin subclass of transformers' Trainer; what a run leaves in its folder stands in `resume`, what
it says of itself in `run_log`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

from helpers import budget, fused, qlora, resume
from helpers.attention import DOCUMENTS, check_packing, choose_attention
from helpers.audit import audit
from helpers.data import Corpus, Labelled, build_corpus, labelled_stories
from helpers.environment import download_note, gpu_memory_gib, hardware, host_memory_gib, versions
from helpers.files import read_json, sha256, sync, write_json
from helpers.held_out import HeldOutLoss, held_out_stories
from helpers.profiles import KEPT_CHECKPOINTS, PROFILES, Profile
from helpers.quantization import load_4bit
from helpers.resume import alone
from helpers.router_losses import attach_router_losses
from helpers.run_log import Log, Progress, memory_gib, print_progress, read_log, total_seconds
from helpers.stories import Story
from helpers.tokens import IGNORED
from helpers.trainer import CourseTrainer, Interruptible, NumberedCollator, StopAfter, arguments

__all__ = [
    "CourseTrainer",
    "TrainingResult",
    "arguments",
    "load_result",
    "prepare_model",
    "print_progress",
    "profile_of",
    "read_log",
    "total_seconds",
    "train",
]


ENGINES = {  # that `accelerate launch` may be told to use
    "FSDP": "FSDP is not supported: accelerate leaves packed weights whole in every process, so only adapters would be shared "
    "out, and on CPUs it silently makes a DDP run of it; start with --multi_gpu instead",
    "DEEPSPEED": "DeepSpeed is not supported: its engine scales losses by itself; start with --multi_gpu instead",
}
OF_PROFILE = "the profile's"  # what run.json says of stories that were not given


@dataclass(frozen=True)
class TrainingResult:
    """A run on disk."""

    run_dir: Path
    finished: bool
    step: int
    total_steps: int
    history: list[dict[str, Any]]  # the rows of log.jsonl
    facts: dict[str, Any]  # result.json of a finished run

    @property
    def adapter(self) -> Path:
        return self.run_dir / "adapter"


def _causal_lm(profile: Profile) -> type:
    """The class of the profile's base model; ValueError for a model that does not write text, or not as much as is asked."""
    config = AutoConfig.from_pretrained(profile.base_path)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{profile.base} is a {config.model_type} model, which is no causal language model: "
            "choose a mixture of experts that continues text, such as allenai/OLMoE-1B-7B-0924"
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and profile.context > longest:
        raise ValueError(f"{profile.base} reads at most {longest:,} tokens: choose a context up to that, not {profile.context:,}")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def prepare_model(profile: Profile, attention: str = DOCUMENTS):
    """The profile's base model in audited 4 bit with fresh adapters; `attention` as from `choose_attention`."""
    set_seed(profile.seed)  # LoRA's initial A is random
    model = load_4bit(profile.base_path, dtype=profile.dtype, attn_implementation=attention)
    model.config.use_cache = False
    model = qlora.add_lora(
        model, profile.lora_r, profile.lora_alpha, profile.lora_dropout, experts=profile.lora_experts, router=profile.lora_router
    )
    if profile.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def train(
    profile: Profile,
    stories: Sequence[Story] | Sequence[Labelled] | None,
    output_dir: str | Path,
    resume: bool = True,
    progress: Progress | None = print_progress,
    log_every: int | None = None,
    stop_after: int | None = None,
    held_out: Sequence[Labelled] | None = None,
    shrink: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    attention: str | None = None,
    fused_kernels: bool = False,
    skip_too_long: bool = False,
    say: Callable[[str], None] | None = None,
    keep_checkpoints: int = KEPT_CHECKPOINTS,
) -> TrainingResult:
    """Train adapters; continue from the last checkpoint if there is one; return at once if the run is finished.

    stories: stories, or (story, lengths) pairs, or None for those of the profile. `resume=False` refuses a folder that
    already holds a run. `stop_after` ends with a checkpoint after that step, as an interruption would. `held_out`: what the
    evaluation loss in the log is measured on (None: the profile's; empty: nothing). `shrink`: when the GPU's memory does not
    suffice, go on from the last checkpoint with half the micro-batch and twice the accumulation. The rows of a step stay
    the same, so without dropout the trajectory does too, but for rounding and the balancing loss, which is a product of two
    means of each micro-batch (one process only: of several, each would wait).
    `attention`: transformers' name of one, instead of what `choose_attention` finds. `fused_kernels`: those of `helpers.fused`,
    which no GPU has run yet. `log_every`: steps from one row of the log to the next (None: 10, or 1 in a run of up to 200
    steps). `keep_checkpoints`: how many of the last ones stay on the disk. `skip_too_long`: leave out stories of which nothing
    fits the context, and name them; otherwise they are refused, all in one error. `say` is told what the run is made of and
    where it is.

    ValueError for a folder with another run, or that another process writes into, other settings or damaged checkpoints;
    OSError if it cannot be written; FloatingPointError if loss or gradient are not finite; torch.OutOfMemoryError with advice.
    """
    if isinstance(profile, str):
        raise TypeError(f"profile {profile!r} is a name: give PROFILES[{profile!r}] of helpers.profiles")
    if isinstance(stories, (str, Path)):
        raise TypeError(f"stories {str(stories)!r} is a path: give load_stories({str(stories)!r}) of helpers.stories")
    for engine, refusal in ENGINES.items():  # first: what follows would start the engine
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true":
            raise ValueError(refusal)
    main = accelerate.PartialState(cpu=not torch.cuda.is_available()).is_main_process
    if fused_kernels:
        fused.check()  # of several processes, each its own GPU
    output_dir = _writable(Path(output_dir))
    with alone(output_dir) if main else contextlib.nullcontext():
        say = say or (lambda _text: None)
        run = _Run.begin(profile, stories, output_dir, resume, attention, fused_kernels, skip_too_long, say)
        if isinstance(run, TrainingResult):
            return run
        run.keep = max(1, keep_checkpoints)
        while True:
            try:
                result = run.sitting(progress, log_every, stop_after, held_out, callbacks)
            except torch.OutOfMemoryError as error:
                problem = str(error)
            else:
                free()  # what comes next is often the same model once more
                return result
            run.out_of_memory(problem, shrink)  # here the failed sitting's tensors are no longer held by the exception


def _writable(run_dir: Path) -> Path:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{run_dir} cannot be written ({error.strerror}): choose another --output folder") from error
    return run_dir


def free() -> None:
    """Give back what only reference cycles keep: a trainer, its callbacks and its model know each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class _Run:
    """An unfinished run: what a sitting needs."""

    profile: Profile
    run_dir: Path
    corpus: Corpus
    tokenizer: Any
    wanted: dict[str, Any]  # settings
    source: str  # of the stories
    micro_batch: int  # of now: smaller than the profile's after a lack of memory
    attention: str | None = None  # None: the best there is
    fused_kernels: bool = False
    processes: int = 1
    keep: int = KEPT_CHECKPOINTS
    say: Callable[[str], None] = print

    @classmethod
    def begin(
        cls,
        profile: Profile,
        stories,
        run_dir: Path,
        go_on: bool,
        attention: str | None,
        fused_kernels: bool,
        skip_too_long: bool,
        say: Callable[[str], None],
    ) -> _Run | TrainingResult:
        state = accelerate.PartialState(cpu=not torch.cuda.is_available())
        if state.is_main_process and (note := download_note(profile)):
            print(note, flush=True)  # in a notebook, too: it may take an hour
        problem = unfinished(run_dir)
        finished = problem is None
        if problem and (run_dir / "result.json").exists() and state.is_main_process:
            print(f"{problem}: it is made again from the last checkpoint", flush=True)
        if finished and stories is None and go_on:
            before = resume.check_settings(run_dir, resume.settings(profile))
            if before.get("stories") == OF_PROFILE:  # no need to prepare them again
                return load_result(run_dir)
        _causal_lm(profile)  # what cannot be trained is said before its weights are fetched
        tokenizer = AutoTokenizer.from_pretrained(profile.base_path)
        labelled = stories if stories and isinstance(stories[0], tuple) else labelled_stories(profile, stories)
        left_out = {"too_long": []} if skip_too_long else {}
        corpus = build_corpus(labelled, tokenizer, profile.context, long=profile.long_stories, **left_out)
        for problem in left_out.get("too_long", ()) if state.is_main_process else ():
            print(f"left out: {problem}", flush=True)
        wanted = resume.settings(profile, corpus, None if finished else state.num_processes)
        if not go_on and resume.begun(run_dir):
            raise FileExistsError(f"{run_dir} already holds a run: resume it, or use another folder")
        before = resume.check_settings(run_dir, wanted)
        if finished:
            return load_result(run_dir)
        if state.is_main_process and before and before.get("fused_kernels", False) != fused_kernels:
            print("going on with other kernels than before: rounding and dropout's draws are others", flush=True)
        source = OF_PROFILE if stories is None else "given"
        micro_batch, whole = before.get("micro_batch", profile.micro_batch), profile.micro_batch * profile.accumulation
        if not isinstance(micro_batch, int) or micro_batch < 1 or whole % micro_batch:
            raise ValueError(f"{run_dir / 'run.json'} has a micro-batch of {micro_batch!r}, which does not divide {whole} rows")
        how = attention, fused_kernels
        run = cls(profile, run_dir, corpus, tokenizer, wanted, source, micro_batch, *how, state.num_processes, say=say)
        say(f"corpus: {corpus}")
        say(f"{run.steps} steps, {profile.warmup_steps} of them warm-up")
        if profile.warmup_steps > run.steps / 3:
            say("  warning: more than a third, so little is learned at the full learning rate; more stories or epochs help")
        run.note()
        return run

    def note(self) -> None:
        """run.json: the settings, and the micro-batch of now."""
        state = accelerate.PartialState(cpu=not torch.cuda.is_available())
        state.wait_for_everyone()  # all have read it before one writes
        if state.is_main_process:
            facts = {"micro_batch": self.micro_batch, "save_steps": self.profile.save_steps, "stories": self.source}
            facts |= {"versions": versions(), "fused_kernels": self.fused_kernels}
            write_json(self.run_dir / "run.json", {**self.wanted, **facts})

    def out_of_memory(self, problem: str, shrink: bool) -> None:
        """Halve the micro-batch, or raise with advice."""
        free()
        p = self.profile
        first = problem.splitlines()[0] if problem else "out of memory"
        alone = accelerate.PartialState().num_processes == 1  # of several, the others would wait for this one
        if shrink and alone and self.micro_batch > 1 and self.micro_batch % 2 == 0:
            self.micro_batch //= 2
            print(f"out of memory; going on with micro-batch {self.micro_batch} and accumulation {self.accumulation}", flush=True)
            self.note()
            return
        smaller = [
            f"train(…, shrink=True) or --shrink: micro-batch {self.micro_batch // 2} with twice the accumulation, the same total"
            if self.micro_batch % 2 == 0
            else None,
            f"a context below {p.context:,} tokens (--context; longer stories are "
            f"{'split' if p.long_stories == 'split' else 'shortened'})",
            None if p.gradient_checkpointing else "gradient_checkpointing=True",
            f"a smaller lora_r than {p.lora_r} (--lora-r), or lora_experts=False",
            "a smaller profile",
        ]
        raise torch.OutOfMemoryError(
            f"{first}. Profile {p.name} at micro-batch {self.micro_batch} does not fit (peak so far {memory_gib():.1f} GiB; "
            f"{self._budgeted()}). In this order: {'; '.join(filter(None, smaller))}. With other settings, a run that has rows "
            "in its log needs another folder"
        )

    def _budgeted(self) -> str:
        """What the budget says to this run, and to the memory that is there."""
        p = self.profile
        try:
            model = budget.of_profile(p)
        except ValueError as error:
            return str(error)
        options = {"checkpointing": p.gradient_checkpointing, "dropout": p.lora_dropout}
        need = budget.estimate(model, self.micro_batch, p.context, **options).peak / budget.GIB
        gib = gpu_memory_gib() or host_memory_gib()
        fitting = budget.suggest(model, gib, **options) if gib else None
        most = f", and that {gib:.1f} GiB hold {fitting[0]} x {fitting[1]:,}" if fitting else ""
        return f"the budget expects {need:.1f} GiB for {self.micro_batch} x {p.context:,} tokens{most}"

    @property
    def accumulation(self) -> int:
        return self.profile.accumulation * self.profile.micro_batch // self.micro_batch

    @property
    def steps(self) -> int:
        """Of the whole run; more processes make fewer."""
        p = self.profile
        batches = math.ceil(len(self.corpus.rows) / (p.micro_batch * self.processes))
        return p.max_steps if p.max_steps > 0 else math.ceil(p.epochs * math.ceil(batches / p.accumulation))

    def sitting(self, progress, log_every: int | None, stop_after: int | None, held_out, callbacks) -> TrainingResult:
        """From the last checkpoint, or the start, to the end or to an interruption."""
        profile, run_dir, tokenizer, corpus = self.profile, self.run_dir, self.tokenizer, self.corpus
        current = dataclasses.replace(profile, micro_batch=self.micro_batch, accumulation=self.accumulation)
        args = arguments(current, run_dir, log_every or (10 if self.steps > 200 else 1))
        args.device  # noqa: B018  chooses this process's GPU, before the model is loaded onto the current one
        main = args.process_index == 0
        checkpoint = resume.last_good(run_dir, self.wanted, say=print if main else lambda _text: None)
        if checkpoint is not None:
            self.say(f"going on from {checkpoint.name}")
        attention, why = choose_attention(_causal_lm(profile), profile.dtype, self.attention)
        if main and (self.attention or torch.cuda.is_available()):  # elsewhere there is nothing to choose
            print(f"attention: {attention} ({why})", flush=True)
        if main:
            tell = self.say if Path(profile.base_path).is_dir() else print  # a large model takes minutes
            tell(f"loading {profile.base} in 4 bit …")
        model = prepare_model(profile, attention)
        report = audit(model).check()
        if corpus.samples > len(corpus.rows):  # else no row holds several
            half = torch.bfloat16 if args.bf16 else torch.float16
            with torch.autocast(args.device.type, half, enabled=args.bf16 or args.fp16):  # as the trainer runs it
                settled = check_packing(model)
            if main and settled != attention:
                print(f"attention: {settled} ({attention} does not serve this model's packed rows)", flush=True)
        handle = attach_router_losses(model, profile.z_coef, profile.balance_coef)
        if self.fused_kernels:  # last: what runs the model before would be compiled for its few tokens
            stacks = fused.fuse(model)
            if main:
                print(f"fused kernels: in {stacks} expert stacks; the first step compiles what is around them", flush=True)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        labelled = held_out_stories(profile) if held_out is None else list(held_out)
        measure = HeldOutLoss(labelled, tokenizer, profile.context, pad, self.micro_batch) if labelled else None
        if measure is not None and measure.left_out:
            self.say(f"{measure.left_out} of {len(labelled)} held-out stories are longer than the context, and not measured on")
            measure = measure if measure.batches else None
        # With every checkpoint, but in a long run about ten times: it costs as much as some training does.
        log = Log(run_dir, handle, progress, measure, max(profile.save_steps, self.steps // 10))
        if checkpoint is not None:
            log.restored = json.loads((checkpoint / resume.PROGRESS).read_text(encoding="utf-8"))
            if steps := resume.last_step(checkpoint):  # only the result was not written: a Trainer would make one more step
                handle.remove()
                model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
                log.restore(write=main)
                return self._end(model, log, report, steps)
        keeper = resume.Checkpoints(run_dir, self.wanted, log, self.keep, since=checkpoint)
        interruptible = Interruptible()
        ours = [interruptible, *([StopAfter(stop_after)] if stop_after else []), *callbacks]
        rows = corpus.numbered()
        if args.world_size > 1:
            rows = filled(rows, args.world_size * self.micro_batch, pad)
        trainer = CourseTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=NumberedCollator(pad),
            router_losses=handle,
            log=log,
        )
        if main and not trainer.fused:
            print("the model's head is more than a product: logits are built wherever a token is trained (memory!)", flush=True)
        for callback in (*ours, log, keeper):  # behind the guard, which hands each step to the log
            trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)  # our log rows say more
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Exception as error:  # each library has its own for a disk that is full
            if not keeper.writing:
                raise
            step = trainer.state.global_step
            raise OSError(
                f"the checkpoint of step {step} could not be written to {run_dir} ({error}): make room, then run the same "
                "command again; it continues from the last whole checkpoint"
            ) from error
        finally:
            handle.remove()
            interruptible.restore()
        state = trainer.state
        if state.global_step < state.max_steps:
            return TrainingResult(run_dir, False, state.global_step, state.max_steps, log.rows, {})
        return self._end(model, log, report, state.global_step)

    def _end(self, model, log: Log, report, steps: int) -> TrainingResult:
        """All steps are made: process 0 writes the result, all read it."""
        model.config.use_cache = True
        state = accelerate.PartialState()
        if state.is_main_process:
            facts = self._facts(model, log, report, steps)
            try:
                self._write(model, facts)
            except Exception as error:  # each library has its own for a disk that is full
                raise OSError(
                    f"the finished adapter could not be written to {self.run_dir} ({error}): make room, or what it wants, and "
                    "run the same command again; it takes the adapter from the last checkpoint and trains nothing again"
                ) from error
        state.wait_for_everyone()
        return load_result(self.run_dir)

    def _write(self, model, facts: dict[str, Any]) -> None:
        """The adapter and result.json: only with the latter the run counts as finished."""
        partial, final = self.run_dir / "adapter.partial", self.run_dir / "adapter"
        for folder in (partial, final):
            shutil.rmtree(folder, ignore_errors=True)
        qlora.save_lora(model, partial)
        self.tokenizer.save_pretrained(partial)
        for file in partial.rglob("*"):
            sync(file)
        partial.rename(final)
        sync(self.run_dir)
        write_json(self.run_dir / "result.json", {**facts, "adapter_sha256": sha256(final / SAFETENSORS_WEIGHTS_NAME)})

    def _facts(self, model, log: Log, report, steps: int) -> dict[str, Any]:
        """What result.json says."""
        return {
            "profile": self.profile.name,
            "steps": steps,
            "corpus": dataclasses.asdict(dataclasses.replace(self.corpus, rows=[], names=[])),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "audit": report.table,
            "quantization": model.config.quantization_config.to_dict(),
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "processes": self.processes,
            "attention": model.config._attn_implementation,
            "seconds": total_seconds(log.rows),
            "tokens_per_second": log.rows[-1]["tokens_per_second"],
            "peak_gib": max(row["memory_gib"] for row in log.rows) if torch.cuda.is_available() else None,
            "adapter_norms": qlora.adapter_norms(model),
            "hardware": hardware(),
            "versions": versions(),
        }


def filled(rows: list[dict[str, Any]], multiple: int, pad: int) -> list[dict[str, Any]]:
    """Rows and, up to the next multiple, rows of one token without loss: or several processes would be given some rows twice."""
    empty = {"input_ids": [pad], "labels": [IGNORED], "position_ids": [0], "number": -1, "stories": []}
    return rows + [empty] * (-len(rows) % multiple)


def unfinished(run_dir: Path) -> str | None:
    """What a finished run would have and this one has not; None if it has all. ValueError for a damaged result.json."""
    result, adapter = run_dir / "result.json", run_dir / "adapter"
    if not result.exists():
        return f"{run_dir} holds no finished run"
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (adapter / name).is_file():
            return f"{adapter} lacks {name}"
    wanted = load_result(run_dir).facts.get("adapter_sha256")  # runs of older versions do not say
    if wanted and sha256(adapter / SAFETENSORS_WEIGHTS_NAME) != wanted:
        return f"{adapter / SAFETENSORS_WEIGHTS_NAME} is not what the run wrote"
    return None


_AGAIN = "delete it, and the same training command writes it again from the last checkpoint"


def profile_of(run_dir: str | Path) -> Profile:
    """The profile with which a run was made, from its folder."""
    path = Path(run_dir) / "run.json"
    facts = read_json(path, "it says how the run was made, so train again, into another folder")
    try:
        usual = PROFILES.get(facts["profile"]["name"], PROFILES["tiny"]).save_steps  # runs of older versions do not say
        return Profile(**facts["profile"], memory_gib=0, save_steps=facts.get("save_steps", usual))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} was written by another version of the course, or changed ({error}): use that version, or train again"
        ) from error


def load_result(run_dir: str | Path) -> TrainingResult:
    """A finished run from its folder."""
    run_dir = Path(run_dir)
    path = run_dir / "result.json"
    if not path.exists():
        raise FileNotFoundError(f"{run_dir} holds no finished run: train it first (python -m helpers train --output {run_dir})")
    facts = read_json(path, _AGAIN)
    if not isinstance(facts, dict) or "steps" not in facts:
        raise ValueError(f"{path} is damaged (it does not say how many steps were made): {_AGAIN}")
    return TrainingResult(run_dir, True, facts["steps"], facts["steps"], read_log(run_dir), facts)
