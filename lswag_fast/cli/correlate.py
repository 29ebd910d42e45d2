"""`lswag-fast correlate`: proxies against accuracies, as tables, figures and a report."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table as Printed

from ..errors import InputError
from ..laboratory import plots, report
from ..laboratory.joining import accuracy_columns, joined, own_tasks, scores_of, text_key
from ..laboratory.study import MIN_ARCHITECTURES, Row, TaskStudy, study
from ..laboratory.tables import Arch, Table, read
from .files import write_files
from .tables import console

_SHOWN = 15
_OF_LSWAG = ("lswag", "lambda", "psi", "parameters", "multiply_adds", "sum_log_numel", "positions")


@dataclass(frozen=True)
class Scoring:
    """How `--repeats` scores the architectures of the accuracies; None in `space_options` is the space's default."""

    space: str
    space_options: dict[str, int | None]
    seed: int
    images: str
    samples: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What one `correlate` command asks for."""

    scores: list[Path]
    accuracies: list[Path]
    tasks: list[str]
    proxies: list[str]
    top: int | None
    draws: int | None
    context: str
    repeats: int | None
    scoring: Scoring
    output: Path
    as_json: bool


def run(request: Request) -> int:
    """Studies what `request` names and writes the report; returns the exit code."""
    plots.require()
    accuracies = [table for path in request.accuracies for table in read(path)]
    if request.repeats:
        try:
            context, failures = _score(request, accuracies, request.repeats)
        except KeyboardInterrupt:
            print(f"interrupted; what is scored is in {request.scores[0]}, run again to go on", file=sys.stderr)
            return 130
        # What --proxies had scored is studied beside L-SWAG and its factors.
        request = replace(request, context=context, proxies=[])
    else:
        failures = 0
    tasks = _tasks(request, accuracies)
    studies = study(tasks, top=request.top, draws=request.draws, proxies=request.proxies)
    files = write(studies, request.output)
    for done in studies:
        if request.as_json:
            for row in done.rows:
                print(json.dumps(row.flat()))
        else:
            _show(done)
    print(f"{', '.join(files)} written to {request.output}", file=sys.stderr if request.as_json else sys.stdout)
    return 1 if failures else 0


def write(studies: Sequence[TaskStudy], folder: Path) -> list[str]:
    """Writes the report, its figures and its numbers into `folder`, each file whole; returns their names."""
    scatters = [plots.scatter(done) if any(row.estimates for row in done.rows) else b"" for done in studies]
    spread = "; ± is the standard deviation over repeats" * any(done.repeats > 1 for done in studies)
    figures = {
        f"Spearman's rho of each proxy on each task{spread}": plots.heat_map(studies),
        "The proxies with the highest |rho| of each task": plots.bars(studies),
    }
    page = report.page(studies, figures, scatters)
    heat_map, bars = figures.values()
    files = {
        "report.html": page.encode(),
        "correlations.json": report.as_json(studies).encode(),
        "correlations.csv": _csv([row for done in studies for row in done.rows]).encode(),
        "heat-map.png": heat_map,
        "bars.png": bars,
    }
    for place, (done, png) in enumerate(zip(studies, scatters, strict=True), start=1):
        if png:
            files[f"scatter-{place}-{_file_name(done.task.name)}.png"] = png
    write_files(folder, files)
    return list(files)


def _tasks(request: Request, accuracies: list[Table]) -> list[Any]:
    from ..laboratory import stores

    kept = [path for path in request.scores if stores.is_store(path)]
    tables = [table for path in request.scores if path not in kept for table in read(path)]
    seeds = range(request.scoring.seed, request.scoring.seed + request.repeats) if request.repeats else ()
    if kept and not accuracies:
        raise InputError(f"{kept[0]} is a score store, which holds no accuracies; give them with --accuracies")
    if accuracies:
        sources = [stores.read(kept, request.context, seeds)] if kept else []
        sources += [scores_of(table, _accuracies_of(table)) for table in tables]
        return list(joined(sources, accuracies, request.tasks))
    return [task for table in tables for task in own_tasks(table, request.tasks)]


def _accuracies_of(table: Table) -> list[str]:
    """A table's own accuracies are no proxies, where others are given."""
    return [name for name in table.columns if "acc" in name.lower()]


