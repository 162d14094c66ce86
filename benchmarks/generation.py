"""Throughput of sampling on the tiny profile: in batches with shared prompts, against transformers' `generate`.

python benchmarks/generation.py RUN        RUN is a finished one; results: benchmarks/results/generation-cpu.json

The ways take turns in one process; medians over the rounds. Times are processor seconds, which other programs disturb less.
One-by-one samples a few of the prompts that the batches hold, so all numbers are per reply. Greedy texts must be equal. The
library's batches are padded at the left, and end at the end token alone: stop strings differ from story to story.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "generation-cpu.json"
CONVERSATIONS, FEW, ROUNDS = 40, 2, 3


def main(run: str) -> None:
    import torch

    from helpers import environment

    environment.quiet()
    torch.set_num_threads(1)
    from helpers.evaluation import CONDITIONS, held_out
    from helpers.experiment import load_run
    from helpers.files import write_json
    from helpers.generation import Prompt, Sampling, _reply, generate_replies

    profile, model, tokenizer = load_run(run)
    stories = held_out(profile, CONVERSATIONS)
    prompts = [Prompt.of(s.before_reply(0), tokenizer, c) for s in stories for c in CONDITIONS]
    few = prompts[: FEW * len(CONDITIONS)]
    greedy = Sampling(temperature=0.0)
    ends = {tokenizer.eos_token_id}

    def library(prompt: Prompt, **how) -> tuple[str, int]:
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, max_new_tokens=420, stop_strings=list(prompt.stops), tokenizer=tokenizer,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **how,
            )  # fmt: skip
        row = out[0, ids.shape[1] :].tolist()
        return _reply(tokenizer, row, prompt, ends).text, len(row)

    def library_in_batches(size: int) -> list[int]:
        """Tokens of each reply; what a row is padded with, before and behind, does not count."""
        made = []
        for start in range(0, len(prompts), size):
            rows = [p.ids for p in prompts[start : start + size]]
            width = max(map(len, rows))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(r)) + list(r) for r in rows])
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=420, do_sample=True, temperature=0.8,
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                )[:, width:].tolist()  # fmt: skip
            made += [1 + row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row) for row in out]
        return made

    ways = {
        "transformers generate, one by one": lambda: [library(p, do_sample=True, temperature=0.8)[1] for p in few],
        "transformers generate, batches of 64": lambda: library_in_batches(64),
        "ours, one by one": lambda: [generate_replies(model, tokenizer, [p])[0].tokens for p in few],
        "ours, batches of 64": lambda: [r.tokens for r in generate_replies(model, tokenizer, prompts, batch_size=64)],
        "ours, batches of 256": lambda: [r.tokens for r in generate_replies(model, tokenizer, prompts, batch_size=256)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS):
        for name, way in ways.items():
            began = time.process_time()
            made = way()
            spent = time.process_time() - began
            seconds[name].append(spent / len(made))
            tokens[name].append(sum(made) / spent)
            print(f"round {turn + 1}  {name:<38}{seconds[name][-1]:8.4f} s a reply {tokens[name][-1]:8.0f} tokens/s", flush=True)
    alone = [library(p, do_sample=False)[0] for p in few]
    together = [r.text for r in generate_replies(model, tokenizer, prompts, greedy, batch_size=256)[: len(few)]]
    median = {name: statistics.median(values) for name, values in tokens.items()}
    slowest = median["transformers generate, one by one"]
    rows = {
        name: {
            "seconds a reply": statistics.median(seconds[name]),
            "tokens per second": median[name],
            "times the library one by one": median[name] / slowest,
            "spread": (max(tokens[name]) - min(tokens[name])) / median[name],
        }
        for name in ways
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    result = {
        "ways": rows,
        "greedy texts equal": sum(a == b for a, b in zip(alone, together, strict=True)) / len(few),
        "replies": {"batched": len(prompts), "one by one": len(few), "rounds": ROUNDS},
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        "seed": 0,
        "commit": commit,
    }
    write_json(RESULTS, result)
    for name, row in rows.items():
        print(f"{name:<38}{row['tokens per second']:8.0f} tokens/s {row['times the library one by one']:6.1f}x")


if __name__ == "__main__":
    main(sys.argv[1])
