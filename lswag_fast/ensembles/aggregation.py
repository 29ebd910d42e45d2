"""Columns made into one score: LIBRA's rankings, and the ensembles that L-SWAG compares LIBRA with (its table 1).

Columns are [N], one value an architecture; scores are [N] float64, higher is better. Missing values (NaN) take the mean
rank. All raise InputError where columns differ in length or are no lists of numbers.
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


def az_nas(expressivity: ArrayLike, progressivity: ArrayLike, trainability: ArrayLike, complexity: ArrayLike) -> Floats:
    """Returns AZ-NAS's mean log rank of its four proxies; complexity is the number of multiply-adds.

    Lee and Ham, CVPR 2024. The public code sums log(rank / N), ties sharing ranks; its order is that of the mean.
    """
    return mean_log_rank(expressivity, progressivity, trainability, complexity)


def t_cet(saliency_snr: Sequence[Sequence[float]], layer_nwot: Sequence[Sequence[float]]) -> Floats:
    """Returns T-CET: the sum over a network's layers of saliency signal-to-noise times layer-wise NWOT.

    Xiang et al., AutoML 2023. The signal-to-noise ratio of a layer is the sum of its weights' saliency (SNIP's or
    SynFlow's) over the standard deviation; NWOT of a layer is the log-determinant of its activations' kernel. Each
    argument has a sequence of layers for each of the N architectures; the two agree in layers. The product by layers is
    taken from public re-implementations, as the authors' code was not at hand. Raises InputError where layers differ.
    """
    if len(saliency_snr) != len(layer_nwot):
        raise InputError(
            f"T-CET needs both factors of each architecture, got {len(saliency_snr)} and {len(layer_nwot)}"
        )
    found = []
    for row, (snr, nwot) in enumerate(zip(saliency_snr, layer_nwot, strict=True)):
        factors = numbers(f"saliency_snr[{row}]", snr), numbers(f"layer_nwot[{row}]", nwot)
        if len(factors[0]) != len(factors[1]):
            raise InputError(
                f"T-CET multiplies layer by layer, but architecture {row} has {len(factors[0])} layers in saliency_snr "
                f"and {len(factors[1])} in layer_nwot"
            )
        found.append(float(factors[0] @ factors[1]))
    return np.array(found)


def _columns(columns: Sequence[ArrayLike]) -> list[Floats]:
    found = [numbers(f"column {i}", values) for i, values in enumerate(columns)]
    lengths = [len(values) for values in found]
    if not found or len(set(lengths)) > 1:
        raise InputError(f"columns of equal length are combined, one value an architecture; got lengths {lengths}")
    return found
