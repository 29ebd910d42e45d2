"""`lswag-fast export`: every record of a store as csv, parquet or JSON lines, in flat memory."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..records import jsonable
from ..store import Run, Store

_ROW_GROUP = 10_000
_PARQUET_TYPES = {
    **dict.fromkeys(("lswag", "trainability", "seconds", "recorded", "sum_log_numel", "saturation"), "float64"),
    **dict.fromkeys(("expressivity", "parameters", "multiply_adds", "positions", "run", "samples", "groups"), "int64"),
    **dict.fromkeys(("pattern_samples", "seed", "definition_version", "threads"), "int64"),
    "patterns_inside_window": "bool",
}


def write(store: Path, form: str, output: Path) -> int:
    """Writes the records of `store` to `output`, as a whole or not at all; returns their number."""
    writer = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}[form]
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    with Store(store, read_only=True) as opened:
        if next(opened.records(layers=False), None) is None:
            raise InputError(f"{store} holds no records to export")
        try:
            written = writer(opened, partial)
            os.replace(partial, output)
        except OSError as error:
            raise InputError(f"cannot write {output} ({error}); choose another place for it") from error
        finally:
            partial.unlink(missing_ok=True)
    return written


def _rows(store: Store, *, layers: bool) -> Iterator[dict[str, Any]]:
    """Flat rows: the record, then the settings of its run."""
    runs = {run.id: _flat_settings(run) for run in store.runs()}
    used = {proxy["name"] for run in store.runs() for proxy in run.metadata["options"].get("proxies", ())}
    proxies = sorted(used - {"lswag"})
    for record in store.records(layers=layers):
        row = record.to_dict(layers=layers)
        counts, saturation = row.pop("counts"), row.pop("pattern_saturation")
        names = ("parameters", "multiply_adds", "sum_log_numel", "positions")
        row |= counts or dict.fromkeys(names)
        row |= {
            "saturation": saturation and saturation["ratio"],
            "saturation_bound": saturation and saturation["bound"],
        }
        del row["reused"]
        del row["proxies"], row["proxy_seconds"]
        for name in proxies:
            seconds = record.proxy_seconds.get(name)
            row |= {f"proxy_{name}": record.proxies.get(name), f"proxy_{name}_seconds": seconds}
        yield row | runs[record.run]


def _flat_settings(run: Run) -> dict[str, Any]:
    given = run.metadata
    flat = {"context": run.context, "space": json.dumps(given["space"]), "samples": given["samples"]}
    # The columns of each proxy tell which were asked for.
    flat |= {name: _scalar(value) for name, value in given["options"].items() if name != "proxies"}
    flat |= {name: given[name] for name in ("weights", "loss", "definition_version", "device_name", "threads")}
    flat |= {f"{name}_version": version for name, version in given["versions"].items()}
    return flat | {"image_bytes": given["images"], "notes": json.dumps(given["notes"])}


def _csv(store: Store, path: Path) -> int:
    written = 0
    with path.open("w", newline="") as file:
        for written, row in enumerate(_rows(store, layers=False), start=1):
            if written == 1:
                sheet = csv.DictWriter(file, list(row))
                sheet.writeheader()
            sheet.writerow({name: _scalar(value) for name, value in row.items()})
    return written


def _jsonl(store: Store, path: Path) -> int:
    written = 0
    with path.open("w") as file:
        for row in _rows(store, layers=True):
            file.write(json.dumps({name: jsonable(value) for name, value in row.items()}) + "\n")
            written += 1
    return written


def _parquet(store: Store, path: Path) -> int:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            "format parquet needs pyarrow, which is not installed: pip install 'lswag-fast[parquet]', or choose csv"
        ) from error
    rows, written = _rows(store, layers=False), 0
    writer = None
    try:
        while group := [{n: _scalar(v) for n, v in row.items()} for row in islice(rows, _ROW_GROUP)]:
            kinds = {name: _parquet_type(name) for name in group[0]}
            schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in kinds.items()])
            writer = writer or parquet.ParquetWriter(path, schema)
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))
            written += len(group)
    finally:
        if writer:
            writer.close()
    return written


def _parquet_type(name: str) -> str:
    return "float64" if name.startswith("proxy_") else _PARQUET_TYPES.get(name, "string")


def _scalar(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list | tuple) else value
