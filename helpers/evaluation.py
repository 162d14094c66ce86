"""Does `(length = …)` work? The experiment that the model card shows only as a picture, with its statistics.

Every held-out conversation is asked for a reply at each of the ten lengths and without modifier, several times. The effect is
measured over single replies, not over class means: ten means rise together even when single replies hardly follow. Intervals
draw whole conversations. A reply that the token limit or the context cut off is longer than it looks; it is counted as such.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from helpers import length_stats as stats
from helpers.files import write_json
from helpers.generation import SAMPLERS, Progress, Prompt, Sampling
from helpers.lengths import LENGTHS, count_words, length_class
from helpers.profiles import ROOT, Profile
from helpers.replies import recorded_replies
from helpers.stories import Story, load_stories

CONDITIONS: tuple[str | None, ...] = (*LENGTHS, None)
FIRST, DEEP = 0, 3  # which reply is asked for; seven messages stand before the fourth
ENDS = {"eos": "e", "stop": "s", "limit": "l"}


@dataclass(frozen=True)
class Size:
    """How much is measured: at both places, `conversations` x 11 conditions x `samples` replies; controls once each."""

    conversations: int = 40
    samples: int = 4
    batch_size: int = 256

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 is needed; leave it out for the profile's own")


def size_of(profile: Profile) -> Size:
    """What a profile can afford. Small batches on a GPU leave room for the key-value cache; there are three held-out stories."""
    return Size() if profile.name == "tiny" else Size(samples=16, batch_size=32)


def held_out(profile: Profile, count: int, reply: int = FIRST, max_prompt_words: int = 330) -> list[Story]:
    """Conversations that no training saw, each with at least `reply` + 1 character replies.

    tiny: generated from seeds of their own, and chosen so that all fit the context with room for the longest reply. Otherwise
    the held-out sample stories, at most as many as there are; a prompt that leaves no room is refused when it is sampled from.
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


def conversations_of(path: str | Path, reply: int = FIRST) -> list[Story]:
    """Your own conversations from a file or folder, those with at least `reply` + 1 character replies.

    Read like training stories, so that each problem names its file and line. Whether a training saw them, only you know.
    """
    return [s for s in load_stories(path) if len(s.replies) > reply]


def with_room(stories: Sequence[Story], reply: int, tokenizer, context: int, room: int) -> list[Story]:
    """The conversations whose prompt leaves `room` tokens of the context, so that no reply is cut off for want of it."""

    def tokens(story: Story) -> int:
        before = story.before_reply(reply)
        history = [length_class(m.text) for m in before.replies]
        return max(len(Prompt.of(before, tokenizer, length, history).ids) for length in CONDITIONS)

    return [s for s in stories if tokens(s) + room <= context]


def row_of(reply, **case: Any) -> dict[str, Any]:
    """A generated reply as a row of a table."""
    return {**case, "words": count_words(reply.text), **dataclasses.asdict(reply)}


