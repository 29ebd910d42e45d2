"""Rank correlations, and what they are worth: Kendall's tau-b, Spearman's rho, partial rho, bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def kendall_tau(x: ArrayLike, y: ArrayLike) -> float:
    """Returns Kendall's tau-b, which allows for ties, from all pairs; NaN where x or y is constant."""
    signs = [np.sign(np.subtract.outer(v, v))[np.triu_indices(len(v), 1)] for v in map(np.asarray, (x, y))]
    untied = [int(np.count_nonzero(s)) for s in signs]
    return float(signs[0] @ signs[1]) / math.sqrt(untied[0] * untied[1]) if min(untied) else math.nan


def ranks(values: ArrayLike) -> Floats:
    """Returns ranks from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Returns Spearman's rho: Pearson's correlation of the ranks; NaN where x or y is constant."""
    return _pearson(ranks(x), ranks(y))


def partial_spearman(x: ArrayLike, y: ArrayLike, given: Sequence[ArrayLike]) -> float:
    """Returns Spearman's rho of x and y given others.

    That is Pearson's correlation of what is left of the ranks of x and of y when their least-squares fits on the ranks
    of the others, with an intercept, are taken away. NaN where nothing is left.
    """
    basis = np.column_stack([np.ones(len(np.asarray(x))), *map(ranks, given)])
    targets = np.column_stack([ranks(x), ranks(y)])
    left = targets - basis @ np.linalg.lstsq(basis, targets, rcond=None)[0]
    # What rounding leaves of a ranking that the others determine is no ranking.
    left[:, np.abs(left).max(axis=0) < 1e-8 * len(left)] = 0.0
    return _pearson(left[:, 0], left[:, 1])


def bootstrap(statistic: Callable[[NDArray[np.intp]], float], rows: int, *, draws: int = 1000) -> tuple[float, float]:
    """Returns the 95 % percentile interval of a statistic of row indices, over resamples of the rows (seed 0)."""
    generator = np.random.default_rng(0)
    found = [statistic(generator.integers(rows, size=rows)) for _ in range(draws)]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def _pearson(x: Floats, y: Floats) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size else math.nan
