"""Puts scores and accuracies together: the same architecture, however each file spells it, is one row of a task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..correlation import Floats
from ..errors import InputError
from .study import MIN_ARCHITECTURES, Task
from .tables import Arch, Table

COUNTS = ("parameters", "params", "multiply_adds", "macs", "flops", "sum_log_numel", "positions")
"""Columns that only count; partial rank correlations are taken given those of them that a table has."""

_UNNAMED = frozenset(("acc", "accuracy", "val_acc", "val_accuracy", "test_acc", "test_accuracy"))
_SHOWN = 3


@dataclass(frozen=True)
class Scores:
    """Proxy values of architectures, R repeats of each, and the text under which each architecture is looked up."""

    name: str
    keys: Sequence[str]  # N, distinct
    columns: Mapping[str, Floats]  # each [R, N]; NaN where missing
    key: Callable[[Arch], str]  # raises InputError where it is given no architecture of the space
    notes: Sequence[str] = field(default=())


def text_key(arch: Arch) -> str:
    """Returns the text of an architecture: as it stands, or an object as JSON with sorted names."""
    return arch.strip() if isinstance(arch, str) else json.dumps(arch, sort_keys=True, separators=(",", ":"))


def accuracy_columns(table: Table, tasks: Sequence[str], *, alone: bool) -> list[str]:
    """Returns the columns of `table` that are accuracies.

    They are those of `tasks`; or else those with "acc" in their name; or else, where the table holds accuracies
    `alone`, all of its columns.
    """
    if tasks:
        return [name for name in tasks if name in table.columns]
    named = [name for name in table.columns if "acc" in name.lower()]
    return named or [name for name in table.columns if alone and name not in COUNTS]


def scores_of(table: Table, without: Sequence[str]) -> Scores:
    """Returns the scores of a table: all its columns but those `without`. Rows of one architecture are averaged."""
    keys, columns, notes = _distinct([text_key(arch) for arch in table.archs], table.columns, table.name)
    if table.texts:
        notes.append(f"columns of {table.name} without numbers are not used: {', '.join(table.texts)}")
    kept = {name: values[None] for name, values in columns.items() if name not in without}
    return Scores(table.name, keys, kept, text_key, notes)


def own_tasks(table: Table, tasks: Sequence[str]) -> list[Task]:
    """Returns the tasks of a table that holds proxies and accuracies; raises InputError where it has no accuracies."""
    columns = accuracy_columns(table, tasks, alone=False)
    if not columns:
        raise InputError(
            f"{table.name} has no column of accuracies ({', '.join(tasks) or 'with acc in its name'}); name it with "
            f"--tasks, or give accuracies with --accuracies. Its columns: {', '.join(table.columns) or 'none'}"
        )
    return joined([scores_of(table, columns)], [table], tasks)


def joined(scores: Sequence[Scores], accuracies: Sequence[Table], tasks: Sequence[str]) -> list[Task]:
    """Returns a task for each of the scores and each column of accuracies, rows matched by architecture.

    An architecture that stands several times in a table has the mean of its rows. The notes of a task say how many
    rows matched, and which did not.

    Raises InputError where a name of `tasks` is no column, or fewer than ten architectures match.
    """
    chosen = [(table, accuracy_columns(table, tasks, alone=True)) for table in accuracies]
    absent = [name for name in tasks if not any(name in columns for _, columns in chosen)]
    if absent or not any(columns for _, columns in chosen):
        there = ", ".join(name for table in accuracies for name in table.columns) or "none"
        raise InputError(f"there are no accuracies called {', '.join(absent) or 'anything'}; the columns are {there}")
    found = [
        (source, table, column, task)
        for source in scores
        for table, columns in chosen
        for column, task in _tasks_of(source, table, columns).items()
    ]
    names = [column if column not in _UNNAMED else table.name for _, table, column, _ in found]
    several = Counter(names)
    return [
        Task(_distinct_name(name, several, source, table), task.archs, task.accuracy, task.proxies, task.counts, notes)
        for name, (source, table, _, task) in zip(names, found, strict=True)
        for notes in [tuple(task.notes)]
    ]


def _distinct_name(name: str, several: Counter[str], source: Scores, table: Table) -> str:
    return name if several[name] == 1 else ": ".join(dict.fromkeys((source.name, table.name, name)))


def _tasks_of(source: Scores, table: Table, columns: Sequence[str]) -> dict[str, Task]:
    """The task of each column, by its name."""
    encoded, strangers = _encoded(source, table)
    kept = [place for place, key in enumerate(encoded) if key is not None]
    keys, accuracy, notes = _distinct(
        [str(encoded[place]) for place in kept],
        {name: table.columns[name][kept] for name in columns},
        table.name,
    )
    places = {key: place for place, key in enumerate(source.keys)}
    matched = [key for key in keys if key in places]
    strangers += [key for key in keys if key not in places]
    unused = len(source.keys) - len(matched)
    notes = [*source.notes, *(note for note in notes if note not in source.notes)]
    if strangers or unused:
        said = f"{len(matched)} architectures have scores and a row of accuracies"
        said += f"; {unused} scored ones have no row in {table.name}" if unused else ""
        said += f"; {len(strangers)} rows of {table.name} have no scores: {_some(strangers)}" if strangers else ""
        notes.append(said)
    if len(matched) < MIN_ARCHITECTURES and (strangers or unused):
        example = f"; scores are of {_some(source.keys)}" if source.keys else ""
        raise InputError(
            f"{source.name} and {table.name} have {len(matched)} architectures in common, and a study needs "
            f"{MIN_ARCHITECTURES} ({'; '.join(notes)}){example}"
        )
    rows = [places[key] for key in matched]
    order = {key: place for place, key in enumerate(keys)}
    chosen = [order[key] for key in matched]
    proxies = {name: values[:, rows] for name, values in source.columns.items()}
    counts = [name for name in proxies if name in COUNTS]
    return {name: Task(name, matched, accuracy[name][chosen], proxies, counts, notes) for name in columns}


def _encoded(source: Scores, table: Table) -> tuple[list[str | None], list[str]]:
    """The key of each row of `table`, None for one outside the space of the scores; and those rows."""
    keys: list[str | None] = []
    strangers: list[str] = []
    for arch in table.archs:
        try:
            keys.append(source.key(arch))
        except InputError as error:
            keys.append(None)
            strangers.append(f"{text_key(arch)[:60]} ({error})" if not strangers else text_key(arch)[:60])
    return keys, strangers


def _distinct(
    keys: Sequence[str], columns: Mapping[str, Floats], name: str
) -> tuple[list[str], dict[str, Floats], list[str]]:
    """Rows of one architecture as one, with the mean of each column's values that are not missing."""
    distinct = list(dict.fromkeys(keys))
    if len(distinct) == len(keys):
        return distinct, dict(columns), []
    place = {key: index for index, key in enumerate(distinct)}
    rows = np.array([place[key] for key in keys])
    averaged = {}
    for column, values in columns.items():
        present = ~np.isnan(values)
        total = np.bincount(rows[present], values[present], minlength=len(distinct))
        count = np.bincount(rows[present], minlength=len(distinct))
        averaged[column] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    repeated = [key for key, times in Counter(keys).items() if times > 1]
    note = f"{len(repeated)} architectures stand several times in {name} and have the mean of their rows"
    return distinct, averaged, [f"{note}: {_some(repeated)}"]


def _some(names: Sequence[str]) -> str:
    return "; ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else "")
