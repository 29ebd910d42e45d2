"""`lswag-fast layers`: layer statistics of the scores of a store, as a figure and numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import spaces
from ..correlation import Floats
from ..errors import InputError
from ..laboratory.joining import Scores, joined
from ..laboratory.plots import require
from ..laboratory.stores import COUNT_NAMES, key_in
from ..laboratory.study import MIN_ARCHITECTURES, Row, Task, study
from ..laboratory.tables import Arch, read
from ..layer_figure import draw
from ..layer_statistics import PERCENTILES, LayerStatistics, layer_statistics, nullable
from ..store import Run, Store
from .files import write_files
from .tables import chosen_run


@dataclass(frozen=True)
class Request:
    """What one `layers` command asks for."""

    store: Path
    context: str
    accuracies: list[Path]
    tasks: list[str]
    output: Path
    as_json: bool


@dataclass(frozen=True)
class Accuracies:
    """One task: the places of networks among the statistics', their accuracies and their counts."""

    networks: NDArray[np.intp]
    values: Floats
    counts: Mapping[str, Floats]
    notes: Sequence[str] = field(default=())  # what was matched, and what was not


def run(request: Request) -> None:
    """Writes figures and numbers of what `request` names, of all networks and by depth, and prints what they say."""
    require()
    with Store(request.store, read_only=True) as store:
        settings = chosen_run(store, request.context)
        statistics, archs, counts = _read(store, settings)
    tasks = _tasks(request, settings, archs, counts) if request.accuracies else {}
    described, figure = _study(statistics, tasks)
    files = {"layers.png": figure}
    by_depth = {}
    for number in _depths(statistics):
        by_depth[str(number)], files[f"layers-{number}.png"] = _study(
            statistics.having(number), {name: _at_depth(task, statistics, number) for name, task in tasks.items()}
        )
    data = {"settings": settings.metadata, **described, "by_number_of_layers": by_depth}
    files = {"layers.json": json.dumps(data).encode(), **files}
    write_files(request.output, files)
    if request.as_json:
        print(json.dumps(data))
        return
    print(_said(described, {name: task.notes for name, task in tasks.items()}))
    print(f"{', '.join(files)} written to {request.output}")


def _read(store: Store, settings: Run) -> tuple[LayerStatistics, list[Arch], dict[str, Floats]]:
    ids = {run.id for run in store.runs() if run.context == settings.context}
    archs: list[Arch] = []
    counts: dict[str, list[float]] = {name: [] for name in COUNT_NAMES}

    def layers() -> Any:
        for record in store.records():
            if record.run in ids and record.status == "ok":
                archs.append(record.arch)
                for name, values in counts.items():
                    values.append(float(getattr(record.counts, name)))
                yield record.layers

    window = tuple(settings.metadata["options"]["window"])
    if window != (0, 100):
        raise InputError(
            f"the scores with settings {settings.context[:8]} are of the window {window}; "
            f"layer statistics need scores of the whole network: score again without --window, or choose --context"
        )
    statistics = layer_statistics(layers(), numerator=settings.metadata["options"]["numerator"])
    return statistics, archs, {name: np.array(values) for name, values in counts.items()}


def _tasks(
    request: Request, settings: Run, archs: Sequence[Arch], counts: Mapping[str, Floats]
) -> dict[str, Accuracies]:
    key = key_in(spaces.get(**settings.metadata["space"]))
    places = {"place": np.arange(len(archs), dtype=np.float64)[None]}
    scores = Scores(request.store.stem, [key(arch) for arch in archs], places, key)
    tables = [table for path in request.accuracies for table in read(path)]
    found = {}
    for task in joined([scores], tables, request.tasks):
        known = np.isfinite(task.accuracy)
        networks = task.proxies["place"][0][known].astype(np.intp)
        own = {name: values[networks] for name, values in counts.items()}
        found[task.name] = Accuracies(networks, task.accuracy[known], own, task.notes)
    return found


def _depths(statistics: LayerStatistics) -> list[int]:
    """The numbers of layers that several networks, but not all, have."""
    depths = statistics.depths()
    return [number for number, networks in depths.items() if len(depths) > 1 and networks >= MIN_ARCHITECTURES]


