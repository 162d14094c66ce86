"""The statistics of the length experiment, as plain functions of lists of numbers.

Replies to the same conversation resemble each other, so intervals come from a bootstrap that draws whole conversations
(`groups`): drawing single replies would count the same conversation many times and make every interval too narrow.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from helpers.lengths import LENGTHS, class_of

Interval = tuple[float, float]


def word_class(words: int) -> int:
    """Rank of the length class of a reply with that many words."""
    return LENGTHS.index(class_of(words))


# ------------------------------------------------------------------------------------------------------------ bootstrap


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    groups: Sequence[Hashable] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """95 % percentile interval of a statistic. `values`: (n,) or (n, columns); `groups`: which rows are drawn together.

    Percentile intervals as in Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("no value to take an interval of")
    members = _members(groups, len(values))
    rng = np.random.default_rng(seed)
    if len({len(m) for m in members}) == 1 and statistic in (np.mean, np.median) and values.ndim == 1:  # the same, in one go
        table = values[np.array(members)]  # (groups, members of one)
        drawn = rng.integers(len(table), size=(draws, len(table)))
        low, high = np.quantile(statistic(table[drawn].reshape(draws, -1), axis=1), (0.025, 0.975))
        return float(low), float(high)
    results = []
    for _ in range(draws):
        drawn = rng.integers(len(members), size=len(members))
        results.append(statistic(values[np.concatenate([members[k] for k in drawn])]))
    # between a number and infinity (a median that was cut off) nothing can be interpolated
    method = "linear" if np.isfinite(results).all() else "closest_observation"
    low, high = np.quantile(results, (0.025, 0.975), method=method)
    return float(low), float(high)


def _members(groups: Sequence[Hashable] | None, count: int) -> list[np.ndarray]:
    if groups is None:
        return [np.array([i]) for i in range(count)]
    if len(groups) != count:
        raise ValueError(f"{len(groups)} groups for {count} values: give one for each")
    rows: dict[Hashable, list[int]] = {}
    for i, g in enumerate(groups):
        rows.setdefault(g, []).append(i)
    return [np.array(r) for r in rows.values()]


# --------------------------------------------------------------------------------------------------- asked and obtained


def in_class(asked: Sequence[int], words: Sequence[int], within: int = 0) -> float:
    """Share of replies whose class is at most `within` classes from the one asked for, all asked classes weighing the same.

    An empty reply is in no class: the shortest one begins with a word.
    """
    hits: dict[int, list[bool]] = {}
    for a, w in zip(asked, words, strict=True):
        hits.setdefault(a, []).append(w > 0 and abs(word_class(w) - a) <= within)
    return float(np.mean([np.mean(h) for h in hits.values()]))


def spearman(asked: Sequence[int], words: Sequence[float]) -> float:
    """Rank correlation over single replies; 0 where one side never changes (nothing can follow, nothing is followed)."""
    if not len(asked):
        return 0.0
    from scipy.stats import rankdata

    x, y = (rankdata(v) for v in (asked, words))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale else 0.0


def spearman_interval(asked: Sequence[int], words: Sequence[float], groups: Sequence[Hashable], draws: int = 300) -> Interval:
    pairs = np.column_stack([asked, words])
    return bootstrap(pairs, lambda p: spearman(p[:, 0], p[:, 1]), groups, draws)


def kendall(asked: Sequence[int], words: Sequence[float]) -> float:
    """Kendall's tau-b over single replies; 0 where one side never changes."""
    from scipy.stats import kendalltau

    tau = float(kendalltau(asked, words).statistic)
    return 0.0 if np.isnan(tau) else tau


def rising(values: Sequence[float]) -> int:
    """How many neighbours rise strictly: 9 for ten values in order."""
    return sum(b > a for a, b in itertools.pairwise(values))


def separated(intervals: Sequence[Interval]) -> list[bool]:
    """For each two neighbours: does the later interval lie wholly above the earlier one?"""
    return [later[0] > earlier[1] for earlier, later in itertools.pairwise(intervals)]


def mutual_information(asked: Sequence[int], got: Sequence[int], corrected: bool = True) -> float:
    """Bits that the obtained class tells about the asked one; log2(10) = 3.32 for perfect control of ten classes.

    The plain estimate is above 0 even for independent columns. The correction takes off the first-order bias,
    (pairs that occur - rows - columns + 1) / (2 n ln 2) (Miller 1955; Panzeri and Treves 1996). The result is kept between
    0 and the entropy of the asked classes, the most that there is to know.
    """
    n = len(asked)
    both, first, second = Counter(zip(asked, got, strict=True)), Counter(asked), Counter(got)
    bits = sum(c / n * np.log2(c * n / (first[a] * second[g])) for (a, g), c in both.items())
    if corrected:
        bits -= (len(both) - len(first) - len(second) + 1) / (2 * n * np.log(2))
    most = -sum(c / n * np.log2(c / n) for c in first.values())
    return float(min(max(0.0, bits), most))


