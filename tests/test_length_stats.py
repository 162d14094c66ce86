"""Each statistic against an implementation that is not ours, or a closed form."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import length_stats as ls
from helpers.lengths import BOUNDS, LENGTHS

PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300)), min_size=3, max_size=60)


def test_classes_are_those_of_the_bounds():
    for rank in range(1, 10):
        assert ls.word_class(BOUNDS[rank - 1]) == rank and ls.word_class(BOUNDS[rank - 1] - 1) == rank - 1
    assert len(LENGTHS) == 10


def test_bootstrap_agrees_with_scipys_and_with_normal_theory():
    values = np.random.default_rng(0).gamma(2.0, 20.0, 300)
    ours = ls.bootstrap(values, draws=2000)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.02)
    assert ours[1] - ours[0] == pytest.approx(2 * 1.96 * values.std() / math.sqrt(300), rel=0.1)


def test_drawing_whole_conversations_widens_the_interval_by_the_design_effect():
    """Four equal replies per conversation carry the information of one: sqrt(4) wider than 4 n independent ones."""
    means = np.random.default_rng(1).normal(50, 10, 100)
    values, groups = np.repeat(means, 4), np.repeat(np.arange(100), 4)
    low, high = ls.bootstrap(values, draws=2000)
    wide = ls.bootstrap(values, groups=groups, draws=2000)
    assert wide[1] - wide[0] == pytest.approx(2 * (high - low), rel=0.1)
    assert wide == pytest.approx(ls.bootstrap(means, draws=2000), rel=0.02)


def test_bootstrap_says_what_is_wrong():
    with pytest.raises(ValueError, match="no value"):
        ls.bootstrap([])
    with pytest.raises(ValueError, match="1 groups for 2 values"):
        ls.bootstrap([1, 2], groups=[0])


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_rank_correlations_are_scipys(pairs):
    asked, words = zip(*pairs, strict=True)
    constant = len(set(asked)) == 1 or len(set(words)) == 1
    for ours, theirs in ((ls.spearman, scipy.stats.spearmanr), (ls.kendall, scipy.stats.kendalltau)):
        wanted = 0.0 if constant else theirs(asked, words).statistic
        assert ours(asked, words) == pytest.approx(wanted, abs=1e-9)


def test_the_interval_of_spearman_covers_fishers():
    """Against the classical normal approximation on atanh, for independent pairs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    y = x + rng.normal(size=400)
    low, high = ls.spearman_interval(x, y, list(range(400)))
    rho = ls.spearman(x, y)
    width = math.tanh(math.atanh(rho) + 1.96 * 1.03 / math.sqrt(397)) - math.tanh(math.atanh(rho) - 1.96 * 1.03 / math.sqrt(397))
    assert low < rho < high and high - low == pytest.approx(width, rel=0.25)


def test_shares_weigh_every_class_the_same():
    asked = [0] * 8 + [5] * 2
    words = [1] * 8 + [500] * 2  # all of class 0 hit, none of class 5
    assert ls.in_class(asked, words) == 0.5
    assert ls.in_class([0, 1], [5, 1], within=1) == 1.0 and ls.in_class([0, 1], [5, 1]) == 0.0
    assert ls.in_class([0], [9], within=1) == 0.0


def test_rising_and_separated():
    assert ls.rising([1, 2, 2, 3]) == 2
    assert ls.separated([(1, 2), (2.5, 3), (2.9, 4)]) == [True, False]


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_mutual_information_is_the_sum_of_entropies(pairs):
    """I(X; Y) = H(X) + H(Y) - H(X, Y), with scipy's entropy."""
    asked = [a for a, _ in pairs]
    got = [ls.word_class(w) for _, w in pairs]

    def bits(items):
        return scipy.stats.entropy(np.unique(np.array(items), axis=0, return_counts=True)[1], base=2)

    wanted = bits(asked) + bits(got) - bits(list(zip(asked, got, strict=True)))
    assert ls.mutual_information(asked, got, corrected=False) == pytest.approx(max(0, wanted), abs=1e-9)