def _at_depth(task: Accuracies, statistics: LayerStatistics, number: int) -> Accuracies:
    here = np.flatnonzero(statistics.layers == number)
    kept = np.isin(task.networks, here)
    own = {name: values[kept] for name, values in task.counts.items()}
    return Accuracies(np.searchsorted(here, task.networks[kept]), task.values[kept], own)


def _study(statistics: LayerStatistics, tasks: dict[str, Accuracies]) -> tuple[dict[str, Any], bytes]:
    rho = {name: statistics.window_rho(task.values, task.networks) for name, task in tasks.items() if len(task.values)}
    of_tasks = {name: _of_task(of, statistics, tasks[name]) for name, of in rho.items()}
    return {**statistics.to_dict(), "accuracies": of_tasks}, draw(statistics, rho)


def _of_task(rho: Floats, statistics: LayerStatistics, task: Accuracies) -> dict[str, Any]:
    window = statistics.suggestion().window
    suggested = [PERCENTILES.index(end) for end in window]
    best = np.unravel_index(np.nanargmax(rho), rho.shape) if np.isfinite(rho).any() else None
    judged = _judged(statistics, task, {"suggested": window, "whole": (PERCENTILES[0], PERCENTILES[-1])})
    return {
        "networks": len(task.values),
        "rho_by_percentile": nullable(np.diagonal(rho)),
        "rho_by_window": nullable(rho),
        "rho_of_the_whole": nullable(rho[:1, -1])[0],
        "rho_of_the_suggested_window": nullable(rho[suggested[0], suggested[1:]])[0],
        "best_window_in_hindsight": best and [PERCENTILES[end] for end in best],
        "its_rho": best and float(rho[best]),
        "counts": list(task.counts),
        "windows": {name: row.flat() for name, row in judged.items()},
    }


def _judged(statistics: LayerStatistics, task: Accuracies, windows: Mapping[str, tuple[int, int]]) -> dict[str, Row]:
    """Rho of the Lambda of windows with intervals, and given the counts; none where the networks are too few."""
    if len(task.values) < MIN_ARCHITECTURES or np.ptp(task.values) == 0:
        return {}
    columns = {name: statistics.trainability(window)[task.networks] for name, window in windows.items()}
    proxies = {name: values[None] for name, values in {**columns, **task.counts}.items()}
    archs = [str(place) for place in task.networks]
    (done,) = study([Task("windows", archs, task.values, proxies, list(task.counts))])
    return {row.proxy: row for row in done.rows if row.proxy in windows}


def _said(described: dict[str, Any], notes: Mapping[str, Sequence[str]]) -> str:
    first, last = described["suggested_window"]
    lines = [f"{described['networks']} networks; suggested window {first} to {last}: {described['reason']}"]
    for task, of in described["accuracies"].items():
        best = of["best_window_in_hindsight"]
        if best is None:
            lines.append(f"{task}: no window has a rho, for Lambda or the accuracy is the same everywhere")
            continue
        kept = of["windows"]
        suggested, whole = (_rho(kept.get(name), "spearman") for name in ("suggested", "whole"))
        beyond, whole_beyond = (_rho(kept.get(name), "partial") for name in ("suggested", "whole"))
        windows = len(PERCENTILES) * (len(PERCENTILES) + 1) // 2
        lines += [
            f"{task}, {of['networks']} networks: rho of Lambda {suggested} in that window, {whole} over all layers",
            f"  given the counts ({', '.join(of['counts'])}): {beyond} and {whole_beyond}",
            *(f"  {note}" for note in notes[task]),
            f"  the best of {windows} windows, in hindsight, is {best[0]} to {best[1]} with {of['its_rho']:z.2f}",
        ]
    return "\n".join(lines)


def _rho(row: Mapping[str, Any] | None, statistic: str) -> str:
    if row is None or row[statistic] is None:
        return "undefined"
    return f"{row[statistic]:z.2f} [{row[f'{statistic}_low']:z.2f}, {row[f'{statistic}_high']:z.2f}]"
