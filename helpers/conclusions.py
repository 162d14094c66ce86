"""What the measurements say, written by the code: each claim with its number, its goal and whether it is reached.

The goals are the project's own. A goal that is missed is printed as plainly as one that is reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers import length_stats as stats
from helpers.evaluation import LengthTable

CONTROL_LIMIT = 0.1  # |Spearman| of something that must not show the effect


@dataclass(frozen=True)
class Conclusion:
    claim: str
    measured: str
    goal: str
    reached: bool

    def __str__(self) -> str:
        return f"{'yes' if self.reached else 'NO ':<4}{self.claim:<62}{self.measured:>18}   goal {self.goal}"


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
        Conclusion(f"{where}: the top three medians are apart beyond intervals", "yes" if top else "no", "yes", top),
        Conclusion(f"{where}: nothing was cut off unseen", f"{s['cut_off']:.1%} cut", "<= 1%", s["cut_off"] <= 0.01),
    ]


def about_control(control: LengthTable, adapter: LengthTable) -> list[Conclusion]:
    """Does something that must not show the effect not show it, and does the adapter stand clear of it?"""
    s = control.statistics
    rho, interval = s["spearman"], f"[{s['spearman_low']:+.2f}, {s['spearman_high']:+.2f}]"
    apart = adapter.statistics["spearman_low"] > s["spearman_high"]
    return [
        Conclusion(
            f"{control.label}: no effect (Spearman)", f"{rho:+.2f}", f"|..| <= {CONTROL_LIMIT}", abs(rho) <= CONTROL_LIMIT
        ),
        Conclusion(f"{control.label}: the adapter's interval lies above its interval", interval, "above", apart),
    ]


def about_no_modifier(table: LengthTable, verbosity: Sequence[Mapping[str, Any]] = ()) -> list[Conclusion]:
    """Is the length natural when nothing is asked, and does it follow the persona?"""
    u, how = table.unasked, f"T {table.sampling['temperature']}"
    found = [
        Conclusion(
            f"without modifier, {how}: mean words inside the natural interval",
            f"{u['none_mean']:.1f}",
            f"[{u['natural_low']:.1f}, {u['natural_high']:.1f}]",
            u["none_is_natural"],
        )
    ]
    if verbosity:
        means = [r["mean"] for r in verbosity]
        order = " < ".join(str(r["persona"]) for r in verbosity)
        measured = " ".join(f"{m:.0f}" for m in means)
        found.append(Conclusion(f"without modifier, {how}: {order}", measured, "rising", stats.rising(means) == len(means) - 1))
    return found


def about_changes(rows: Sequence[Mapping[str, Any]], lengths: Sequence[str]) -> list[Conclusion]:
    """After a change in mid-conversation: does the next reply follow the new modifier, and not the old one?"""
    then = stats.spearman([lengths.index(r["then"]) for r in rows], [r["words"] for r in rows])
    first = stats.spearman([lengths.index(r["first"]) for r in rows], [r["words"] for r in rows])
    return [
        Conclusion("changed length: the next reply follows the new modifier", f"{then:+.2f}", ">= 0.90", then >= 0.9),
        Conclusion("changed length: it does not follow the old one", f"{first:+.2f}", "|..| <= 0.1", abs(first) <= 0.1),
    ]


def about_names(report: Sequence[Mapping[str, Any]]) -> list[Conclusion]:
    """Over all conditions: are the names right in the replies that use one? Nothing to say if none does."""
    used = [(r["with names"], r["right names"]) for r in report if r["right names"] is not None]
    if not used:
        return []
    share = sum(w * right for w, right in used) / sum(w for w, _ in used)
    return [Conclusion("names in replies are those of the two speakers", f"{share:.1%}", ">= 95%", share >= 0.95)]


def render(found: Sequence[Conclusion]) -> str:
    reached = sum(c.reached for c in found)
    return "\n".join([*map(str, found), f"{reached} of {len(found)} goals reached"])
