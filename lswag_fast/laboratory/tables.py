"""Reads tables of proxy scores and accuracies: CSV, JSON lines, NAS-Bench-Suite-Zero's JSON, Auto-Prox's `.pth`."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..correlation import Floats
from ..errors import InputError

FORMATS = ".csv, .jsonl, .json (NAS-Bench-Suite-Zero), each also with .gz, and .pth (Auto-Prox)"

_ARCH_NAMES = ("arch", "architecture")
_MISSING = frozenset(("", "nan", "none", "null", "na", "n/a"))
_EXPORT_COLUMNS = frozenset(("context", "recorded", "lswag"))

Arch = str | Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Architectures and columns of numbers, as a file has them, NaN where it has none; an arch may come twice."""

    name: str  # the file's name without its endings, and the data set where a file has several
    archs: tuple[Arch, ...]
    columns: dict[str, Floats]  # each [N]
    texts: tuple[str, ...] = ()  # columns that hold no number, and are of no use


def read(path: Path) -> list[Table]:
    """Returns the tables of a file, one a data set.

    Raises InputError where the file does not exist, its format is not known, it holds no architectures, or a line
    cannot be read (its number is said).
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    endings = [ending.lower() for ending in path.suffixes]
    packed = endings[-1:] == [".gz"]
    ending = (endings[:-1] if packed else endings)[-1:]
    name = path.name.removesuffix("".join(path.suffixes[-1 - packed :])) or path.name
    if ending == [".pth"] and not packed:
        return [_of_objects(name, enumerate(_list_of_rows(path), start=1), f"{path}, entry")]
    reader = {".csv": _csv, ".jsonl": _jsonl, ".json": _suite_zero}.get("".join(ending))
    if reader is None:
        raise InputError(
            f"{path} has no known format; there are {FORMATS}, and score stores. Pickles and archives of them are not "
            f"read, because that can run code"
        )
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if packed else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as {'gzipped ' * packed}text ({error})") from error
    tables = reader(path, name, text)
    if not any(table.archs for table in tables):
        raise InputError(f"{path} holds no architectures")
    return tables


def _csv(path: Path, name: str, text: str) -> list[Table]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        arch = _arch_column(path, header)
        rows: list[tuple[int, list[str]]] = []
        for cells in lines:
            if cells and len(cells) != len(header):
                raise InputError(f"{path}, line {lines.line_num}: {len(cells)} cells, and the header has {len(header)}")
            if cells:
                rows.append((lines.line_num, cells))
    except csv.Error as error:
        raise InputError(f"{path}, line {lines.line_num}: {error}") from error
    if set(header) >= _EXPORT_COLUMNS:
        raise InputError(f"{path} is an export of a score store; pass the store itself, which knows its settings")
    columns = {
        column: _numbers(f"{path}, line", column, [(number, _cell(row[place].strip())) for number, row in rows])
        for place, column in enumerate(header)
        if place != arch
    }
    return [_table(name, [row[arch].strip() for _, row in rows], columns)]


def _arch_column(path: Path, header: list[str]) -> int:
    doubled = {column for column in header if header.count(column) > 1}
    if doubled:
        raise InputError(f"{path} has several columns called {', '.join(sorted(doubled))}; rename all but one of them")
    for name in _ARCH_NAMES:
        if name in header:
            return header.index(name)
    there = ", ".join(header) or "none"
    raise InputError(f"{path} needs a column arch with the architectures; its columns are {there}")


def _jsonl(path: Path, name: str, text: str) -> list[Table]:
    def rows() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise InputError(f"{path}, line {number}: no JSON object ({error})") from error

    return [_of_objects(name, rows(), f"{path}, line")]


def _list_of_rows(path: Path) -> Iterable[Any]:
    from .plain_torch import load

    data = load(path)
    if not isinstance(data, list | tuple) or not data:
        raise InputError(f"{path} must hold a list of architectures, as Auto-Prox's do; it holds {type(data).__name__}")
    return data


def _of_objects(name: str, rows: Iterable[tuple[int, Any]], where: str) -> Table:
    """A table of objects with an arch and numbers; `where` and an object's place name it in errors."""
    archs: list[Arch] = []
    cells: dict[str, list[tuple[int, Any]]] = {}
    places = []
    for place, row in rows:
        key = next((n for n in _ARCH_NAMES if isinstance(row, Mapping) and n in row), None)
        if key is None or not isinstance(row[key], str | Mapping | list | tuple):
            raise InputError(f"{where} {place}: expected an object with an arch and numbers, got {str(row)[:80]}")
        arch = row[key]
        archs.append(arch if isinstance(arch, str | Mapping) else str(tuple(arch)))
        places.append(place)
        for column, value in _flat(row, key):
            cells.setdefault(column, []).append((place, value))
    columns = {column: _numbers(where, column, found, places) for column, found in cells.items()}
    return _table(name, archs, columns)


