"""LIBRA (L-SWAG, CVPR 2025, arXiv 2505.07300, algorithm 1 and equation 9): three proxies chosen for a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..correlation import Floats, spearman
from ..errors import InputError
from ..laboratory.resampling import spearman_interval
from .aggregation import COMBINATIONS
from .information import Binning, checked_bins, discretise, information_gain
from .table import MIN_ROWS, notes_of_rows, numbers, rankings, read_table

Combination = Literal["rank_sum", "mean_log_rank"]

REACH = 0.1
"""z2 and z3 are sought among the proxies whose rho is less than this below the highest (the paper's threshold)."""


@dataclass(frozen=True)
class Candidate:
    """A proxy that LIBRA weighed, after it was turned by `sign`."""

    name: str
    sign: int  # -1 where the proxy was turned round (`oriented`)
    rho: float  # Spearman's, with the known accuracies
    information_gain: float  # H(y | z1) - H(y | z1, z) in bits; NaN for z1 itself
    bias: float  # Pearson's correlation of its ranking with that by the bias column; NaN where that is constant
    in_reach: bool  # whether it could be chosen as z2 or z3
    interval: tuple[float, float]  # of rho: 95 %, over resampled architectures; NaN where resamples is 0


@dataclass(frozen=True)
class Combined:
    """A few proxies combined into one score."""

    names: tuple[str, ...]
    score: Floats  # [N], higher is better
    rho: float  # of the score with the known accuracies
    interval: tuple[float, float]  # of rho: 95 %, over resampled architectures, the proxies staying as chosen
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Libra(Combined):
    """What :func:`libra` chose, why, and the score by it; `names` are z1, z2, z3, fewer where a note says so."""

    reasons: tuple[str, ...]  # a sentence a chosen proxy
    candidates: tuple[Candidate, ...]  # all that were weighed, by falling rho
    accuracy_bias: float  # as a candidate's bias, of the accuracies


@dataclass(frozen=True)
class Pool:
    """The usable proxies of a benchmark, weighed on the architectures whose accuracy is known."""

    columns: dict[str, Floats]  # each [N], turned by its sign
    signs: dict[str, int]
    rho: dict[str, float]
    accuracy: Floats  # [N], NaN where not known
    bias_column: Floats  # [N]
    bias_name: str
    bins: int
    binning: Binning
    notes: tuple[str, ...]

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Which architectures have an accuracy, [N]."""
        return ~np.isnan(self.accuracy)

    @cached_property
    def best(self) -> str:
        """The proxy of the highest rho, z1; the first named of equals."""
        return max(self.rho, key=self.rho.__getitem__)

    @cached_property
    def near(self) -> list[str]:
        """The other proxies within reach of the best, by falling rho."""
        others = [n for n in self.rho if n != self.best and self.rho[n] > self.rho[self.best] - REACH]
        return sorted(others, key=self.rho.__getitem__, reverse=True)

    @cached_property
    def gains(self) -> dict[str, float]:
        """Information gain of each proxy but the best, given the best, in bits."""
        codes = {n: discretise(z[self.known], self.bins, self.binning) for n, z in self.columns.items()}
        target = discretise(self.accuracy[self.known], self.bins, self.binning)
        given = codes.pop(self.best)
        return {name: _comparable(information_gain(target, given, added)) for name, added in codes.items()}

    @cached_property
    def biases(self) -> dict[str, float]:
        """Bias of each proxy: how far its ranking follows the bias column's."""
        return {name: self._bias(values) for name, values in self.columns.items()}

    @cached_property
    def accuracy_bias(self) -> float:
        """How far the ranking by accuracy follows the bias column's."""
        return self._bias(self.accuracy)

    def _bias(self, values: Floats) -> float:
        # Pearson's correlation of two rankings is Spearman's of what they rank.
        return _comparable(spearman(rankings(values[self.known]), rankings(self.bias_column[self.known])))

    def combine(self, names: Sequence[str], combination: Combination) -> Floats:
        """Returns the score by the proxies `names`, [N], over all architectures."""
        return COMBINATIONS[combination](*(self.columns[name] for name in names))

    def judge(self, score: Floats, resamples: int) -> tuple[float, tuple[float, float]]:
        """Returns rho of a score with the known accuracies, and its interval (NaN where resamples is 0)."""
        x, y = score[self.known], self.accuracy[self.known]
        return spearman(x, y), _interval(x, y, resamples)

    def interval_of(self, name: str, resamples: int) -> tuple[float, float]:
        """Returns the interval of a proxy's rho, over the architectures where it is not missing."""
        rows = self.known & ~np.isnan(self.columns[name])
        return _interval(self.columns[name][rows], self.accuracy[rows], resamples)


def libra(
    scores: Mapping[str, Sequence[float]],
    accuracy: Sequence[float],
    params: Sequence[float],
    *,
    oriented: bool = True,
    bins: int | None = None,
    binning: Binning = "frequency",
    bias: str | Sequence[float] = "params",
    combine: Combination = "rank_sum",
    resamples: int = 1000,
) -> Libra:
    """Chooses up to three proxies for a benchmark by algorithm 1 of L-SWAG, and combines them into one score.

    z1 is the proxy of the highest Spearman rho with the accuracies. Among the others whose rho is less than 0.1 below
    it, z2 has the lowest information gain H(y | z1) - H(y | z1, z2) (equation 9; :mod:`.information` has the estimate);
    of the rest of those, z3 is the one whose bias is closest to the accuracies': Pearson's correlation between the
    ranking by it and the ranking by parameter count. The paper gives no formula for their combination: the sum of their
    rankings, and the mean log rank of AZ-NAS as an option, are ours. The paper takes rho as it is; by default each
    proxy is first turned by the sign of its rho, and a proxy that ranks backwards is then as good as one that does not.

    The choice sees the known accuracies only; the score covers every architecture. Ties share ranks; of proxies that
    tie, the one of the higher rho is chosen, and then the one named first. A missing value has the mean rank of its
    column. An architecture given twice counts twice, and makes intervals too narrow: give it once (a note tells where
    rows are equal in all columns).

    Args:
        scores: proxies by name, each one value an architecture, [N]; NaN where missing. Constant proxies, and those
            missing on more than a tenth of the architectures of known accuracy, are left out, and notes say so.
        accuracy: [N], higher is better; NaN where not known (the choice then uses the others, ten or more).
        params: parameter counts, [N], any unit.
        oriented: turn each proxy by the sign of its rho; False is the paper's letter.
        bins: of the entropies; None takes Sturges' number, ceil(log2(known architectures)) + 1.
        binning: bins that hold equally many architectures ("frequency"), or of equal width ("width").
        bias: the column whose ranking bias is measured by: "params", the name of a proxy of `scores` (as given, not
            turned), or any other column, [N], such as the depths.
        combine: "rank_sum" or "mean_log_rank".
        resamples: of the architectures, for the 95 % interval of each rho; 0 for none. The choice is not repeated in
            them, and it was made on the same accuracies, so rho and interval flatter a choice made on few.

    Raises InputError for columns of different lengths, fewer than ten architectures or known accuracies, accuracies
    that are infinite or all equal, parameter counts that are missing, no usable proxy, and unknown options.
    """
    check_combination(combine, resamples)
    pool = weigh(scores, accuracy, params, oriented=oriented, bins=bins, binning=binning, bias=bias)
    names, reasons, notes = [pool.best], [_first_reason(pool)], list(pool.notes)
    if pool.near:
        names.append(min(pool.near, key=pool.gains.__getitem__))
        reasons.append(_second_reason(pool, names[1]))
    rest = [name for name in pool.near if name not in names]
    if rest and not np.isnan(pool.accuracy_bias):
        names.append(min(rest, key=lambda name: abs(pool.biases[name] - pool.accuracy_bias)))
        reasons.append(_third_reason(pool, names[2], rest))
    elif rest:
        notes.append(f"no z3: {pool.bias_name} is the same for all architectures, so no bias can be measured by it")
    if len(pool.near) < 2:
        notes.append(_too_few(pool))
    score = pool.combine(names, combine)
    rho, interval = pool.judge(score, resamples)
    return Libra(
        names=tuple(names),
        score=score,
        rho=rho,
        interval=interval,
        notes=tuple(notes),
        reasons=tuple(reasons),
        candidates=_candidates(pool, resamples),
        accuracy_bias=pool.accuracy_bias,
    )


def weigh(
    scores: Mapping[str, Sequence[float]],
    accuracy: Sequence[float],
    params: Sequence[float],
    *,
    oriented: bool = True,
    bins: int | None = None,
    binning: Binning = "frequency",
    bias: str | Sequence[float] = "params",
) -> Pool:
    """Checks a benchmark and returns its usable proxies, weighed; arguments and errors are those of :func:`libra`."""
    accuracies, counts = numbers("accuracy", accuracy), numbers("params", params)
    known = ~np.isnan(accuracies)
    if not isinstance(scores, Mapping):
        raise InputError(f"scores maps names of proxies to their values, got {type(scores).__name__}")
    for name, values in scores.items():
        count = len(numbers(f"scores[{name!r}]", values))
        if count != len(accuracies):
            raise InputError(
                f"each proxy needs one value an architecture: {len(accuracies)} accuracies, but {count} values of "
                f"{name}"
            )
    _check(accuracies, counts, known)
    bins = checked_bins(bins, binning, int(known.sum()))
    bias_name, bias_column = _bias_column(bias, counts, scores)
    table = read_table(scores, known)
    rho = {name: _rho(values, accuracies) for name, values in table.columns.items()}
    signs = {name: -1 if oriented and value < 0 else 1 for name, value in rho.items()}
    return Pool(
        columns={name: signs[name] * values for name, values in table.columns.items()},
        signs=signs,
        rho={name: signs[name] * value for name, value in rho.items()},
        accuracy=accuracies,
        bias_column=bias_column,
        bias_name=bias_name,
        bins=bins,
        binning=binning,
        notes=(*table.notes, *_notes(table.columns, accuracies, counts, rho, oriented)),
    )


def _bias_column(
    bias: str | Sequence[float], params: Floats, scores: Mapping[str, Sequence[float]]
) -> tuple[str, Floats]:
    if not isinstance(bias, str):
        column = numbers("bias", bias)
        if len(column) != len(params):
            raise InputError(f"a bias column needs one value an architecture, got {len(column)} for {len(params)}")
        return "the column given as bias", column
    if bias != "params" and bias not in scores:
        names = ", ".join(map(str, scores))
        raise InputError(f"bias is 'params', a proxy of scores ({names}) or a column of numbers, got {bias!r}")
    return bias, params if bias == "params" else numbers(bias, scores[bias])


def check_combination(combine: str, resamples: int) -> None:
    """Raises InputError where `combine` or `resamples` is not what :func:`libra` takes."""
    if combine not in COMBINATIONS:
        raise InputError(f"combine is one of {', '.join(COMBINATIONS)}, got {combine!r}")
    if isinstance(resamples, bool) or not isinstance(resamples, int | np.integer) or resamples < 0:
        raise InputError(f"resamples is a number of resamples, 0 for no interval, got {resamples!r}")


def _check(accuracy: Floats, params: Floats, known: NDArray[np.bool_]) -> None:
    if len(params) != len(accuracy):
        raise InputError(f"params needs one count an architecture, got {len(params)} for {len(accuracy)} accuracies")
    if known.sum() < MIN_ROWS:
        raise InputError(
            f"LIBRA needs the accuracies of {MIN_ROWS} architectures or more to choose by, got {known.sum()} known of "
            f"{len(accuracy)}"
        )
    if np.isinf(accuracy).any():
        raise InputError("an accuracy is infinite; give NaN where it is not known")
    if np.unique(accuracy[known]).size < 2:
        raise InputError(f"every known accuracy is {accuracy[known][0]:g}; nothing can be ranked by them")
    if not np.isfinite(params).all():
        raise InputError(f"params must be known for every architecture; {int((~np.isfinite(params)).sum())} are not")


def _rho(values: Floats, accuracy: Floats) -> float:
    rows = ~np.isnan(values) & ~np.isnan(accuracy)
    rho = spearman(values[rows], accuracy[rows])
    return 0.0 if np.isnan(rho) else _comparable(rho)


def _interval(x: Floats, y: Floats, resamples: int) -> tuple[float, float]:
    if not resamples:
        return np.nan, np.nan
    return spearman_interval(x, y, resamples)


def _comparable(value: float) -> float:
    """Returns a statistic without its rounding errors, so that equal ones tie."""
    return round(value, 12)


def _notes(
    columns: Mapping[str, Floats], accuracy: Floats, params: Floats, rho: Mapping[str, float], oriented: bool
) -> list[str]:
    notes = notes_of_rows(columns, accuracy, params)
    if not oriented and max(rho.values()) < 0:
        notes.append("every rho is negative, so the score ranks backwards; oriented=True turns the proxies")
    return notes


def _too_few(pool: Pool) -> str:
    limit = pool.rho[pool.best] - REACH
    found = "one other proxy" if pool.near else "no other proxy"
    return (
        f"{found} has a rho above {limit:.3f} ({REACH:g} below that of {pool.best}), so fewer than three are combined"
    )


def _first_reason(pool: Pool) -> str:
    turned = ", after being turned round" if pool.signs[pool.best] < 0 else ""
    return (
        f"z1 = {pool.best}: of {len(pool.rho)} proxies it has the highest Spearman rho with the accuracies of "
        f"{int(pool.known.sum())} architectures, {pool.rho[pool.best]:.3f}{turned}"
    )


def _second_reason(pool: Pool, name: str) -> str:
    limit = pool.rho[pool.best] - REACH
    gain = f"H(y | z1) - H(y | z1, z2) = {pool.gains[name]:.3f} bits"
    others = {other: pool.gains[other] for other in pool.near if other != name}
    if not others:
        return f"z2 = {name}: it is the only other with a rho above {limit:.3f}; {gain}"
    following = min(others, key=others.__getitem__)
    return (
        f"z2 = {name}: of the {len(pool.near)} others with a rho above {limit:.3f} it tells least of the accuracies "
        f"beyond {pool.best}: {gain} (next: {following}, {others[following]:.3f})"
    )


def _third_reason(pool: Pool, name: str, rest: Sequence[str]) -> str:
    bias = f"its bias, a correlation of {pool.biases[name]:.3f} with the ranking by {pool.bias_name}"
    if len(rest) == 1:
        return f"z3 = {name}: it is the only one left; {bias} (the accuracies': {pool.accuracy_bias:.3f})"
    return (
        f"z3 = {name}: of the {len(rest)} left, {bias}, is closest to that of the accuracies, {pool.accuracy_bias:.3f}"
    )


def _candidates(pool: Pool, resamples: int) -> tuple[Candidate, ...]:
    found = [
        Candidate(
            name=name,
            sign=pool.signs[name],
            rho=rho,
            information_gain=pool.gains.get(name, np.nan),
            bias=pool.biases[name],
            in_reach=name in pool.near,
            interval=pool.interval_of(name, resamples),
        )
        for name, rho in pool.rho.items()
    ]
    return tuple(sorted(found, key=lambda candidate: candidate.rho, reverse=True))
