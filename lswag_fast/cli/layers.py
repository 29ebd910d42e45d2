"""`lswag-fast layers`: layer statistics of the scores of a store, as a figure and numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import spaces
from ..correlation import Floats
from ..errors import InputError
from ..laboratory.joining import Scores, joined
from ..laboratory.plots import require
from ..laboratory.stores import key_in
from ..laboratory.study import MIN_ARCHITECTURES
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
    """One task: the places of networks among the statistics', and their accuracies."""

    networks: NDArray[np.intp]
    values: Floats


def run(request: Request) -> None:
    """Writes figures and numbers of what `request` names, of all networks and by depth, and prints what they say."""
    require()
    with Store(request.store, read_only=True) as store:
        settings = chosen_run(store, request.context)
        statistics, archs = _read(store, settings)
    tasks = _tasks(request, settings, archs) if request.accuracies else {}
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
    print(_said(described))
    print(f"{', '.join(files)} written to {request.output}")


def _read(store: Store, settings: Run) -> tuple[LayerStatistics, list[Arch]]:
    ids = {run.id for run in store.runs() if run.context == settings.context}
    archs: list[Arch] = []

    def layers() -> Any:
        for record in store.records():
            if record.run in ids and record.status == "ok":
                archs.append(record.arch)
                yield record.layers

    window = tuple(settings.metadata["options"]["window"])
    if window != (0, 100):
        raise InputError(
            f"the scores with settings {settings.context[:8]} are of the window {window}; "
            f"layer statistics need scores of the whole network: score again without --window, or choose --context"
        )
    return layer_statistics(layers(), numerator=settings.metadata["options"]["numerator"]), archs


def _tasks(request: Request, settings: Run, archs: Sequence[Arch]) -> dict[str, Accuracies]:
    key = key_in(spaces.get(**settings.metadata["space"]))
    places = {"place": np.arange(len(archs), dtype=np.float64)[None]}
    scores = Scores(request.store.stem, [key(arch) for arch in archs], places, key)
    tables = [table for path in request.accuracies for table in read(path)]
    found = {}
    for task in joined([scores], tables, request.tasks):
        known = np.isfinite(task.accuracy)
        found[task.name] = Accuracies(task.proxies["place"][0][known].astype(np.intp), task.accuracy[known])
    return found


def _depths(statistics: LayerStatistics) -> list[int]:
    """The numbers of layers that several networks, but not all, have."""
    depths = statistics.depths()
    return [number for number, networks in depths.items() if len(depths) > 1 and networks >= MIN_ARCHITECTURES]


def _at_depth(task: Accuracies, statistics: LayerStatistics, number: int) -> Accuracies:
    here = np.flatnonzero(statistics.layers == number)
    kept = np.isin(task.networks, here)
    return Accuracies(np.searchsorted(here, task.networks[kept]), task.values[kept])


def _study(statistics: LayerStatistics, tasks: dict[str, Accuracies]) -> tuple[dict[str, Any], bytes]:
    rho = {name: statistics.window_rho(task.values, task.networks) for name, task in tasks.items() if len(task.values)}
    described = {**statistics.to_dict(), "accuracies": {name: _of_task(of, statistics) for name, of in rho.items()}}
    return described, draw(statistics, rho)


def _of_task(rho: Floats, statistics: LayerStatistics) -> dict[str, Any]:
    suggested = [PERCENTILES.index(end) for end in statistics.suggestion().window]
    best = np.unravel_index(np.nanargmax(rho), rho.shape) if np.isfinite(rho).any() else None
    return {
        "rho_by_percentile": nullable(np.diagonal(rho)),
        "rho_by_window": nullable(rho),
        "rho_of_the_whole": nullable(rho[:1, -1])[0],
        "rho_of_the_suggested_window": nullable(rho[suggested[0], suggested[1:]])[0],
        "best_window_in_hindsight": best and [PERCENTILES[end] for end in best],
        "its_rho": best and float(rho[best]),
    }


def _said(described: dict[str, Any]) -> str:
    first, last = described["suggested_window"]
    lines = [f"{described['networks']} networks; suggested window {first} to {last}: {described['reason']}"]
    for task, of in described["accuracies"].items():
        best = of["best_window_in_hindsight"]
        if best is None:
            lines.append(f"{task}: no window has a rho, for Lambda or the accuracy is the same everywhere")
            continue
        suggested, whole = (_rho(of[name]) for name in ("rho_of_the_suggested_window", "rho_of_the_whole"))
        windows = len(PERCENTILES) * (len(PERCENTILES) + 1) // 2
        lines.append(
            f"{task}: rho of Lambda {suggested} in that window, {whole} over the whole network; the best of {windows} "
            f"windows, in hindsight, is {best[0]} to {best[1]} with {_rho(of['its_rho'])}"
        )
    return "\n".join(lines)


def _rho(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