def _table(name: str, archs: Iterable[Arch], columns: Mapping[str, Floats | None]) -> Table:
    numbers = {column: values for column, values in columns.items() if values is not None}
    return Table(name, tuple(archs), numbers, tuple(column for column in columns if column not in numbers))


def _flat(row: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """The columns of an object; those of its `proxies` and `counts` stand beside the others."""
    for column, value in row.items():
        if column in ("proxies", "counts") and isinstance(value, Mapping):
            yield from value.items()
        elif column != key:
            yield column, value


def _suite_zero(path: Path, name: str, text: str) -> list[Table]:
    """{data set: {arch: {proxy: {"score": x, "time": t}, ..., "val_accuracy": a}}}, also inside {search space: ...}."""
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); a file with one object a line ends in .jsonl") from error
    sets = _data_sets(data, ())
    if not sets:
        raise InputError(
            f'{path} is not of NAS-Bench-Suite-Zero\'s form, {{data set: {{arch: {{proxy: {{"score": x}}, '
            f'"val_accuracy": a}}}}}}; a list of objects goes into a .jsonl, one a line'
        )
    name = name.removeprefix("zc_")
    tables = []
    for names, archs in sets:
        rows = [(place, {"arch": arch, **_scores(row)}) for place, (arch, row) in enumerate(archs.items(), start=1)]
        label = "-".join((name, *names))
        tables.append(_of_objects(label, rows, f"{path}, {' '.join(names)}, architecture"))
    return tables


def _data_sets(data: Any, names: tuple[str, ...]) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The levels of `data` that map architectures to scores, with the names on the way there."""
    if not isinstance(data, Mapping) or len(names) > 2 or not all(isinstance(v, Mapping) for v in data.values()):
        return []
    first: Mapping[str, Any] = next(iter(data.values()), {})
    if names and any(_is_score(value) for value in first.values()):
        return [(names, data)]
    return [found for key, inner in data.items() for found in _data_sets(inner, (*names, key))]


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Mapping) and "score" in value)


def _scores(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        return {}
    # "id" numbers the architectures of a file, and ranks nothing.
    named = {name: value for name, value in row.items() if name != "id" or isinstance(value, Mapping)}
    return {name: value.get("score") if isinstance(value, Mapping) else value for name, value in named.items()}


def _numbers(where: str, column: str, cells: list[tuple[int, Any]], places: list[int] | None = None) -> Floats | None:
    """The numbers of a column, at all `places` where given; None where it holds none at all, but texts."""
    texts = [(place, value) for place, value in cells if _as_number(value) is None]
    if texts and len(texts) == sum(value is not None for _, value in cells):
        return None
    if texts:
        raise InputError(f"{where} {texts[0][0]}: {column} must be a number, or empty, got {texts[0][1]!r}")
    found = {place: _as_number(value) for place, value in cells}
    return np.array([found.get(place, math.nan) for place in (places or [place for place, _ in cells])], dtype=float)


def _as_number(value: Any) -> float | None:
    """NaN for a missing value, None for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float(value.item()) if getattr(value, "ndim", None) == 0 else None  # a tensor of one number


def _cell(text: str) -> float | str | None:
    if text.lower() in _MISSING:
        return None
    try:
        return float(text)
    except ValueError:
        return text
