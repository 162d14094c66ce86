"""Does `(length = …)` work? The experiment that the model card shows only as a picture, with its statistics.

Every held-out conversation is asked for a reply at each of the ten lengths and without modifier. The effect is measured
over single replies, not over class means (ten means rise together even when single replies hardly follow), and the same
is done with the untouched base model, which must not show it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.generation import Progress, Prompt, Sampling, generate_replies
from helpers.lengths import LENGTHS, count_words, length_class
from helpers.profiles import ROOT, Profile
from helpers.stories import Story, load_stories
from helpers.training import write_json

CONDITIONS: tuple[str | None, ...] = (*LENGTHS, None)


def held_out(profile: Profile, count: int, reply: int = 0, max_prompt_words: int = 330) -> list[Story]:
    """Conversations that no training saw, each with at least `reply` + 1 character replies.

    tiny: generated from seeds of their own; otherwise the held-out sample stories. For a fair comparison all conversations
    fit the context with room for the longest reply.
    """
    if not profile.stories.startswith("generated:"):
        stories = load_stories(ROOT / "data_samples" / "heldout")
        return [s for s in stories if len(s.replies) > reply][:count]
    from helpers.tiny import EVALUATION_SEED
    from helpers.tiny_stories import make_story

    chosen: list[Story] = []
    seed = EVALUATION_SEED
    while len(chosen) < count:
        story = make_story(seed, max_words=380)
        seed += 1
        if len(story.replies) > reply:
            words = sum(count_words(m.text) for m in story.before_reply(reply).messages)
            if words <= max_prompt_words:
                chosen.append(story)
    return chosen


@dataclass(frozen=True)
class LengthTable:
    """Replies measured in words, by condition. `replies` has one row a reply; everything else follows from it."""

    label: str
    replies: list[dict[str, Any]]  # condition, story, words, tokens, end, text
    natural: list[int]  # words of the conversations' own replies at the same place
    sampling: dict[str, Any]
    reply: int  # which reply of the conversation was asked for; 0 = the first

    def words(self, condition: str | None) -> list[int]:
        return [r["words"] for r in self.replies if r["condition"] == condition]

    @property
    def conditions(self) -> list[str | None]:
        present = {r["condition"] for r in self.replies}
        return [c for c in CONDITIONS if c in present]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a condition: n, mean with bootstrap 95 % interval, quartiles, share in and within one class, share cut off."""
        table = []
        for c in self.conditions:
            words = sorted(self.words(c))
            low, high = bootstrap_mean(words)
            steps = [abs(LENGTHS.index(length_class("x " * w)) - LENGTHS.index(c)) for w in words] if c else []
            table.append(
                {
                    "length": c or "(none)",
                    "n": len(words),
                    "mean": sum(words) / len(words),
                    "low": low,
                    "high": high,
                    "q25": _quantile(words, 0.25),
                    "median": _quantile(words, 0.5),
                    "q75": _quantile(words, 0.75),
                    "in class": sum(s == 0 for s in steps) / len(steps) if steps else None,
                    "within one": sum(s <= 1 for s in steps) / len(steps) if steps else None,
                    "cut off": sum(r["end"] == "limit" for r in self.replies if r["condition"] == c) / len(words),
                }
            )
        return table

    @property
    def statistics(self) -> dict[str, float]:
        """Rank correlations between asked class and words over single replies, and the shares over all classes."""
        from scipy.stats import kendalltau, spearmanr

        asked = [r for r in self.replies if r["condition"] is not None]
        ranks = [LENGTHS.index(r["condition"]) for r in asked]
        words = [r["words"] for r in asked]
        rho, tau = spearmanr(ranks, words), kendalltau(ranks, words)
        classes = [r for r in self.rows if r["in class"] is not None]
        means = [r["mean"] for r in classes]
        return {
            "replies": len(asked),
            "spearman": float(rho.statistic),
            "spearman_p": float(rho.pvalue),
            "kendall": float(tau.statistic),
            "in_class": sum(r["in class"] for r in classes) / len(classes),
            "within_one": sum(r["within one"] for r in classes) / len(classes),
            "rising_means": sum(b > a for a, b in itertools.pairwise(means)) / max(1, len(means) - 1),
            "cut_off": sum(r["end"] == "limit" for r in self.replies) / len(self.replies),
        }

    def __str__(self) -> str:
        lines = [
            f"{'length':<11}{'n':>4}{'mean words':>12}{'95 % interval':>17}{'median':>8}{'in class':>10}{'±1 class':>10}"
            f"{'cut off':>9}"
        ]
        for r in self.rows:
            shares = "".join(f"{'' if r[k] is None else f'{r[k]:.0%}':>10}" for k in ("in class", "within one"))
            interval = f"[{r['low']:.1f}, {r['high']:.1f}]"
            lines.append(
                f"{r['length']:<11}{r['n']:>4}{r['mean']:>12.1f}{interval:>17}{r['median']:>8.0f}{shares}{r['cut off']:>9.0%}"
            )
        s = self.statistics
        lines.append(
            f"{self.label}: Spearman {s['spearman']:+.2f} and Kendall {s['kendall']:+.2f} over {s['replies']} single replies "
            f"(p = {s['spearman_p']:.1g}); in class {s['in_class']:.0%}, within one {s['within_one']:.0%}"
        )
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**dataclasses.asdict(self), "rows": self.rows, "statistics": self.statistics})
        return path

    @classmethod
    def load(cls, path: str | Path) -> LengthTable:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{f.name: data[f.name] for f in dataclasses.fields(cls)})


def bootstrap_mean(values: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def _quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def measure_length_control(
    model,
    tokenizer,
    stories: Sequence[Story],
    sampling: Sampling | None = None,
    reply: int = 0,
    samples: int = 1,
    conditions: Sequence[str | None] = CONDITIONS,
    label: str = "adapter",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> LengthTable:
    """Ask each conversation for its reply number `reply` under every condition, `samples` times.

    Earlier replies keep the modifiers of their own lengths, as in training. Raises ValueError without conversations.
    """
    if not stories:
        raise ValueError("no conversation to measure: none is held out, or none is deep enough")
    sampling = sampling or Sampling()
    cases, prompts = [], []
    for number, story in enumerate(stories):
        before = story.before_reply(reply)
        history = [length_class(m.text) for m in before.replies]
        for condition in conditions:
            for _ in range(samples):
                cases.append((number, condition))
                prompts.append(Prompt.of(before, tokenizer, condition, history))
    answers = generate_replies(model, tokenizer, prompts, sampling, batch_size, progress)
    rows = [
        {"condition": c, "story": n, "words": count_words(a.text), "tokens": a.tokens, "end": a.end, "text": a.text}
        for (n, c), a in zip(cases, answers, strict=True)
    ]
    natural = [count_words(s.replies[reply].text) for s in stories]
    return LengthTable(label, rows, natural, dataclasses.asdict(sampling), reply)
