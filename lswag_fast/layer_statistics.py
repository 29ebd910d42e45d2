"""Layer statistics over many candidates (Casarin et al., CVPR 2025, figure 2): where in depth gradients vary, and how.

Everything here is computed from the layer rows of finished scores, so that nothing is scored twice: one score over the
whole network holds the Lambda of every window.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .correlation import Floats, spearman
from .errors import InputError
from .options import Numerator
from .proxies.result import LayerRow

PERCENTILES = tuple(range(0, 101, 10))
"""The percentiles of depth of equation 6; the last layer stands alone at 100."""

_OUTLIER = 3.5 / 0.6745
_LEAST_SPIKE = 0.1
_LEAST_FITTED = 5


@dataclass(frozen=True)
class Profile:
    """Mean and standard deviation (population) over networks, by percentile; NaN where no network has a layer."""

    networks: int
    mean: Floats  # [11]
    std: Floats  # [11]


@dataclass(frozen=True)
class WindowSuggestion:
    """The window that the spikes of a profile suggest, the percentiles of all spikes, and why."""

    window: tuple[int, int]
    spikes: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class LayerStatistics:
    """What the layers of N networks come to in each of the 11 percentiles of depth.

    Log sigma is the natural logarithm of a layer's mean sigma (sigma of a weight: the deviation of its |gradient| over
    the groups), and of a network in a percentile the mean over its layers there. A term is the sum over these
    layers of log(sum over live weights of 1 / sigma), the part of Lambda that they add (equation 6).
    """

    layers: NDArray[np.intp]  # [N], how many layers each network has
    log_sigma: Floats  # [N, 11]; NaN where a network has no layer that is not dead
    terms: Floats  # [N, 11]; 0 there

    def depths(self) -> dict[int, int]:
        """Returns how many networks have each number of layers, by number."""
        return dict(sorted(Counter(self.layers.tolist()).items()))

    def having(self, layers: int) -> LayerStatistics:
        """Returns the statistics of the networks with so many layers alone."""
        kept = self.layers == layers
        return LayerStatistics(self.layers[kept], self.log_sigma[kept], self.terms[kept])

    def profile(self) -> Profile:
        """Returns mean and deviation of log sigma."""
        return _profile(self.log_sigma)

    def term_profile(self) -> Profile:
        """Returns mean and deviation of the terms."""
        return _profile(self.terms)

    def trainability(self, window: tuple[int, int]) -> Floats:
        """Returns Lambda of every network, [N], over a window (first, last) in percent of depth, both included."""
        inside = [place for place, percentile in enumerate(PERCENTILES) if window[0] <= percentile <= window[1]]
        return np.array([math.fsum(row) for row in self.terms[:, inside]])

    def window_rho(self, accuracy: ArrayLike, networks: ArrayLike | None = None) -> Floats:
        """Returns Spearman's rho of Lambda with accuracy for every window, [11, 11] by first and last percentile.

        The diagonal has the single percentiles. NaN where last < first, or Lambda or accuracy is the same everywhere.

        Args:
            accuracy: [M] finite numbers, higher is better.
            networks: [M] places of the networks that these are of; None: all, in order.

        Raises:
            InputError: the lengths differ, or an accuracy is not finite.
        """
        chosen = np.arange(len(self.layers)) if networks is None else np.asarray(networks, dtype=np.intp)
        given = np.asarray(accuracy, dtype=np.float64)
        if given.shape != chosen.shape or not np.isfinite(given).all():
            raise InputError(
                f"accuracy needs one finite number a network ({len(chosen)}), got {np.size(given)} numbers, "
                f"{np.count_nonzero(~np.isfinite(given))} of them not finite; leave out networks that have none"
            )
        rho = np.full((len(PERCENTILES), len(PERCENTILES)), np.nan)
        for first, low in enumerate(PERCENTILES):
            for last, high in enumerate(PERCENTILES[first:], start=first):
                rho[first, last] = spearman(self.trainability((low, high))[chosen], given)
        return rho

    def suggestion(self) -> WindowSuggestion:
        """Returns the window that :func:`suggest_window` finds in the mean of log sigma."""
        return suggest_window(self.profile().mean)

    def to_dict(self) -> dict[str, Any]:
        """Returns profiles and suggestion as plain values that JSON can hold, None for NaN."""
        found = self.suggestion()
        return {
            "networks": len(self.layers),
            "percentiles": list(PERCENTILES),
            "log_sigma": _plain(self.profile()),
            "lambda_term": _plain(self.term_profile()),
            "suggested_window": list(found.window),
            "spikes": list(found.spikes),
            "reason": found.reason,
        }


def layer_statistics(networks: Iterable[Sequence[LayerRow]], *, numerator: Numerator = "one") -> LayerStatistics:
    """Reduces the layer rows of many networks to their percentiles of depth; reads them once, one network at a time.

    Args:
        networks: for each network the `layers` of its record or result, scored over the whole network.
        numerator: "one" for L-SWAG's terms, "mean" for ZiCo's, log(sum of mean |gradient| / sigma).

    Raises:
        InputError: there is no network, or one has no layers or was scored over a part of its depth.
    """
    layers, log_sigma, terms = [], [], []
    for number, rows in enumerate(networks, start=1):
        if not rows or not all(row.in_window for row in rows):
            what = "has no layers" if not rows else "was scored over a window"
            raise InputError(f"network {number} {what}; score it over the whole network, window=(0, 100)")
        layers.append(len(rows))
        log_sigma.append([_mean_log_sigma(rows, percentile) for percentile in PERCENTILES])
        terms.append([window_trainability(rows, (p, p), numerator=numerator) for p in PERCENTILES])
    if not layers:
        raise InputError("layer statistics need the layers of one network at least, got none")
    return LayerStatistics(np.array(layers), np.array(log_sigma), np.array(terms))


def window_trainability(rows: Sequence[LayerRow], window: tuple[int, int], *, numerator: Numerator = "one") -> float:
    """Returns the Lambda that a score with this window would have, from the rows of a score of the whole network."""
    inside = [row for row in rows if window[0] <= row.percentile <= window[1]]
    terms = [row.log_sum_mean_over_sigma if numerator == "mean" else row.log_sum_inverse_sigma for row in inside]
    return math.fsum(term for term in terms if term is not None)


def suggest_window(mean_log_sigma: ArrayLike) -> WindowSuggestion:
    """Returns the window of a profile's strongest spike. The paper reads spikes by eye; this rule is ours.

    A straight line, the trend of gradients with depth, is fitted to the percentiles 0 to 90 by the median of the slopes
    of all pairs (Theil, Sen). A percentile is a spike where it lies off that line, on either side, by more than
    3.5 of Iglewicz and Hoaglin's modified z-scores (0.6745 x distance / median distance) and by 0.1 at least, a
    tenth of sigma. The window is the run of neighbouring spikes on one side whose distances sum to most. Percentile
    100, the last layer alone, next to the loss, lies off every trend: it is neither fitted nor taken. Where nothing
    stands out, or fewer than five percentiles have layers, the window is (0, 100).

    Args:
        mean_log_sigma: [11], by percentile; NaN where there are no layers.
    """
    values = np.asarray(mean_log_sigma, dtype=np.float64)[:-1]
    known = np.flatnonzero(np.isfinite(values))
    if len(known) < _LEAST_FITTED:
        return WindowSuggestion(
            (0, 100), (), f"only {len(known)} percentiles below 100 have layers: no trend is fitted"
        )
    heights = values[known]
    pairs = combinations(range(len(known)), 2)
    slope = float(np.median([(heights[j] - heights[i]) / (known[j] - known[i]) for i, j in pairs]))
    distance = heights - slope * known
    distance -= np.median(distance)
    threshold = max(_OUTLIER * float(np.median(np.abs(distance))), _LEAST_SPIKE)
    side = np.where(np.abs(distance) > threshold, np.sign(distance), 0).astype(int)
    if not side.any():
        return WindowSuggestion(
            (0, 100), (), f"no percentile lies further than {threshold:.2f} off the trend: nothing stands out"
        )
    runs = [[place for place, _ in run] for here, run in groupby(enumerate(side), lambda item: item[1]) if here]
    best = max(runs, key=lambda run: float(np.abs(distance[run]).sum()))
    window = PERCENTILES[known[best[0]]], PERCENTILES[known[best[-1]]]
    spikes = tuple(PERCENTILES[place] for place in known[side != 0])
    where = "above" if side[best[0]] > 0 else "below"
    furthest = float(np.abs(distance[best]).max())
    reason = f"log sigma lies up to {furthest:.2f} {where} its trend there; {threshold:.2f} makes a spike"
    return WindowSuggestion(window, spikes, reason)


def _mean_log_sigma(rows: Sequence[LayerRow], percentile: int) -> float:
    found = [math.log(row.mean_sigma) for row in rows if row.percentile == percentile and row.mean_sigma]
    return math.fsum(found) / len(found) if found else math.nan


def _profile(values: Floats) -> Profile:
    known = np.isfinite(values)
    count = np.where(known.any(axis=0), known.sum(axis=0), np.nan)
    mean = np.where(known, values, 0.0).sum(axis=0) / count
    std = np.sqrt(np.where(known, (values - mean) ** 2, 0.0).sum(axis=0) / count)
    return Profile(len(values), mean, std)


def _plain(profile: Profile) -> dict[str, Any]:
    return {"mean": nullable(profile.mean), "std": nullable(profile.std)}


def nullable(values: Floats) -> list[Any]:
    """Returns an array as nested lists, with None for NaN, which JSON does not have."""
    objects = values.astype(object)
    objects[~np.isfinite(values)] = None
    nested: list[Any] = objects.tolist()
    return nested
