"""Checks of a table of proxy scores, and the rankings by its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..correlation import Floats, ranks
from ..errors import InputError

MIN_ROWS = 10
MAX_MISSING = 0.1
"""A proxy that is missing (NaN) on a larger part of the architectures is left out."""


@dataclass(frozen=True)
class ProxyTable:
    """The usable columns of a table of scores, and why the others are not."""

    columns: dict[str, Floats]  # each [N]; NaN where missing
    notes: tuple[str, ...]  # a sentence for each column left out
    rows: int  # N


def read_table(scores: Mapping[str, Sequence[float]], rows: NDArray[np.bool_] | None = None) -> ProxyTable:
    """Returns the columns of `scores` that can rank the architectures `rows` [N] (all where None).

    A column is left out, with a note, where it is constant on those rows, or missing (NaN, None) on more than a tenth
    of them. Infinities are values like others: they rank first or last.

    Raises InputError where there is no column, a column is not a list of numbers, columns differ in length, there are
    fewer than ten rows, or no column is usable.
    """
    if not isinstance(scores, Mapping) or not scores:
        raise InputError(f"scores maps names of proxies to their values, one an architecture; got {scores!r:.80}")
    columns = {str(name): numbers(f"scores[{name!r}]", values) for name, values in scores.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"every proxy needs one value an architecture (NaN where it has none), got lengths {lengths}")
    count = next(iter(lengths.values()))
    if count < MIN_ROWS:
        raise InputError(f"a choice among proxies needs {MIN_ROWS} architectures or more, got {count}")
    judged = np.ones(count, bool) if rows is None else rows
    reasons = {name: _unusable(values[judged]) for name, values in columns.items()}
    notes = tuple(f"{name} is left out: {reason}" for name, reason in reasons.items() if reason)
    usable = {name: values for name, values in columns.items() if not reasons[name]}
    if not usable:
        raise InputError(f"no proxy can be used ({'; '.join(notes)}); pass proxies whose values differ")
    return ProxyTable(usable, notes, count)


def _unusable(values: Floats) -> str:
    missing = int(np.isnan(values).sum())
    if missing > MAX_MISSING * len(values):
        return f"it is missing on {missing} of {len(values)} architectures"
    if np.unique(values[~np.isnan(values)]).size < 2:
        return f"it is {values[~np.isnan(values)][0]:g} on every architecture"
    return ""


def notes_of_rows(columns: Mapping[str, Floats], *others: Floats) -> list[str]:
    """Returns what is to be said of rows that miss a value of a proxy, or equal another row in `others` too."""
    notes = [
        f"{name} is missing on {int(np.isnan(values).sum())} of {len(values)} architectures, which have its mean rank"
        for name, values in columns.items()
        if np.isnan(values).any()
    ]
    rows = np.column_stack([*columns.values(), *others])
    equal = len(rows) - len(np.unique(rows, axis=0))
    if equal:
        notes.append(
            f"{equal} rows equal another in every column; if they are the same architectures, give each only once"
        )
    return notes


def numbers(name: str, values: ArrayLike) -> Floats:
    """Returns `values` as float64 [N], None as NaN; raises InputError where they are no list of numbers."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be a list of numbers, NaN where missing: {error}") from error
    if array.ndim != 1:
        raise InputError(f"{name} must be a list of numbers, one an architecture, got an array of shape {array.shape}")
    return array


def rankings(values: Floats) -> Floats:
    """Returns ranks from 1 to N, ties sharing theirs; a missing value (NaN) has the mean rank, which says nothing.

    The ranks of m values present are stretched to 1..N, so that columns with and without missing values weigh alike.
    """
    present = ~np.isnan(values)
    found = np.full(len(values), (len(values) + 1) / 2)
    found[present] = ranks(values[present]) * ((len(values) + 1) / (present.sum() + 1))
    return found
