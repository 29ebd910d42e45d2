"""Columns made into one score: LIBRA's rankings, and ensembles that L-SWAG compares LIBRA with (its table 1).

Columns are [N], one value an architecture; scores are [N] float64, higher is better. Missing values (NaN) take the mean
rank. T-CET, the third ensemble there, is a value a network: the proxy `tcet`. All raise InputError where columns differ
in length or are no lists of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..correlation import Floats
from ..errors import InputError
from .table import numbers, rankings


def rank_sum(*columns: ArrayLike) -> Floats:
    """Returns the sum of the rankings by each column, 1 the lowest, ties sharing theirs."""
    return np.asarray(np.sum([rankings(c) for c in _columns(columns)], axis=0))


def mean_log_rank(*columns: ArrayLike) -> Floats:
    """Returns the mean of log(rank / N) over the columns, as AZ-NAS does.

    The logarithm punishes an architecture that a single column ranks low more than one that all rank in the middle.
    """
    return np.asarray(np.mean([np.log(rankings(c) / len(c)) for c in _columns(columns)], axis=0))


COMBINATIONS: dict[str, Callable[..., Floats]] = {"rank_sum": rank_sum, "mean_log_rank": mean_log_rank}


def te_nas(linear_regions: ArrayLike, ntk_condition_number: ArrayLike) -> Floats:
    """Returns TE-NAS's sum of two rankings: many linear regions, and an NTK of a small condition number.

    Chen, Gong and Wang, ICLR 2021. The paper sums ranks where 1 is best and takes the smallest; here they are turned.
    """
    regions, condition = _columns((linear_regions, ntk_condition_number))
    return rank_sum(regions, -condition)


def az_nas(
    expressivity: ArrayLike, progressivity: ArrayLike | None, trainability: ArrayLike, complexity: ArrayLike
) -> Floats:
    """Returns AZ-NAS's mean log rank of its four proxies; complexity is the number of multiply-adds.

    Lee and Ham, CVPR 2024. The public code sums log(rank / N), ties sharing ranks; its order is that of the mean. For
    vision transformers it leaves progressivity out, which is None here.
    """
    parts = (expressivity, progressivity, trainability, complexity)
    return mean_log_rank(*(part for part in parts if part is not None))


def _columns(columns: Sequence[ArrayLike]) -> list[Floats]:
    found = [numbers(f"column {i}", values) for i, values in enumerate(columns)]
    lengths = [len(values) for values in found]
    if not found or len(set(lengths)) > 1:
        raise InputError(f"columns of equal length are combined, one value an architecture; got lengths {lengths}")
    return found
