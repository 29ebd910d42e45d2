"""One scored candidate as it is kept: the record, and its form as a row of a score store."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Literal

from .proxies.result import Counts, LayerRow, LswagResult, PatternSaturation

Status = Literal["ok", "error"]


@dataclass(frozen=True)
class Record:
    """One candidate of a score store: what was scored, and its score or the reason why there is none.

    Every field between `error` and `seconds` is None or empty where `status` is "error"; their meaning is that of
    :class:`lswag_fast.LswagResult`. Floats of `layers` hold nine significant digits.
    """

    key: str  # sha256, in hexadecimal, of everything the score depends on
    arch: dict[str, Any]
    status: Status
    error: str | None = None
    lswag: float | None = None
    trainability: float | None = None
    expressivity: int | None = None
    pattern_saturation: PatternSaturation | None = None
    counts: Counts | None = None
    layers: tuple[LayerRow, ...] = ()
    patterns_by_activation: tuple[int, ...] | None = None
    uncovered: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    proxies: dict[str, float | None] = field(default_factory=dict)  # None: it has no value, and a warning says why
    proxy_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    recorded: float = 0.0  # seconds since 1970
    run: int = 0  # the run of the store that recorded it
    reused: bool = False  # True where it was in the store already

    @staticmethod
    def of(key: str, arch: Mapping[str, Any], result: LswagResult) -> Record:
        """Returns the record of a result; a score that is NaN or infinite becomes an error."""
        if not (math.isfinite(result.lswag) and math.isfinite(result.trainability)):
            error = f"the score is not finite: lswag {result.lswag}, trainability {result.trainability}"
            return Record(key, dict(arch), "error", error, warnings=result.warnings, seconds=result.seconds)
        taken = {f.name: getattr(result, f.name) for f in fields(result) if f.name not in ("options", "proxy_details")}
        taken["proxies"] = {n: None if math.isnan(v) else v for n, v in result.proxies.items()}
        return Record(key, dict(arch), "ok", **taken)

    def to_dict(self, *, layers: bool = True) -> dict[str, Any]:
        """Returns the record as plain values that JSON can hold; an infinite proxy is "Infinity" or "-Infinity"."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        plain["proxies"] = _proxies(self)
        if not layers:
            del plain["layers"]
        return plain


COLUMNS = (
    "key, run, status, error, arch, lswag, trainability, expressivity, saturation, saturation_bound, parameters, "
    "multiply_adds, sum_log_numel, positions, seconds, recorded, warnings, uncovered, patterns_by_activation, proxies, "
    "proxy_seconds, layers"
)
"""The columns of a row, in order; `layers` is last, so that a scan without it never reads its pages."""

_RECORDED = COLUMNS.split(", ").index("recorded")
_NAMES = tuple(f.name for f in fields(LayerRow))
_VALUES = attrgetter(*_NAMES)


@dataclass(frozen=True)
class Row:
    """A record as a score store keeps it."""

    values: tuple[Any, ...]  # in the order of COLUMNS
    record: Record  # as it is read from there

    @staticmethod
    def of(record: Record, run: int) -> Row:
        """Returns the row of a record that a run of the store has made and is yet to commit."""
        values = encode(record, run)
        return Row(values, decode(values, reused=False))

    def committed(self, at: float) -> Row:
        """Returns the row with the seconds since 1970 of its commit."""
        values = (*self.values[:_RECORDED], at, *self.values[_RECORDED + 1 :])
        return Row(values, replace(self.record, recorded=at))


def encode(record: Record, run: int) -> tuple[Any, ...]:
    """Returns the row, in the order of `COLUMNS`, that `record` is kept as."""
    saturation = record.pattern_saturation
    by_activation = record.patterns_by_activation
    counts = astuple(record.counts) if record.counts else (None,) * len(fields(Counts))
    return (
        *(record.key, run, record.status, record.error, _json(record.arch)),
        *(record.lswag, record.trainability, record.expressivity),
        *((saturation.ratio, saturation.bound) if saturation else (None, None)),
        *counts,
        *(record.seconds, record.recorded, _json(record.warnings), _json(record.uncovered)),
        None if by_activation is None else _json(by_activation),
        *(_json(_proxies(record)), _json(record.proxy_seconds)),
        _json(_by_column(record.layers)),
    )


def decode(row: Sequence[Any], *, reused: bool) -> Record:
    """Returns the record that a row in the order of `COLUMNS` (with or without `layers`) holds."""
    ok = row[2] == "ok"
    layers = json.loads(row[21]) if len(row) > 21 else {}
    return Record(
        key=row[0],
        run=row[1],
        status=row[2],
        error=row[3],
        arch=json.loads(row[4]),
        lswag=row[5],
        trainability=row[6],
        expressivity=row[7],
        pattern_saturation=PatternSaturation(row[8], row[9]) if ok else None,
        counts=Counts(*row[10:14]) if ok else None,
        seconds=row[14],
        recorded=row[15],
        warnings=tuple(json.loads(row[16])),
        uncovered=tuple(json.loads(row[17])),
        patterns_by_activation=None if row[18] is None else tuple(json.loads(row[18])),
        proxies={name: None if v is None else float(v) for name, v in json.loads(row[19]).items()},
        proxy_seconds=json.loads(row[20]),
        layers=tuple(LayerRow(**dict(zip(layers, row, strict=True))) for row in zip(*layers.values(), strict=True)),
        reused=reused,
    )


def jsonable(value: Any) -> Any:
    """Returns `value`, or the text "Infinity" or "-Infinity" for an infinite float, which JSON cannot hold."""
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _proxies(record: Record) -> dict[str, Any]:
    return {name: jsonable(value) for name, value in record.proxies.items()}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _by_column(layers: Sequence[LayerRow]) -> dict[str, list[Any]]:
    """Layers column by column: the names of the fields are written once instead of once a layer."""
    if not layers:
        return {}
    columns = zip(*map(_VALUES, layers), strict=True)
    return {name: list(map(_shortened, column)) for name, column in zip(_NAMES, columns, strict=True)}


def _shortened(value: Any) -> Any:
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Counts | PatternSaturation | LayerRow):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
