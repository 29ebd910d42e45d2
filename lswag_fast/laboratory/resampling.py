"""Statistics of rankings for many resamples at once: a resample of N architectures is a row of N weights.

A weight is how often the resample holds an architecture; weights of one are the sample itself. Each function gives, for
every row of weights, what its namesake in :mod:`lswag_fast.correlation` gives for the architectures repeated so often.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..correlation import Floats, kendall_tau

_BLOCK = 2_000_000
_PAIRWISE_ROWS = 2000
"""Up to here, a product with the matrix of all pairs is quicker than sorting each resample anew."""


def resamples(rows: int, draws: int, seed: int = 0) -> Floats:
    """Returns weights [1 + draws, rows]: the sample itself, then resamples with replacement."""
    generator = np.random.default_rng(seed)
    drawn = [np.bincount(generator.integers(rows, size=rows), minlength=rows) for _ in range(draws)]
    return np.array([np.ones(rows, np.intp), *drawn], dtype=np.float64)


def centred_ranks(values: Floats, weights: Floats) -> Floats:
    """Returns the ranks [B, N] of `values` [N] less their mean, for weights [B, N]."""
    codes, counts = _groups(values, weights)
    middle = np.cumsum(counts, axis=1) - (counts - 1) / 2
    return np.asarray((middle - (weights.sum(axis=1, keepdims=True) + 1) / 2)[:, codes])


def spearman(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Returns Spearman's rho [B] of centred ranks [B, N]; NaN where a ranking is constant."""
    return _ratio(_product(x, y, weights), _product(x, x, weights) * _product(y, y, weights))


def spearman_interval(x: Floats, y: Floats, draws: int) -> tuple[float, float]:
    """Returns the 95 % percentile interval of Spearman's rho of values [N]; that of `correlation.bootstrap`."""
    weights = resamples(len(x), draws)[1:]
    size = max(1, _BLOCK // len(x))
    blocks = (weights[start : start + size] for start in range(0, draws, size))
    found = np.concatenate([spearman(centred_ranks(x, block), centred_ranks(y, block), block) for block in blocks])
    low, high = np.nanpercentile(found, [2.5, 97.5]) if np.isfinite(found).any() else (np.nan, np.nan)
    return float(low), float(high)


def partial_spearman(x: Floats, y: Floats, given: Floats, weights: Floats) -> Floats:
    """Returns the partial rho [B] of centred ranks [B, N] given others [C, B, N]; NaN where nothing is left."""
    rankings = np.stack([x, y, *given]) * np.sqrt(weights)
    covariance = np.einsum("ibn,jbn->bij", rankings, rankings, optimize=True)
    across = covariance[:, :2, 2:]
    explained = across @ np.linalg.pinv(covariance[:, 2:, 2:], rcond=1e-10, hermitian=True) @ across.swapaxes(1, 2)
    left = covariance[:, :2, :2] - explained
    total = covariance[:, [0, 1], [0, 1]]
    # What rounding leaves of a ranking that the others determine is no ranking.
    sizes = np.where(left[:, [0, 1], [0, 1]] > 1e-9 * total, left[:, [0, 1], [0, 1]], 0.0)
    return _ratio(left[:, 0, 1], sizes.prod(axis=1))


def kendall(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Returns Kendall's tau-b [B] of values [N]; NaN where x or y is constant."""
    if len(x) > _PAIRWISE_ROWS:
        repeated = (np.repeat(np.arange(len(x)), row.astype(np.intp)) for row in weights)
        return np.array([kendall_tau(x[rows], y[rows]) for rows in repeated])
    signs = [np.sign(codes[:, None] - codes, dtype=np.float32) for codes in (_codes(x), _codes(y))]
    light = weights.astype(np.float32)
    difference = np.einsum("bn,bn->b", (light @ (signs[0] * signs[1])).astype(np.float64), weights)
    untied = [weights.sum(axis=1) ** 2 - (_groups(v, weights)[1] ** 2).sum(axis=1) for v in (x, y)]
    return _ratio(difference, untied[0] * untied[1])


def precision_at_top(x: Floats, accuracy: Floats, k: int, weights: Floats) -> Floats:
    """Returns the part [B] of the k highest by x that is among the k highest by accuracy."""
    return _product(_share_of_top(x, k, weights), _share_of_top(accuracy, k, weights), weights) / k


def regret(x: Floats, accuracy: Floats, weights: Floats) -> Floats:
    """Returns the best accuracy less that of the architecture with the highest x, [B]."""
    best = np.where(weights > 0, accuracy, -np.inf).max(axis=1)
    return np.asarray(best - (weights * _share_of_top(x, 1, weights)) @ accuracy)


def _share_of_top(values: Floats, k: int, weights: Floats) -> Floats:
    codes, counts = _groups(values, weights)
    above = counts.sum(axis=1, keepdims=True) - np.cumsum(counts, axis=1)
    return np.asarray((np.clip(k - above, 0, counts) / np.maximum(counts, 1))[:, codes])


def _codes(values: Floats) -> NDArray[np.intp]:
    return np.asarray(np.unique(values, return_inverse=True)[1])


def _groups(values: Floats, weights: Floats) -> tuple[NDArray[np.intp], Floats]:
    """The place of each value among the distinct ones, [N], and the weight of each of these, [B, distinct]."""
    codes = _codes(values)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    return codes, np.add.reduceat(weights[:, order], starts, axis=1)


def _product(x: Floats, y: Floats, weights: Floats) -> Floats:
    return np.asarray(np.einsum("bn,bn,bn->b", x, y, weights))


def _ratio(above: Floats, below_squared: Floats) -> Floats:
    found = np.full(len(above), np.nan)
    np.divide(above, np.sqrt(below_squared), out=found, where=below_squared > 0)
    return found
