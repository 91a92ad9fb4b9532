"""What seeds say of a change, against SciPy."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats

from kdpp.lab import intervals


def test_estimates_are_scipys():
    values = [3.1, 2.7, 3.6, 2.9, 3.3]
    found = intervals.estimate(values, 0.9)
    interval = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(np.mean(values)) and found.count == 5
    assert found.deviation == pytest.approx(np.std(values, ddof=1))


def test_paired_changes_are_scipys():
    """The interval of the differences, far tighter than what the two means tell."""
    base = [10.0, 12.0, 11.0, 14.0, 9.0]
    values = [9.6, 11.5, 10.7, 13.4, 8.6]
    found = intervals.paired(values, base)
    interval = scipy.stats.ttest_rel(values, base).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert intervals.verdict(found) == "lower"


def test_a_change_is_seen_where_the_t_test_sees_it():
    """At the level of 5 %: with p just below and above it, in both directions."""
    draw = np.random.default_rng(0)
    verdicts = set()
    for _ in range(200):
        base, values = draw.normal(size=4), draw.normal(size=4) + draw.choice([-1.5, 0.0, 1.5])
        test = scipy.stats.ttest_rel(values, base)
        seen = intervals.verdict(intervals.paired(values, base))
        expected = "none seen"
        if test.pvalue < 0.05:
            expected = "higher" if test.statistic > 0 else "lower"
        assert seen == expected
        verdicts.add(seen)
    assert verdicts == {"higher", "lower", "none seen"}


def test_no_change_and_a_single_seed_show_nothing():
    assert intervals.verdict(intervals.paired([1.0, 2.0], [1.0, 2.0])) == "none seen"
    one = intervals.paired([1.0], [5.0])
    assert asdict(one) == {
        "mean": -4.0, "deviation": None, "low": None, "high": None, "count": 1,
    }  # fmt: skip
    assert intervals.verdict(one) == "none seen"
    assert (
        intervals.verdict(intervals.paired([2.0, 3.0], [1.0, 2.0])) == "higher"
    )  # without any spread


def holms(p_values, level=0.05):
    """Which are rejected, by the words of Holm's paper."""
    order = np.argsort(p_values)
    rejected = np.zeros(len(p_values), dtype=bool)
    for k, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - k):
            break
        rejected[i] = True
    return rejected


def test_intervals_read_together_are_holms():
    """An interval leaves out 0 where Holm's test rejects, also with unequal counts; alone it is the
    plain one."""
    draw = np.random.default_rng(0)
    seen = 0
    for _ in range(200):
        lists = [draw.normal(draw.choice([0, 2, 4]), 1, draw.integers(3, 7)) for _ in range(6)]
        p_values = [scipy.stats.ttest_1samp(one, 0.0).pvalue for one in lists]
        found = [intervals.verdict(one) != "none seen" for one in intervals.together(lists)]
        assert found == holms(p_values).tolist()
        seen += sum(found)
    assert 200 < seen < 1000
    assert intervals.together(lists[:1]) == [intervals.estimate(lists[0])]
    mixed = intervals.together([[1.0], [2.0, 2.1], [0.0, 0.0], [3.0, 3.0]])
    assert mixed[0].low is None and intervals.verdict(mixed[2]) == "none seen"
    assert intervals.verdict(mixed[3]) == "higher"


def test_of_many_means_that_are_0_seldom_any_is_seen():
    """In 5 of 100 tables at most; each alone at 95 % they would be seen in most tables."""
    draw = np.random.default_rng(1)
    alone = wrong = 0
    for _ in range(600):
        lists = draw.normal(size=(20, 5))
        wrong += any(intervals.verdict(one) != "none seen" for one in intervals.together(lists))
        alone += any(intervals.verdict(intervals.estimate(one)) != "none seen" for one in lists)
    assert wrong < 0.075 * 600 and alone > 0.5 * 600


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: intervals.estimate([]), "one or more"),
        (lambda: intervals.estimate([1.0, math.nan]), "finite"),
        (lambda: intervals.estimate([1.0], 95), r"in \(0, 1\)"),
        (lambda: intervals.paired([1.0], [1.0, 2.0]), "give pairs"),
    ],
)
def test_values_that_say_nothing(call, said):
    with pytest.raises(ValueError, match=said):
        call()
