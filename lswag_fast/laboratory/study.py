"""What each proxy is worth on each task: rank correlations, the top, regret, and what it knows beyond counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from .. import correlation
from ..correlation import Floats
from ..errors import InputError
from . import resampling

MIN_ARCHITECTURES = 10
STATISTICS = ("spearman", "kendall", "precision", "regret", "partial")
"""Names of the statistics of a row: rho, tau-b, precision at the top k, regret of the best pick, partial rho."""

_LARGE, _DRAWS, _DRAWS_OF_LARGE = 2000, 1000, 200
_BLOCK = 2_000_000
_NAMED = 3
_ROWS_A_COUNT, _NEAR_ZERO = 10, 0.2


@dataclass(frozen=True)
class Task:
    """Architectures, their accuracy on one task, and the values that proxies give them; NaN is a missing value.

    Of R repeats (scores with several seeds) each has its own values. Higher is better, for accuracies and proxies.
    """

    name: str
    archs: Sequence[str]  # N
    accuracy: Floats  # [N]
    proxies: Mapping[str, Floats]  # each [R, N]
    counts: Sequence[str] = ()  # those of `proxies` that only count (parameters, multiply-adds, ...)
    notes: Sequence[str] = ()  # how rows were matched, and what was left out

    def __post_init__(self) -> None:
        lengths = {"accuracy": np.shape(self.accuracy), **{name: np.shape(v)[1:] for name, v in self.proxies.items()}}
        wrong = {name: shape for name, shape in lengths.items() if shape != (len(self.archs),)}
        if wrong:
            name, shape = next(iter(wrong.items()))
            raise InputError(
                f"{self.name}: {name} needs one value an architecture ({len(self.archs)}), NaN where it has none; "
                f"got {' x '.join(map(str, shape)) or 'a single number'}"
            )


@dataclass(frozen=True)
class Estimate:
    """A statistic: its mean over the repeats, its 95 % interval over resampled architectures, and each repeat's."""

    value: float
    low: float
    high: float
    by_repeat: tuple[float, ...]

    @property
    def spread(self) -> float:
        """The standard deviation over the repeats (sample form), NaN for a single one."""
        return float(np.std(self.by_repeat, ddof=1)) if len(self.by_repeat) > 1 else math.nan


@dataclass(frozen=True)
class Row:
    """One proxy on one task; `status` says why there are no estimates where there are none."""

    task: str
    proxy: str
    status: Literal["ok", "constant", "missing"]
    architectures: int  # that have a value in every repeat
    is_count: bool = False
    estimates: Mapping[str, Estimate] = field(default_factory=dict)  # by `STATISTICS`; a count has no partial
    closest_count: str | None = None  # the count that ranks most like it
    rho_with_count: float = math.nan
    warnings: tuple[str, ...] = ()

    def flat(self) -> dict[str, Any]:
        """Returns the row as plain values, None where there is none; `<statistic>_low` and so on for intervals."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("estimates", "warnings")}
        for name in STATISTICS:
            found = self.estimates.get(name)
            parts = ("", "value"), ("_low", "low"), ("_high", "high"), ("_spread", "spread")
            plain |= {f"{name}{suffix}": getattr(found, part) if found else None for suffix, part in parts}
            plain[f"{name}_by_repeat"] = list(map(finite, found.by_repeat)) if found else None
        return {name: finite(value) for name, value in plain.items()} | {"warnings": list(self.warnings)}


@dataclass(frozen=True)
class TaskStudy:
    """The rows of one task, best Spearman's rho first, and what they rest on."""

    task: Task
    top: int  # the k of precision at the top
    draws: int
    rows: tuple[Row, ...]

    @property
    def architectures(self) -> int:
        """The number of architectures with an accuracy."""
        return len(self.task.archs)

    @property
    def repeats(self) -> int:
        """The most repeats that a proxy has."""
        return max((len(values) for values in self.task.proxies.values()), default=1)


def study(
    tasks: Sequence[Task], *, top: int | None = None, draws: int | None = None, proxies: Sequence[str] = ()
) -> list[TaskStudy]:
    """Returns the study of each task.

    Every proxy of any task has a row in each, "missing" where it has fewer than ten values there. Architectures without
    an accuracy are left out and named in the notes.

    Args:
        tasks: as many as there are; each is studied by itself.
        top: the k of precision at the top; a tenth of the architectures by default, rounded up.
        draws: resamples of the architectures for each interval; 1000 by default, 200 beyond 2000 architectures.
        proxies: study these alone (and the counts); all by default.

    Raises:
        InputError: a task has fewer than ten architectures with an accuracy, all accuracies are equal, `top` is not
            below the number of architectures, `draws` is below 20, or no task has a proxy of that name.
    """
    known = list(dict.fromkeys(name for task in tasks for name in task.proxies))
    unknown = [name for name in proxies if name not in known]
    if unknown:
        raise InputError(f"no table holds a proxy called {', '.join(unknown)}; there are {', '.join(known)}")
    counts = {name for task in tasks for name in task.counts}
    wanted = [name for name in known if not proxies or name in proxies or name in counts]
    if not wanted:
        raise InputError("there is no proxy to study; pass a table with at least one column of scores")
    if draws is not None and draws < 20:
        raise InputError(f"an interval needs 20 draws or more, got {draws}")
    usable = [_with_accuracy(task) for task in tasks]
    for task in usable:
        _check(task, top)
    return [_studied(task, wanted, top or math.ceil(len(task.archs) / 10), draws) for task in usable]