def _score(request: Request, accuracies: Sequence[Table], repeats: int) -> tuple[str, int]:
    """Scores the architectures of the accuracies with each seed into the store.

    Returns the id of the settings of the first seed, and how many scores failed.
    """
    from .. import images, spaces
    from ..engine.scorer import Scorer
    from .progress import Progress

    if len(request.scores) != 1 or not accuracies:
        raise InputError("--repeats scores the architectures of --accuracies into one store; give both")
    given = request.scoring
    space: Any = spaces.get(given.space, **{n: v for n, v in given.space_options.items() if v is not None})
    archs = _archs(accuracies, space)
    _check_before_scoring(request, accuracies, len(archs))
    options = dict(given.options)
    if request.proxies:
        options["proxies"] = ("lswag", *(name for name in request.proxies if name not in _OF_LSWAG))
    contexts, failures = [], 0
    with Progress(len(archs) * repeats) as progress:
        for seed in range(given.seed, given.seed + repeats):
            batch = images.load(
                given.images,
                given.samples,
                image_size=space.options["image_size"],
                seed=seed,
                num_classes=space.options["num_classes"],
            )
            notes = {"images": batch.description}
            store = request.scores[0]
            with Scorer(space, batch.images, batch.labels, store=store, notes=notes, seed=seed, **options) as scorer:
                for record in scorer.score(archs):
                    progress.advance(reused=record.reused)
                failures += scorer.failures
                contexts.append(scorer.context.id)
    return contexts[0], failures


def _check_before_scoring(request: Request, accuracies: Sequence[Table], archs: int) -> None:
    """Raises InputError for what would stop the study after hours of scoring."""
    if archs < MIN_ARCHITECTURES:
        raise InputError(
            f"the accuracies are of {archs} architectures of the space, and {MIN_ARCHITECTURES} are needed"
        )
    if request.top and request.top >= archs:
        raise InputError(f"the top must be 1 to {archs - 1} of {archs} architectures, got {request.top}")
    found = [name for table in accuracies for name in accuracy_columns(table, request.tasks, alone=True)]
    absent = [name for name in request.tasks if name not in found]
    if absent or not found:
        raise InputError(f"the accuracies have no column {', '.join(absent) or 'of numbers'}; name others with --tasks")


def _archs(accuracies: Sequence[Table], space: Any) -> list[dict[str, Any]]:
    """The distinct architectures of the tables that are in the space; raises InputError where there are none."""
    found: dict[str, dict[str, Any]] = {}
    first = ""
    for arch in (arch for table in accuracies for arch in table.archs):
        try:
            decoded = _decoded(arch, space)
        except InputError as error:
            first = first or f"{text_key(arch)[:80]}: {error}"
            continue
        found[space.encode(decoded)] = decoded
    if not found:
        raise InputError(f"no architecture of the accuracies is in {space.name} ({first}); choose another --space")
    return list(found.values())


def _decoded(arch: Arch, space: Any) -> dict[str, Any]:
    return dict(space.decode(arch) if isinstance(arch, str) else space.canonical(arch))


def _csv(rows: Sequence[Row]) -> str:
    file = io.StringIO(newline="")
    flat = [row.flat() for row in rows]
    sheet = csv.DictWriter(file, list(flat[0]))
    sheet.writeheader()
    for row in flat:
        sheet.writerow({n: json.dumps(v) if isinstance(v, list) else v for n, v in row.items()})
    return file.getvalue()


def _file_name(task: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in task)[:80]


def _show(done: TaskStudy) -> None:
    """Prints the best rows of a task, its notes, and its warnings."""
    print(f"\n{done.task.name}: {done.architectures} architectures, precision at the top {done.top}")
    for note in done.task.notes:
        print(f"  {note}")
    table = Printed(box=None, pad_edge=False)
    for heading in (
        "proxy",
        "rho",
        "95 %",
        "tau-b",
        "precision",
        "regret",
        "rho given counts",
        "95 %",
        "nearest count",
    ):
        table.add_column(heading, justify="left" if heading == "proxy" else "right", no_wrap=True)
    for row in done.rows[:_SHOWN]:
        table.add_row(*_cells(row))
    console().print(table)
    if len(done.rows) > _SHOWN:
        print(f"  and {len(done.rows) - _SHOWN} others in the report")
    for row in done.rows:
        for warning in row.warnings:
            print(f"Warning: {row.proxy} {warning}")


def _cells(row: Row) -> list[str]:
    if not row.estimates:
        return [row.proxy, row.status]
    rho, partial = row.estimates["spearman"], row.estimates.get("partial")
    forms = {"kendall": "z.3f", "precision": ".2f", "regret": ".3g"}
    others = [format(row.estimates[name].value, form) for name, form in forms.items()]
    beyond = [f"{partial.value:z.3f}", f"[{partial.low:z.2f}, {partial.high:z.2f}]"] if partial else ["", ""]
    if partial and math.isnan(partial.value):
        beyond = ["none left", ""]
    spread = f" ± {rho.spread:.3f}" if len(rho.by_repeat) > 1 else ""
    nearest = f"{row.closest_count} {row.rho_with_count:z.2f}" if row.closest_count else "count" * row.is_count
    return [row.proxy, f"{rho.value:z.3f}{spread}", f"[{rho.low:z.2f}, {rho.high:z.2f}]", *others, *beyond, nearest]
