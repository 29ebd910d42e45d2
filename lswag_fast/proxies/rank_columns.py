"""Ranks of a pool of networks by several proxies, for scores that are defined over a pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..correlation import Floats, ranks
from ..errors import InputError


def ranked_columns(columns: Sequence[ArrayLike]) -> list[Floats]:
    """Returns each column [N] as ranks from 1, ascending, equal values sharing the mean of theirs.

    Rows with a NaN in any column are ranked in none, and NaN in all; infinite values have a rank like others. Raises
    InputError unless all columns have one axis and one length.
    """
    values = [np.asarray(column, dtype=np.float64) for column in columns]
    shapes = sorted({v.shape for v in values})
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise InputError(
            f"expected columns of one value a network, all of the same length, got shapes {', '.join(map(str, shapes))}"
        )
    complete = ~np.isnan(values).any(axis=0)
    ranked = []
    for column in values:
        places = np.full(column.shape, np.nan)
        places[complete] = ranks(column[complete])
        ranked.append(places)
    return ranked
