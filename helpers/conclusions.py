"""What the measurements say, written by the code: each claim with its number, its goal and whether it is reached.

The goals are the project's own. A goal that is missed is printed as plainly as one that is reached.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers import length_stats as stats
from helpers.evaluation import LengthTable
from helpers.lengths import LENGTHS

CONTROL_LIMIT = 0.1  # |Spearman| of something that must not show the effect
FEW = 10  # conversations: from fewer, neither an interval nor an absence can be judged


@dataclass(frozen=True)
class Conclusion:
    claim: str
    measured: str
    goal: str
    reached: bool | None  # None: too few conversations to say

    def __str__(self) -> str:
        mark, few = ("?", f": {TOO_FEW}") if self.reached is None else ("yes" if self.reached else "NO", "")
        return f"{mark:<4}{self.claim:<62}{self.measured:>18}   goal {self.goal}{few}"


TOO_FEW = "too few conversations to say"


def answer(reached: bool | None) -> str:
    return TOO_FEW if reached is None else "yes" if reached else "no"


def no_more_than(replies: int) -> float:
    """What |Spearman| of single replies may be where there is no effect: `CONTROL_LIMIT`, or more if chance alone gives more.

    Dealt out at random, it has a standard deviation of exactly 1 / sqrt(n - 1), so 30 replies exceed 0.1 more often than not.
    """
    return max(CONTROL_LIMIT, 1.96 / math.sqrt(max(1, replies - 1)))


def judged(reached: bool, conversations: int) -> bool | None:
    """`reached`, if there are conversations enough to judge it by intervals or by chance."""
    return reached if conversations >= FEW else None


def about_adapter(table: LengthTable) -> list[Conclusion]:
    """Does the modifier control the length, at the place where this table was measured?"""
    s, where = table.statistics, f"reply {table.reply + 1}"
    counted = [
        ("single replies follow the modifier (Spearman)", "spearman", 0.90),
        ("replies are in the class asked for", "in_class", 0.60),
        ("replies are within one class of it", "within_one", 0.88),
    ]
    found = [Conclusion(f"{where}: {claim}", f"{s[key]:.3f}", f">= {goal:.2f}", s[key] >= goal) for claim, key, goal in counted]
    rising, top = s["rising_medians"], s["top_three_separated"]
    return [
        *found,
        Conclusion(f"{where}: the ten medians rise strictly", f"{rising} of 9", "9 of 9", rising == 9),
        Conclusion(
            f"{where}: the top three medians are apart beyond intervals",
            "yes" if top else "no",
            "yes",
            judged(top, s["conversations"]),
        ),
        Conclusion(f"{where}: few replies were cut off", f"{s['cut_off']:.1%}", "<= 1%", s["cut_off"] <= 0.01),
    ]


def about_control(control: LengthTable, adapter: LengthTable) -> list[Conclusion]:
    """Does something that must not show the effect not show it, and does the adapter stand clear of it?"""
    s = control.statistics
    rho, interval = s["spearman"], f"[{s['spearman_low']:+.2f}, {s['spearman_high']:+.2f}]"
    apart = adapter.statistics["spearman_low"] > s["spearman_high"]
    most, n = no_more_than(s["replies"]), s["conversations"]
    return [
        Conclusion(
            f"{control.label}: |Spearman| at most {most:.2g}",
            f"{rho:+.2f}",
            f"|..| <= {most:.2g}",
            judged(abs(rho) <= most, n),
        ),
        Conclusion(f"{control.label}: the adapter's interval lies above its interval", interval, "above", judged(apart, n)),
    ]


def about_no_modifier(table: LengthTable, verbosity: Sequence[Mapping[str, Any]] = ()) -> list[Conclusion]:
    """Is the length natural when nothing is asked, and does it follow the persona?"""
    u, how = table.unasked, f"T {table.sampling['temperature']}"
    found = [
        Conclusion(
            f"without modifier, {how}: as long as the conversations' own replies",
            f"{u['difference']:+.1f} [{u['difference_low']:+.1f}, {u['difference_high']:+.1f}]",
            "holds 0",
            judged(u["none_is_natural"], len(table.natural)),
        )
    ]
    if verbosity:
        least, most = verbosity[0], verbosity[-1]
        claim = f"without modifier, {how}: {most['persona']} above {least['persona']} beyond intervals"
        measured = f"{most['mean']:.0f} and {least['mean']:.0f}"
        found.append(Conclusion(claim, measured, "apart", judged(most["low"] > least["high"], len(table.natural))))
    return found


def neighbours(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """What may be said about the order of rows with a mean and an interval: a sentence for each two neighbours."""
    found = []
    for a, b in itertools.pairwise(rows):
        if b["low"] > a["high"]:
            found.append(f"{b[key]} above {a[key]}, beyond intervals")
        elif a["low"] > b["high"]:
            found.append(f"{b[key]} below {a[key]}, beyond intervals")
        else:
            found.append(f"{a[key]} and {b[key]}: not told apart, their intervals overlap")
    return found


def top_three(table: LengthTable) -> str:
    """The medians of the three longest classes with their intervals, and which neighbours' intervals overlap."""

    def number(value: float | None) -> str:
        return "cut off" if value is None else f"{value:.0f}"

    rows = [r for r in table.rows if r["length"] in LENGTHS[-3:]]
    medians = ", ".join(
        f"{r['length']} {number(r['median'])} [{number(r['median low'])}, {number(r['median high'])}]" for r in rows
    )
    ends = [[math.inf if r[k] is None else r[k] for k in ("median low", "median high")] for r in rows]
    apart = zip(itertools.pairwise(rows), stats.separated(ends), strict=True)
    overlap = [f"{a['length']} and {b['length']}" for (a, b), clear in apart if not clear]
    return f"medians: {medians}; intervals that overlap: {', '.join(overlap) or 'none'}"


def about_changes(rows: Sequence[Mapping[str, Any]], lengths: Sequence[str]) -> list[Conclusion]:
    """After a change in mid-conversation: does the next reply follow the new modifier, and not the old one?"""
    then = stats.spearman([lengths.index(r["then"]) for r in rows], [r["words"] for r in rows])
    first = stats.spearman([lengths.index(r["first"]) for r in rows], [r["words"] for r in rows])
    most = no_more_than(len(rows))
    return [
        Conclusion(
            "changed length: the next reply follows the new modifier", f"{then:+.2f}", ">= 0.90", then >= 0.9 if rows else None
        ),
        Conclusion(
            "changed length: it does not follow the old one",
            f"{first:+.2f}",
            f"|..| <= {most:.2g}",
            judged(abs(first) <= most, len({r["story"] for r in rows})),
        ),
    ]


def about_names(report: Sequence[Mapping[str, Any]]) -> list[Conclusion]:
    """Over all conditions: are the names right in the replies that use one? Nothing to say if none does."""
    used = [(r["with names"], r["right names"]) for r in report if r["right names"] is not None]
    if not used:
        return []
    share = sum(w * right for w, right in used) / sum(w for w, _ in used)
    return [Conclusion("names in replies are those of the two speakers", f"{share:.1%}", ">= 95%", share >= 0.95)]


def render(found: Sequence[Conclusion]) -> str:
    reached, open_ = sum(c.reached is True for c in found), sum(c.reached is None for c in found)
    rest = f"; {open_} more: {TOO_FEW}" if open_ else ""
    return "\n".join([*map(str, found), f"{reached} of {len(found) - open_} goals reached{rest}"])
