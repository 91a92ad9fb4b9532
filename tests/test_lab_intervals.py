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