def finite(value: Any) -> Any:
    """Returns `value`, or None where it is a float that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_accuracy(task: Task) -> Task:
    present = np.isfinite(task.accuracy)
    if present.all():
        return task
    absent = [arch for arch, kept in zip(task.archs, present, strict=True) if not kept]
    others = f" and {len(absent) - _NAMED} others" if len(absent) > _NAMED else ""
    note = f"{len(absent)} architectures have no accuracy and are left out: {'; '.join(absent[:_NAMED])}{others}"
    archs = [arch for arch, kept in zip(task.archs, present, strict=True) if kept]
    proxies = {name: np.asarray(values)[:, present] for name, values in task.proxies.items()}
    notes = (*task.notes, note)
    return replace(task, archs=archs, accuracy=task.accuracy[present], proxies=proxies, notes=notes)


def _check(task: Task, top: int | None) -> None:
    count = len(task.archs)
    if count < MIN_ARCHITECTURES:
        raise InputError(
            f"{task.name}: {count} architectures have both scores and an accuracy, and a study needs "
            f"{MIN_ARCHITECTURES} or more ({'; '.join(task.notes) or 'nothing was left out'})"
        )
    if np.ptp(task.accuracy) == 0:
        raise InputError(f"{task.name}: all {count} accuracies are {task.accuracy[0]:g}; there is nothing to rank")
    if top is not None and not 1 <= top < count:
        raise InputError(f"{task.name}: the top must be 1 to {count - 1} of its {count} architectures, got {top}")


def _studied(task: Task, names: Sequence[str], top: int, draws: int | None) -> TaskStudy:
    draws = draws or (_DRAWS if len(task.archs) <= _LARGE else _DRAWS_OF_LARGE)
    if len(task.archs) < _ROWS_A_COUNT * (1 + len(task.counts)):
        note = f"{len(task.archs)} architectures are few for partial correlations given {len(task.counts)} counts"
        task = replace(task, notes=(*task.notes, f"{note}: read those with care"))
    if not task.counts:
        note = "no column counts parameters or the like, so it is not known what proxies tell beyond counts"
        task = replace(task, notes=(*task.notes, note))
    rows: list[Row] = []
    by_presence: dict[bytes, list[str]] = {}
    for name in names:
        present = _present(task, name)
        by_presence.setdefault(present.tobytes(), []).append(name)
    for mask, group in by_presence.items():
        present = np.frombuffer(mask, dtype=bool)
        rows += _rows(task, group, present, top, draws)
    rows.sort(key=lambda row: -row.estimates["spearman"].value if row.estimates else math.inf)
    return TaskStudy(task, top, draws, tuple(rows))


def _present(task: Task, name: str) -> Any:
    if name not in task.proxies:
        return np.zeros(len(task.archs), dtype=bool)
    return ~np.isnan(task.proxies[name]).any(axis=0)


def _rows(task: Task, names: Sequence[str], present: Any, top: int, draws: int) -> list[Row]:
    """The rows of proxies that have values for the same architectures."""
    count = int(present.sum())
    if count < MIN_ARCHITECTURES:
        reason = f"has values for {count} of {len(task.archs)} architectures, and {MIN_ARCHITECTURES} are needed"
        return [Row(task.name, n, "missing", count, n in task.counts, warnings=(reason,)) for n in names]
    accuracy = task.accuracy[present]
    counts = {n: task.proxies[n][0, present] for n in task.counts if n in task.proxies}
    counts = {n: values for n, values in counts.items() if not np.isnan(values).any() and np.ptp(values) > 0}
    values = {name: task.proxies[name][:, present] for name in names}
    varying = {name: v for name, v in values.items() if (v != v[:, :1]).any()}
    found = _estimates(varying, accuracy, counts, set(task.counts), min(top, count - 1), draws) if varying else {}
    return [_row(task, name, values[name], counts, found.get(name)) for name in names]


def _estimates(
    values: Mapping[str, Floats],
    accuracy: Floats,
    counts: Mapping[str, Floats],
    without_partial: set[str],
    top: int,
    draws: int,
) -> dict[str, dict[str, Estimate]]:
    """The estimates of each proxy [R, N]; resamples come in blocks, whose ranks of accuracy and counts are shared."""
    weights = resampling.resamples(len(accuracy), draws)
    found: dict[tuple[str, str], list[Floats]] = {}
    size = max(1, _BLOCK // len(accuracy))
    for block in (weights[start : start + size] for start in range(0, len(weights), size)):
        y = resampling.centred_ranks(accuracy, block)
        given = np.array([resampling.centred_ranks(c, block) for c in counts.values()])
        for name, repeats in values.items():
            of_repeats = [
                _of_block(x, accuracy, y, None if name in without_partial else given, top, block) for x in repeats
            ]
            for statistic in of_repeats[0]:
                found.setdefault((name, statistic), []).append(np.array([one[statistic] for one in of_repeats]))
    estimates: dict[str, dict[str, Estimate]] = {name: {} for name in values}
    for (name, statistic), blocks in found.items():
        estimates[name][statistic] = _estimate(np.concatenate(blocks, axis=1))
    return estimates


def _of_block(
    x: Floats, accuracy: Floats, y: Floats, given: Floats | None, top: int, weights: Floats
) -> dict[str, Floats]:
    """Each statistic [B] of one repeat's values [N]."""
    ranks = resampling.centred_ranks(x, weights)
    found = {
        "spearman": resampling.spearman(ranks, y, weights),
        "kendall": resampling.kendall(x, accuracy, weights),
        "precision": resampling.precision_at_top(x, accuracy, top, weights),
        "regret": resampling.regret(x, accuracy, weights),
    }
    if given is not None and len(given):
        found["partial"] = resampling.partial_spearman(ranks, y, given, weights)
    return found


