from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lswag_fast.correlation import (
    bootstrap,
    kendall_tau,
    partial_spearman,
    precision_at_top,
    ranks,
    regret,
    spearman,
)

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=12)


def test_kendall_tau_of_known_rankings():
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))


@given(pairs)
@settings(max_examples=50)
def test_kendall_tau_is_that_of_its_definition(values: list[tuple[int, int]]):
    x, y = zip(*values, strict=True)
    couples = [(i, j) for i in range(len(x)) for j in range(i)]
    concordant = sum((x[i] - x[j]) * (y[i] - y[j]) > 0 for i, j in couples)
    discordant = sum((x[i] - x[j]) * (y[i] - y[j]) < 0 for i, j in couples)
    untied_x, untied_y = (sum(v[i] != v[j] for i, j in couples) for v in (x, y))
    if untied_x and untied_y:
        assert kendall_tau(x, y) == pytest.approx((concordant - discordant) / math.sqrt(untied_x * untied_y))
    else:
        assert math.isnan(kendall_tau(x, y))


def test_ranks_share_ties():
    assert ranks([30, 10, 20, 20, 5]).tolist() == [5, 2, 3.5, 3.5, 1]


def test_spearman_of_known_rankings():
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 10000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert math.isnan(spearman([2, 2, 2], [1, 2, 3]))


def test_partial_spearman_of_one_other_is_the_textbook_formula():
    x, y, z = np.random.default_rng(1).normal(size=(3, 40))
    x, y = x + z, y - z
    xy, xz, yz = spearman(x, y), spearman(x, z), spearman(y, z)
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_spearman(x, y, [z]) == pytest.approx(expected)


def test_partial_spearman_of_what_the_others_determine_is_undefined():
    x, y = np.random.default_rng(2).normal(size=(2, 40))
    assert math.isnan(partial_spearman(x, y, [x**3, y]))


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(3).normal(size=400)
    low, high = bootstrap(lambda rows: float(values[rows].mean()), len(values))
    half = 1.96 / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_kendall_tau_of_many_rows_is_that_of_all_pairs():
    x, y = np.random.default_rng(4).integers(0, 400, size=(2, 3000))
    y[:2000] += x[:2000]
    signs = [np.sign(v[:, None] - v) for v in (x, y)]
    expected = (signs[0] * signs[1]).sum() / math.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    assert kendall_tau(x, y) == pytest.approx(expected, abs=1e-12)


def test_a_missing_value_leaves_no_correlation():
    x, y = [1.0, 2.0, math.nan, 4.0], [1.0, 3.0, 2.0, 4.0]
    assert all(math.isnan(f(*pair)) for f in (kendall_tau, spearman) for pair in ((x, y), (y, x)))
    assert math.isnan(partial_spearman(x, y, [y]))
    assert math.isnan(partial_spearman(y, y, [x]))


def test_precision_at_top_counts_the_best_of_both():
    accuracy = [10, 20, 30, 40, 50, 60]
    assert precision_at_top(accuracy, accuracy, 2) == 1
    assert precision_at_top([1, 2, 3, 9, 0, 8], accuracy, 2) == 0.5  # picks 40 and 60 of 50 and 60
    assert precision_at_top([9, 8, 0, 0, 0, 0], accuracy, 2) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=6), st.data())
@settings(max_examples=30)
def test_precision_at_top_is_the_mean_over_all_ways_to_break_ties(values: list[tuple[int, int]], data: st.DataObject):
    x, y = zip(*values, strict=True)
    k = data.draw(st.integers(1, len(values)))

    def tops(v: tuple[int, ...]) -> list[set[int]]:
        orders = permutations(range(len(v)))
        return [set(order[:k]) for order in orders if [v[i] for i in order] == sorted(v, reverse=True)]

    expected = np.mean([len(a & b) / k for a in tops(x) for b in tops(y)])
    assert precision_at_top(x, y, k) == pytest.approx(expected)


def test_regret_is_the_distance_of_the_pick_from_the_best():
    assert regret([1, 5, 2], [70.0, 80.0, 90.0]) == 10
    assert regret([1, 5, 9], [70.0, 80.0, 90.0]) == 0
    assert regret([9, 5, 9], [70.0, 80.0, 90.0]) == 10  # the mean of 20 and 0