def test_the_correction_takes_the_bias_off_and_the_shuffles_show_it():
    rng = random.Random(0)
    asked = [i % 10 for i in range(400)]
    got = [rng.randrange(10) for _ in asked]
    plain = ls.mutual_information(asked, got, corrected=False)
    mean, p = ls.permuted_information(asked, got)
    assert plain == pytest.approx(81 / (800 * math.log(2)), rel=0.35), "nine by nine degrees of freedom over 2 n ln 2"
    assert mean == pytest.approx(plain, rel=0.25) and p > 0.05
    assert ls.mutual_information(asked, got) < 0.04
    assert ls.mutual_information(asked, asked, corrected=False) == pytest.approx(math.log2(10))
    assert ls.permuted_information(asked, asked)[1] == pytest.approx(1 / 201)
    conversations = [i // 10 for i in range(400)]
    mean, p = ls.permuted_information(asked, got, conversations)
    assert mean == pytest.approx(plain, rel=0.25) and p > 0.05
    assert ls.permuted_information(asked, asked, conversations)[1] == pytest.approx(1 / 201)


def test_what_lies_in_the_conversation_is_no_control():
    """Each conversation asked for one class, and its character speaks as long as it always does."""
    conversations = [i % 10 for i in range(100)]
    mean, p = ls.permuted_information(conversations, conversations, conversations)
    assert (mean, p) == (pytest.approx(math.log2(10)), 1)
    assert ls.permuted_information(conversations, conversations)[1] < 0.01, "shuffled over all it would look like one"
    with pytest.raises(ValueError, match="3 groups for 100 values"):
        ls.permuted_information(conversations, conversations, [1, 2, 3])


LIVES = st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(LIVES)
def test_kaplan_meier_is_scipys(lives):
    values, cut = [v for v, _ in lives], [c for _, c in lives]
    times, survival = ls.kaplan_meier(values, cut)
    theirs = scipy.stats.ecdf(scipy.stats.CensoredData.right_censored(values, cut)).sf
    for time, left in zip(times, survival, strict=True):
        assert left == pytest.approx(theirs.evaluate(time), abs=1e-9)
    median = ls.censored_median(values, cut)
    if not any(cut):
        assert median == np.median(values)
    elif median is None:
        assert survival == [] or survival[-1] > 0.5
    else:
        assert (
            theirs.evaluate(median) <= 0.5 + 1e-9 and theirs.evaluate(min(t for t in [*times, median] if t <= median) - 1) > 0.5
        )


def test_the_textbook_example():
    """Remission times of 21 patients (Gehan 1965; Kalbfleisch and Prentice, table 1.1): median 23 weeks, S(6) = 0.857."""
    times = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    cut = [t in (9, 11, 17, 19, 20, 25, 32, 34, 35) for t in times]
    cut[3] = True  # one of the four at 6 was still in remission
    cut[7] = True  # and one of the two at 10
    steps = dict(zip(*ls.kaplan_meier(times, cut), strict=True))
    assert steps[6] == pytest.approx(0.857, abs=5e-4) and steps[10] == pytest.approx(0.753, abs=5e-4)
    assert steps[22] == pytest.approx(0.538, abs=5e-4) and ls.censored_median(times, cut) == 23


def test_cut_off_replies_raise_the_median_and_too_many_hide_it():
    assert ls.censored_median([1, 2, 3, 4], [False] * 4) == 2.5
    assert ls.censored_median([1, 2, 3, 4], [False, True, False, False]) == 3
    assert ls.censored_median([5, 5, 5], [True, True, False]) is None
    with pytest.raises(ValueError, match="1 marks for 2 values"):
        ls.kaplan_meier([1, 2], [True])


def test_repetition():
    assert ls.distinct(["a b a b"], 1) == 0.5 and ls.distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert ls.distinct([], 2) == ls.distinct(["word"], 2) == 1.0
    assert ls.loops("the red key " * 4) and not ls.loops("the red key " * 2)
    assert not ls.loops("")


def test_perfect_control_is_all_the_bits_there_are_whatever_the_number_of_replies():
    for replies in (20, 400, 1600):
        asked = [k % 10 for k in range(replies)]
        assert ls.mutual_information(asked, asked) == pytest.approx(math.log2(10), abs=1e-9)


def test_quantiles_and_intervals_allow_for_cuts():
    """Replies that were cut at 150 are longer: no quantile above that can be seen, and none lies below the median."""
    words, cut = [100] * 30 + [200] * 10 + [150] * 60, [False] * 40 + [True] * 60
    quantiles = [ls.censored_quantile(words, cut, q) for q in (0.25, 0.5, 0.75)]
    assert quantiles == [100, 200, 200]
    low, high = ls.censored_median_interval(words, cut, list(range(100)))
    assert low >= 100 and high == 200
    assert ls.censored_median_interval([5, 6, 7], [True] * 3, [0, 1, 2]) == (math.inf, math.inf)
    values = [3, 1, 4, 1, 5, 9, 2, 6]
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    assert [ls.censored_quantile(values, [False] * 8, q) for q in (0.25, 0.5, 0.75)] == pytest.approx(quartiles)


def test_an_empty_reply_is_in_no_class():
    assert ls.in_class([0, 0], [0, 3]) == 0.5 and ls.in_class([0], [0], within=1) == 0.0


def test_unequal_groups_give_a_95_percent_interval_too():
    values = np.random.default_rng(0).normal(50, 10, 300)
    low, high = ls.bootstrap(values, groups=[0, 0, *range(1, 299)], draws=4000)  # one pair, so not "the same, in one go"
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(300), rel=0.08)


@pytest.mark.parametrize("kind", ["spearman", "median", "cut median"])
def test_every_interval_draws_whole_conversations(kind):
    """Four equal replies a conversation: the interval is that of the conversations alone, and not half of it."""
    rng = np.random.default_rng(0)
    x = rng.permutation(80)
    y = (x + rng.normal(0, 30, 80)).round(3)
    cut = [k % 8 == 0 for k in range(80)]
    what = {
        "spearman": lambda f: ls.spearman_interval(f(x), f(y), f(np.arange(80))),
        "median": lambda f: ls.censored_median_interval(f(y), [False] * len(f(y)), f(np.arange(80))),
        "cut median": lambda f: ls.censored_median_interval(f(y), f(np.array(cut)), f(np.arange(80))),
    }[kind]
    (a, b), (c, d) = what(lambda v: v.tolist()), what(lambda v: np.repeat(v, 4).tolist())
    assert d - c == pytest.approx(b - a, rel=0.25)


def test_words_are_the_same_in_capitals():
    assert ls.distinct(["The the"], 1) == 0.5
