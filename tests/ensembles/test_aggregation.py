from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from lswag_fast.ensembles.aggregation import az_nas, mean_log_rank, rank_sum, te_nas
from lswag_fast.ensembles.table import rankings
from lswag_fast.errors import InputError

columns = st.lists(st.lists(st.integers(0, 6), min_size=5, max_size=5), min_size=1, max_size=4)


@given(columns)
def test_combinations_are_those_of_their_definitions(values: list[list[int]]):
    ranks = [rankdata(column) for column in values]
    np.testing.assert_allclose(rank_sum(*values), sum(ranks))
    np.testing.assert_allclose(mean_log_rank(*values), sum(np.log(r / 5) for r in ranks) / len(ranks))


def test_missing_values_have_the_mean_rank():
    assert rankings(np.array([3.0, np.nan, 1.0])).tolist() == pytest.approx([2 * 4 / 3, 2, 4 / 3])
    assert rankings(np.array([np.nan, np.nan])).tolist() == [1.5, 1.5]
    assert rankings(np.array([-np.inf, 1.0, np.inf, 0.0])).tolist() == [1, 3, 4, 2]


def test_te_nas_wants_many_regions_and_a_small_condition_number():
    assert te_nas([10, 20, 30], [5.0, 3.0, 4.0]).tolist() == [1 + 1, 2 + 3, 3 + 2]


def test_az_nas_ranks_as_its_public_formula():
    parts = np.random.default_rng(0).normal(size=(4, 30))
    formula = sum(np.log(rankdata(part) / 30) for part in parts)
    np.testing.assert_allclose(az_nas(*parts), formula / 4)
    without = np.log(rankdata(parts[0]) / 30) + np.log(rankdata(parts[2]) / 30) + np.log(rankdata(parts[3]) / 30)
    np.testing.assert_allclose(az_nas(parts[0], None, parts[2], parts[3]), without / 3)


def test_mean_log_rank_punishes_one_low_rank():
    uneven, even = [5, 3, 1, 2, 4], [1, 3, 5, 2, 4]
    assert rank_sum(uneven, even)[0] == rank_sum(uneven, even)[1] == 6
    assert mean_log_rank(uneven, even)[0] < mean_log_rank(uneven, even)[1]


def test_columns_that_cannot_be_combined():
    with pytest.raises(InputError, match=r"lengths \[3, 2\]"):
        te_nas([1, 2, 3], [1, 2])
    with pytest.raises(InputError, match="column 0 must be a list of numbers"):
        rank_sum(["a", "b"])
    with pytest.raises(InputError, match="shape"):
        rank_sum([[1, 2], [3, 4]])