@dataclass(frozen=True)
class LengthTable:
    """Replies measured in words, by condition. `replies` has one row per reply; everything else follows from it."""

    label: str
    replies: list[dict[str, Any]]  # condition, story, sample, words, tokens, end, stopped_at, text
    natural: list[int]  # words of the conversations' own replies at the same place
    sampling: dict[str, Any]
    reply: int  # which reply of the conversation was asked for; 0 = the first

    def of(self, condition: str | None) -> list[dict[str, Any]]:
        return [r for r in self.replies if r["condition"] == condition]

    def words(self, condition: str | None) -> list[int]:
        return [r["words"] for r in self.of(condition)]

    @property
    def conditions(self) -> list[str | None]:
        present = {r["condition"] for r in self.replies}
        return [c for c in CONDITIONS if c in present]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row a condition. Words: mean and median with 95 % intervals, quartiles; shares in class and cut off; tokens.

        Medians, their intervals and quartiles allow for replies that were cut off (Kaplan-Meier); None where too many were.
        """
        table = []
        for c in self.conditions:
            chosen = self.of(c)
            words, stories = [r["words"] for r in chosen], [r["story"] for r in chosen]
            low, high = stats.bootstrap(words, groups=stories)
            cut = [r["end"] == "limit" for r in chosen]
            median_low, median_high = (
                None if math.isinf(end) else end for end in stats.censored_median_interval(words, cut, stories)
            )
            q25, median, q75 = (stats.censored_quantile(words, cut, q) for q in (0.25, 0.5, 0.75))
            rank = [LENGTHS.index(c)] * len(words) if c else None
            table.append(
                {
                    "length": c or "(none)",
                    "n": len(words),
                    "mean": statistics.fmean(words),
                    "low": low,
                    "high": high,
                    "q25": q25,
                    "median": median,
                    "median low": median_low,
                    "median high": median_high,
                    "q75": q75,
                    "tokens": statistics.fmean(r["tokens"] for r in chosen),
                    "in class": stats.in_class(rank, words) if c else None,
                    "within one": stats.in_class(rank, words, within=1) if c else None,
                    "cut off": sum(cut) / len(cut),
                }
            )
        return table

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Effect over single replies of the ten lengths. `spearman_p` takes replies as independent; the interval does not.

        Of a table that asks for no length, only what can be said without one.
        """
        from scipy.stats import spearmanr

        everything = {
            "cut_off": sum(r["end"] == "limit" for r in self.replies) / len(self.replies),
            "impersonated": sum(r["end"] == "stop" for r in self.replies) / len(self.replies),
            **self.unasked,
        }
        asked = [r for r in self.replies if r["condition"] is not None]
        if not asked:
            return everything
        ranks, words = [LENGTHS.index(r["condition"]) for r in asked], [r["words"] for r in asked]
        got = [stats.word_class(w) for w in words]
        conversations = [r["story"] for r in asked]
        low, high = stats.spearman_interval(ranks, words, conversations)
        rho = stats.spearman(ranks, words)
        classes = [r for r in self.rows if r["in class"] is not None]
        medians = [float("inf") if r["median"] is None else r["median"] for r in classes]
        ends = [[math.inf if r[k] is None else r[k] for k in ("median low", "median high")] for r in classes]
        apart = stats.separated(ends)
        chance, chance_p = stats.permuted_information(ranks, got, conversations)
        return {
            "replies": len(asked),
            "conversations": len(set(conversations)),
            "spearman": rho,
            "spearman_low": low,
            "spearman_high": high,
            "spearman_p": float(spearmanr(ranks, words).pvalue) if rho else 1.0,
            "kendall": stats.kendall(ranks, words),
            "in_class": stats.in_class(ranks, words),
            "within_one": stats.in_class(ranks, words, within=1),
            "rising_means": stats.rising([r["mean"] for r in classes]) / max(1, len(classes) - 1),
            "rising_medians": stats.rising(medians),
            "separated_medians": sum(apart),
            "top_three_separated": len(apart) > 1 and all(apart[-2:]),
            "information": stats.mutual_information(ranks, got),
            "information_plain": stats.mutual_information(ranks, got, corrected=False),
            "information_by_chance": chance,
            "information_p": chance_p,
            **everything,
        }

    @property
    def unasked(self) -> dict[str, Any]:
        """Replies without modifier beside the conversations' own: means, their intervals, and what the two differ by.

        The difference is taken conversation by conversation, which makes its interval narrower than the two by themselves.
        `none_is_natural`: that interval holds 0. So, if nothing differs, in 95 of 100 experiments.
        """
        free = self.of(None)
        if not free or not self.natural:
            return {}
        words = [r["words"] for r in free]
        low, high = stats.bootstrap(self.natural)
        mean = statistics.fmean(words)
        free_low, free_high = stats.bootstrap(words, groups=[r["story"] for r in free])
        apart = [r["words"] - self.natural[r["story"]] for r in free]
        apart_low, apart_high = stats.bootstrap(apart, groups=[r["story"] for r in free])
        return {
            "none_mean": mean,
            "none_low": free_low,
            "none_high": free_high,
            "natural_mean": statistics.fmean(self.natural),
            "natural_low": low,
            "natural_high": high,
            "difference": statistics.fmean(apart),
            "difference_low": apart_low,
            "difference_high": apart_high,
            "none_is_natural": apart_low <= 0 <= apart_high,
        }

    def __str__(self) -> str:
        lines = [
            f"{'length':<11}{'n':>5}{'mean words':>12}{'95 % interval':>17}{'quartiles':>16}{'tokens':>8}{'in class':>10}"
            f"{'±1 class':>10}{'cut off':>9}"
        ]
        for r in self.rows:
            shares = "".join(f"{'' if r[k] is None else f'{r[k]:.0%}':>10}" for k in ("in class", "within one"))
            interval = f"[{r['low']:.1f}, {r['high']:.1f}]"
            quartiles = " / ".join("cut" if r[k] is None else f"{r[k]:.0f}" for k in ("q25", "median", "q75"))
            lines.append(
                f"{r['length']:<11}{r['n']:>5}{r['mean']:>12.1f}{interval:>17}{quartiles:>16}{r['tokens']:>8.0f}{shares}"
                f"{r['cut off']:>9.0%}"
            )
        s = self.statistics
        if "spearman" not in s:
            return "\n".join(lines)
        few = f"; intervals from {s['conversations']} conversations say little" if s["conversations"] < 10 else ""
        lines.append(
            f"{self.label}: Spearman {s['spearman']:+.3f} [{s['spearman_low']:+.3f}, {s['spearman_high']:+.3f}], Kendall "
            f"{s['kendall']:+.3f} over {s['replies']} single replies;\n  in class {s['in_class']:.0%}, within one "
            f"{s['within_one']:.1%}; {s['information']:.2f} of 3.32 bits;\n  of 9 neighbouring medians "
            f"{s['rising_medians']} rise; the intervals of {s['separated_medians']} pairs do not overlap{few}"
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

    def compact(self) -> dict[str, Any]:
        """Without the texts, in columns: small enough to be committed. `from_compact` is the inverse but for texts and tokens."""
        columns = {}
        for c in self.conditions:
            chosen = self.of(c)
            columns[c or "(none)"] = {
                "words": [r["words"] for r in chosen],
                "story": [r["story"] for r in chosen],
                "tokens": [r["tokens"] for r in chosen],
                "end": "".join(ENDS[r["end"]] for r in chosen),
            }
        return {
            "label": self.label,
            "reply": self.reply,
            "sampling": self.sampling,
            "natural": self.natural,
            "columns": columns,
            "rows": self.rows,
            "statistics": self.statistics,
        }

    @classmethod
    def from_compact(cls, data: dict[str, Any]) -> LengthTable:
        names = {v: k for k, v in ENDS.items()}
        rows = [
            {"condition": None if c == "(none)" else c, "story": s, "words": w, "tokens": t, "end": names[e], "text": ""}
            for c, column in data["columns"].items()
            for w, s, t, e in zip(*(column[k] for k in ("words", "story", "tokens", "end")), strict=True)
        ]
        return cls(data["label"], rows, data["natural"], data["sampling"], data["reply"])


def measure_length_control(
    model,
    tokenizer,
    stories: Sequence[Story],
    sampling: Sampling | None = None,
    reply: int = FIRST,
    samples: int = 1,
    conditions: Sequence[str | None] = CONDITIONS,
    label: str = "adapter",
    batch_size: int = 64,
    progress: Progress | None = None,
    folder: str | Path | None = None,
) -> LengthTable:
    """Ask each conversation for its reply number `reply` under every condition, `samples` times.

    Earlier replies keep the modifiers of their own lengths, as in training. With `folder`, replies are written there as they
    are made and an interrupted measurement continues. Raises ValueError without conversations.
    """
    if not stories:
        raise ValueError("no conversation to measure: none is held out, or none is deep enough")
    if samples < 1:
        raise ValueError(f"samples={samples}: ask each conversation at least once")
    sampling = sampling or SAMPLERS["course"]
    cases, prompts = [], []
    for number, story in enumerate(stories):
        before = story.before_reply(reply)
        history = [length_class(m.text) for m in before.replies]
        for condition in conditions:
            prompt = Prompt.of(before, tokenizer, condition, history)
            for sample in range(samples):
                cases.append({"condition": condition, "story": number, "sample": sample})
                prompts.append(dataclasses.replace(prompt, sample=sample))
    answers = recorded_replies(model, tokenizer, prompts, sampling, batch_size, progress, folder)
    rows = [row_of(a, **case) for case, a in zip(cases, answers, strict=True)]
    natural = [count_words(s.replies[reply].text) for s in stories]
    return LengthTable(label, rows, natural, dataclasses.asdict(sampling), reply)
