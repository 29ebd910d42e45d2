"""What a ranking is worth: Kendall's tau-b, Spearman's rho, partial rho, precision at the top, regret, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def kendall_tau(x: ArrayLike, y: ArrayLike) -> float:
    """Returns Kendall's tau-b, which allows for ties, in O(N log N); NaN where x or y is constant or holds a NaN."""
    x, y = np.asarray(x), np.asarray(y)
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    x, y = (np.unique(v, return_inverse=True)[1] for v in (x, y))
    both = x * (int(y.max(initial=0)) + 1) + y
    order = np.argsort(both, kind="stable")
    tied_both = _pairs(np.diff(np.flatnonzero(np.diff(both[order], prepend=-1, append=-1))))
    pairs, tied_x, tied_y = len(x) * (len(x) - 1) // 2, _pairs(np.bincount(x)), _pairs(np.bincount(y))
    if not (pairs - tied_x and pairs - tied_y):
        return math.nan
    concordant_less_discordant = pairs - tied_x - tied_y + tied_both - 2 * _inversions(y[order])
    return concordant_less_discordant / math.sqrt((pairs - tied_x) * (pairs - tied_y))


def ranks(values: ArrayLike) -> Floats:
    """Returns ranks from 1, equal values sharing the mean of theirs; all NaN where a value is NaN."""
    values = np.asarray(values)
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Returns Spearman's rho: Pearson's correlation of the ranks; NaN where x or y is constant or holds a NaN."""
    return _pearson(ranks(x), ranks(y))


def partial_spearman(x: ArrayLike, y: ArrayLike, given: Sequence[ArrayLike]) -> float:
    """Returns Spearman's rho of x and y given others.

    That is Pearson's correlation of what is left of the ranks of x and of y when their least-squares fits on the ranks
    of the others, with an intercept, are taken away. NaN where nothing is left, or a value is NaN.
    """
    basis = np.column_stack([np.ones(len(np.asarray(x))), *map(ranks, given)])
    targets = np.column_stack([ranks(x), ranks(y)])
    if np.isnan(basis).any() or np.isnan(targets).any():
        return math.nan
    left = targets - basis @ np.linalg.lstsq(basis, targets, rcond=None)[0]
    # What rounding leaves of a ranking that the others determine is no ranking.
    left[:, np.abs(left).max(axis=0) < 1e-8 * len(left)] = 0.0
    return _pearson(left[:, 0], left[:, 1])


def precision_at_top(x: ArrayLike, accuracy: ArrayLike, k: int) -> float:
    """Returns the part of the k highest by x that is among the k highest by accuracy; chance gives k / N.

    Ties at the edge of the top are broken at random, and the mean over all ways is returned.
    """
    return float(_share_of_top(x, k) @ _share_of_top(accuracy, k)) / k


def regret(x: ArrayLike, accuracy: ArrayLike) -> float:
    """Returns the best accuracy less that of the candidate with the highest x (the mean of several that tie)."""
    x, accuracy = np.asarray(x), np.asarray(accuracy, dtype=np.float64)
    return float(accuracy.max() - accuracy[x == x.max()].mean())


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


def _share_of_top(values: ArrayLike, k: int) -> Floats:
    """The chance of each value to be among the k highest, when ties are broken at random."""
    values = np.asarray(values)
    edge = np.sort(values)[-k]
    above, at = values > edge, values == edge
    return np.asarray(above + at * ((k - np.count_nonzero(above)) / np.count_nonzero(at)))


def _pairs(counts: NDArray[np.intp]) -> int:
    return int((counts * (counts - 1)).sum()) // 2


def _inversions(values: NDArray[np.intp]) -> int:
    """The number of pairs i < j with values[i] > values[j], of integers from 0: a radix sort that counts."""
    found = 0
    for bit in reversed(range(int(values.max()).bit_length())):
        # Sorted by the bits above this one, each group of equal ones in the original order.
        group, ones = values >> (bit + 1), (values >> bit) & 1
        before = np.cumsum(ones) - ones
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        in_group = before - np.repeat(before[starts], np.diff(starts, append=len(values)))
        found += int(in_group[ones == 0].sum())
        # numpy's stable sort is linear for integers of 16 bits.
        kept = values >> bit
        values = values[np.argsort(kept.astype(np.uint16) if kept.max() < 2**16 else kept, kind="stable")]
    return found
