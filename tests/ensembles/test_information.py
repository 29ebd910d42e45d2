from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lswag_fast.ensembles.information import (
    checked_bins,
    conditional_entropy,
    discretise,
    entropy,
    information_gain,
    sturges,
)
from lswag_fast.errors import InputError

triples = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=30)


def test_entropy_of_known_distributions():
    assert entropy(np.array([0, 1, 2, 3])) == pytest.approx(2)
    assert entropy(np.array([7, 7, 7])) == 0
    assert entropy(np.array([0, 0, 0, 1])) == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert entropy(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(2)


@given(triples)
def test_information_gain_is_that_of_its_definition(rows: list[tuple[int, int, int]]):
    y, first, second = (np.array(column) for column in zip(*rows, strict=True))

    def average_entropy(given_keys: list[tuple[int, ...]]) -> float:
        total = 0.0
        for key, size in Counter(given_keys).items():
            group = Counter(int(y[i]) for i, k in enumerate(given_keys) if k == key)
            total -= size / len(rows) * sum(c / size * math.log2(c / size) for c in group.values())
        return total

    by_first = average_entropy([(r[1],) for r in rows])
    by_both = average_entropy([(r[1], r[2]) for r in rows])
    assert conditional_entropy(y, first) == pytest.approx(by_first, abs=1e-12)
    assert information_gain(y, first, second) == pytest.approx(by_first - by_both, abs=1e-12)


@given(triples)
def test_more_is_never_less_known(rows: list[tuple[int, int, int]]):
    y, first, second = (np.array(column) for column in zip(*rows, strict=True))
    assert information_gain(y, first, second) >= -1e-12


@given(st.integers(0, 10_000), st.integers(2, 20))
def test_bins_of_equal_frequency_do_not_change_with_the_scale(seed: int, bins: int):
    values = np.random.default_rng(seed).integers(0, 15, 40).astype(float)
    codes = discretise(values, bins)
    np.testing.assert_array_equal(codes, discretise(np.exp(values), bins))
    assert all(len(set(codes[values == v])) == 1 for v in values)
    assert codes.min() >= 0
    assert codes.max() < bins


def test_bins_of_equal_frequency_hold_equally_many():
    codes = discretise(np.random.default_rng(0).normal(size=120), 8)
    assert Counter(codes.tolist()) == dict.fromkeys(range(8), 15)


def test_bins_of_equal_width_are_those_of_a_histogram():
    values = np.random.default_rng(1).normal(size=200)
    counts = np.bincount(discretise(values, 9, "width"), minlength=9)
    np.testing.assert_array_equal(counts, np.histogram(values, 9)[0])


def test_missing_values_have_a_bin_of_their_own_and_infinite_ones_the_outermost():
    values = np.array([np.nan, -np.inf, 0.0, 1.0, 2.0, np.inf])
    assert discretise(values, 2, "width").tolist() == [-1, 0, 0, 1, 1, 1]
    assert discretise(values, 5).tolist() == [-1, 0, 1, 2, 3, 4]
    assert discretise(np.array([np.nan, np.nan]), 5).tolist() == [-1, -1]


def test_number_of_bins():
    assert sturges(725) == 11
    assert checked_bins(None, "frequency", 64) == 7
    assert checked_bins(4, "width", 64) == 4


@pytest.mark.parametrize(
    ("bins", "binning"), [(1, "width"), (65, "width"), (2.5, "width"), (True, "width"), (5, "log")]
)
def test_options_that_cannot_be_used(bins: int, binning: str):
    with pytest.raises(InputError, match="bin"):
        checked_bins(bins, binning, 64)