def permuted_information(
    asked: Sequence[int], got: Sequence[int], groups: Sequence[Hashable] | None = None, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """(mean, p) of the plain mutual information when the asked classes are shuffled: what no control at all would give.

    Within each of `groups` (conversations), so that what is alike in a conversation stays as it is; without, over all. p: share
    of shuffles that reach the real value, counting the real one (Phipson and Smyth 2010), so never 0.
    """
    rng, asked = np.random.default_rng(seed), np.asarray(asked)
    numbers = np.empty(len(asked), dtype=int)
    for number, rows in enumerate([np.arange(len(asked))] if groups is None else _members(groups, len(asked))):
        numbers[rows] = number
    real, shuffled, places = mutual_information(asked.tolist(), got, corrected=False), [], np.argsort(numbers, kind="stable")
    for _ in range(draws):
        drawn = np.empty_like(asked)
        drawn[places] = asked[np.lexsort((rng.random(len(asked)), numbers))]  # by group, and within it at random
        shuffled.append(mutual_information(drawn.tolist(), got, corrected=False))
    return float(np.mean(shuffled)), (1 + sum(s >= real - 1e-12 for s in shuffled)) / (draws + 1)


# ------------------------------------------------------------------------------------------------------------- censoring


def kaplan_meier(values: Sequence[float], censored: Sequence[bool]) -> tuple[list[float], list[float]]:
    """(times, survival): share of replies longer than each time, when some are only known to be at least as long as seen.

    The product-limit estimate (Kaplan and Meier 1958). At a tie, ends count before cuts.
    """
    if len(values) != len(censored):
        raise ValueError(f"{len(censored)} marks for {len(values)} values: give one for each")
    times, survival, left = [], [], 1.0
    order = sorted(zip(values, censored, strict=True))
    at_risk = len(order)
    for time, group in itertools.groupby(order, key=lambda v: v[0]):
        marks = [cut for _, cut in group]
        ends = marks.count(False)
        if ends:
            left *= 1 - ends / at_risk
            times.append(time)
            survival.append(left)
        at_risk -= len(marks)
    return times, survival


def censored_quantile(values: Sequence[float], censored: Sequence[bool], q: float) -> float | None:
    """Length that a share `q` of replies does not exceed, under Kaplan-Meier; None if too many were cut off to see one.

    Without cuts it is the ordinary quantile, interpolated (for the median: the middle of the two middle values). Where exactly
    that share is reached, the middle between this length and the next at which a reply ends; if none does, this length, the
    least that it can be (as the first time at which the estimate is no more than 1 - q).
    """
    if not any(censored):
        return float(np.quantile(values, q))
    times, survival = kaplan_meier(values, censored)
    for k, (time, left) in enumerate(zip(times, survival, strict=True)):
        if abs(left - (1 - q)) < 1e-12:  # flat there: the middle of the step, as for the ordinary median
            return (time + times[k + 1]) / 2 if k + 1 < len(times) else float(time)
        if left < 1 - q:
            return float(time)
    return None


def censored_median(values: Sequence[float], censored: Sequence[bool]) -> float | None:
    """Median length under Kaplan-Meier."""
    return censored_quantile(values, censored, 0.5)


def censored_median_interval(values: Sequence[float], censored: Sequence[bool], groups: Sequence[Hashable]) -> Interval:
    """95 % interval of `censored_median`; infinity for an end that cannot be seen."""
    if not any(censored):
        return bootstrap(values, np.median, groups)

    def median(pairs: np.ndarray) -> float:
        found = censored_median(pairs[:, 0].tolist(), pairs[:, 1].astype(bool).tolist())
        return np.inf if found is None else found

    return bootstrap(np.column_stack([values, censored]), median, groups, draws=400)


# ----------------------------------------------------------------------------------------------------------------- texts


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams (distinct-n, Li et al. 2016, arXiv 1510.03055); 1.0 without any."""
    grams = [g for t in texts for g in _grams(t, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def loops(text: str, n: int = 4, times: int = 3) -> bool:
    """Does some run of `n` words occur `times` times or more in this one reply?"""
    return max(Counter(_grams(text, n)).values(), default=0) >= times


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[k:] for k in range(n)), strict=False))