def _estimate(drawn: Floats) -> Estimate:
    """The estimate from values [R, 1 + draws], the first of each repeat being that of the sample itself."""
    defined = np.isfinite(drawn)
    # A repeat in which the proxy is constant has no rank correlation; the others stand for it.
    mean = np.divide(
        np.where(defined, drawn, 0).sum(axis=0),
        defined.sum(axis=0),
        out=np.full(drawn.shape[1], np.nan),
        where=defined.any(axis=0),
    )
    resampled = mean[1:][np.isfinite(mean[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (math.nan, math.nan)
    return Estimate(float(mean[0]), float(low), float(high), tuple(map(float, drawn[:, 0])))


def _row(
    task: Task, name: str, values: Floats, counts: Mapping[str, Floats], found: Mapping[str, Estimate] | None
) -> Row:
    count = values.shape[1]
    absent = len(task.archs) - count
    warnings = [f"has no value for {absent} of {len(task.archs)} architectures, which are left out"] if absent else []
    is_count = name in task.counts
    if found is None:
        where = "" if (values == values[0, 0]).all() else " of the first repeat, and constant in the others too"
        warnings.append(f"is {values[0, 0]:g} for every architecture{where}")
        return Row(task.name, name, "constant", count, is_count, warnings=tuple(warnings))
    constant = sum(math.isnan(rho) for rho in found["spearman"].by_repeat)
    if constant:
        warnings.append(f"is constant in {constant} of {len(values)} repeats, which its correlations leave out")
    others = {n: c for n, c in counts.items() if n != name}
    # Mean ranks over the repeats rank as the repeats do together.
    ranking = np.mean([correlation.ranks(v) for v in values], axis=0)
    alike = {n: correlation.spearman(ranking, c) for n, c in others.items()}
    closest = max(alike, key=lambda n: abs(alike[n]), default=None) if not is_count else None
    warnings += _readings(found, list(counts))
    rho = alike[closest] if closest else math.nan
    return Row(task.name, name, "ok", count, is_count, dict(found), closest, rho, tuple(warnings))


def _readings(found: Mapping[str, Estimate], counts: Sequence[str]) -> list[str]:
    rho, partial = found["spearman"], found.get("partial")
    said = []
    if rho.high < 0:
        said.append("ranks the wrong way round: architectures that it ranks low are the better ones")
    if partial is None or rho.low <= 0 <= rho.high:
        return said
    given = " and ".join(filter(None, (", ".join(counts[:-1]), counts[-1])))
    if math.isnan(partial.value):
        said.append(f"ranks as its counts do: {given} determine its ranking")
    elif partial.low <= 0 <= partial.high:
        near = abs(partial.value) < _NEAR_ZERO
        reading = "ranks as its counts do" if near else "may know nothing beyond its counts"
        interval = f"{partial.value:z.2f} [{partial.low:z.2f}, {partial.high:z.2f}]"
        said.append(f"{reading}: rho is {rho.value:z.2f}, but {interval} given {given}")
    return said
