"""Entropies of discretised columns, in bits: the plug-in estimate from counts in bins.

NAS-Bench-Suite-Zero (Krishnakumar et al., NeurIPS 2022) introduced H(y | z1, ..., zk) of accuracies given proxies:
accuracies and proxies are cut into bins, and the entropies are those of the counts. How many bins it takes, and of
which kind, could not be established, so both are options here, and the defaults are ours:

- `frequency` (default): bins that hold equally many architectures. A proxy and its logarithm, or any other increasing
  function of it, then have the same information, as they have the same rho. Ties stay together.
- `width`: bins of equal width between the smallest and largest finite value, as in a histogram. One outlier is enough
  to put nearly all architectures into one bin, whose information is then nearly nothing.
- The number of bins is Sturges' by default, ceil(log2 N) + 1, 11 for 725 architectures.

A missing value (NaN) has a bin of its own. The plug-in estimate is biased where bins hold few architectures: with b
bins, H(y | z1, z2) needs well over b^3 architectures for its value, fewer for the order of proxies by it.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..correlation import Floats, ranks
from ..errors import InputError

Binning = Literal["frequency", "width"]
BINNINGS = ("frequency", "width")
Codes = NDArray[np.intp]


def sturges(rows: int) -> int:
    """Returns Sturges' number of bins for a sample of `rows`."""
    return math.ceil(math.log2(rows)) + 1


def discretise(values: Floats, bins: int, binning: Binning = "frequency") -> Codes:
    """Returns the bin of each value, [N] integers from 0 to bins - 1, and -1 for NaN."""
    codes = np.full(len(values), -1, dtype=np.intp)
    present = ~np.isnan(values)
    known = values[present]
    if not known.size:
        return codes
    if binning == "frequency":
        codes[present] = ((ranks(known) - 0.5) / known.size * bins).astype(np.intp)
    else:
        finite = known[np.isfinite(known)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        codes[present] = np.digitize(known, np.linspace(low, high, bins + 1)[1:-1])
    return codes


def entropy(*columns: Codes) -> float:
    """Returns the joint entropy of discrete columns, in bits."""
    _, counts = np.unique(np.column_stack(columns), axis=0, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def conditional_entropy(target: Codes, *given: Codes) -> float:
    """Returns H(target | given), in bits."""
    return entropy(target, *given) - entropy(*given)


def information_gain(target: Codes, given: Codes, added: Codes) -> float:
    """Returns H(y | z1) - H(y | z1, z2): what z2 tells of y beyond z1, in bits (LIBRA, Algorithm 1)."""
    return conditional_entropy(target, given) - conditional_entropy(target, given, added)


def checked_bins(bins: int | None, binning: str, rows: int) -> int:
    """Returns the number of bins to use; raises InputError where the options cannot be used."""
    if binning not in BINNINGS:
        raise InputError(f"binning is one of {', '.join(BINNINGS)}, got {binning!r}")
    if bins is None:
        return sturges(rows)
    if isinstance(bins, bool) or not isinstance(bins, int | np.integer) or not 2 <= bins <= rows:
        raise InputError(f"bins is None (Sturges' rule) or a number from 2 to that of architectures, got {bins!r}")
    return int(bins)
