"""Studies of proxies as tables: Markdown for people, JSON for machines."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

import measure

from lswag_fast.laboratory import plots
from lswag_fast.laboratory.study import Row, TaskStudy

HOW_TO_READ = (
    "Each cell has Spearman's rho, the mean over the repeats; in brackets its 95 % bootstrap interval over "
    "architectures; after ± the standard deviation over repeats; and behind the slash the partial rho given the counts "
    "(the rows in italics), which a proxy that they determine has not."
)


def table(studies: Sequence[TaskStudy], extra: Mapping[str, Mapping[str, Sequence[float]]] | None = None) -> list[str]:
    """Returns the lines of a table: a row a proxy, best mean rho first, a column a task.

    `extra` has further columns by their heading, of figures by proxy.
    """
    extra = extra or {}
    rows = {study.task.name: {row.proxy: row for row in study.rows} for study in studies}
    names = [row.proxy for row in studies[0].rows]
    names.sort(key=lambda name: -sum(_rho(found[name]) for found in rows.values()))
    lines = [f"|  | {' | '.join([*rows, *extra])} |", f"| --- |{' ---: |' * (len(rows) + len(extra))}"]
    for name in names:
        cells = [_cell(found[name]) for found in rows.values()]
        cells += [" / ".join(f"{v:.2f}" for v in column.get(name, ())) for column in extra.values()]
        shown = f"*{name}*" if name in studies[0].task.counts else name
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return lines


def write(name: str, settings: Mapping[str, object], studies: Mapping[str, Sequence[TaskStudy]], text: str) -> None:
    """Writes results/<name>.json and .md and a heat map for each arm, and prints the text."""
    measure.RESULTS.mkdir(exist_ok=True)
    data = {
        "machine": measure.machine("cpu"),
        "settings": settings,
        "rows": {arm: [row.flat() for study in found for row in study.rows] for arm, found in studies.items()},
    }
    (measure.RESULTS / f"{name}.json").write_text(json.dumps(measure.rounded(data), indent=1) + "\n")
    (measure.RESULTS / f"{name}.md").write_text(text)
    for arm, found in studies.items():
        slug = re.sub(r"[^a-z0-9]+", "-", arm.lower()).strip("-")
        (measure.RESULTS / f"{name}-{slug}.png").write_bytes(plots.heat_map(found))
    print(text)


def number(value: float | None) -> float:
    """Returns `value`, NaN for None."""
    return math.nan if value is None else value


def _rho(row: Row) -> float:
    value = row.estimates["spearman"].value if row.estimates else math.nan
    return value if math.isfinite(value) else -1.0


def _cell(row: Row) -> str:
    if not row.estimates:
        return row.status
    rho, partial = row.estimates["spearman"], row.estimates.get("partial")
    spread = f" ± {rho.spread:.2f}" if math.isfinite(rho.spread) else ""
    given = f" / {partial.value:.2f}" if partial and math.isfinite(partial.value) else ""
    return f"{rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]{spread}{given}"
