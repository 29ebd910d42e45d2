"""The figures of a study, as PNG: heat map, bars with intervals, scatter plots. Needs the extra `lab`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .study import Row, TaskStudy

BLUE, PALE_BLUE, ORANGE, GREY, PALE_GREY, INK = "#1f5fa8", "#86b0dd", "#c2410c", "#8a8a8a", "#bdbdbd", "#222222"
_BARS = 8
_PANELS = 6
_SHORT = 32
_DPI = 130


def require() -> None:
    """Raises InputError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the figures of a study need matplotlib, which is not installed: pip install 'lswag-fast[lab]'"
        ) from error


def heat_map(studies: Sequence[TaskStudy]) -> bytes:
    """Returns Spearman's rho of each proxy on each task (as figure 3 of the L-SWAG paper), best mean |rho| first."""
    tasks = [study.task.name for study in studies]
    found = {(row.proxy, study.task.name): row for study in studies for row in study.rows}
    names = sorted({proxy for proxy, _ in found}, key=lambda name: -_strength(name, tasks, found))
    rho = np.array([[_rho(found[name, task]) for task in tasks] for name in names])
    width, height = (
        max(4.6, 2.4 + 0.95 * len(tasks)),
        0.8 + 0.36 * len(names) + 0.075 * max(map(len, map(_short, tasks))),
    )
    figure, (axes,) = _panels(1, 1, width, height)
    image = axes.imshow(rho, cmap=_colours(), vmin=-1, vmax=1, aspect="auto")
    for place, task in np.ndindex(rho.shape):
        row = found[names[place], tasks[task]]
        axes.text(task, place, _cell(row), ha="center", va="center", fontsize=8, color=_on(float(rho[place, task])))
    axes.set_xticks(range(len(tasks)), [_short(task) for task in tasks], rotation=35, ha="right", fontsize=9)
    counts = {row.proxy for row in found.values() if row.is_count}
    axes.set_yticks(range(len(names)), [f"{n} (count)" if n in counts else n for n in names], fontsize=9)
    axes.set_xticks(np.arange(len(tasks) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_label("Spearman's rho", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return _png(figure)


def bars(studies: Sequence[TaskStudy]) -> bytes:
    """Returns the eight proxies with the highest |rho| of each task, with intervals (as figure 4 of the paper)."""
    from matplotlib.ticker import MultipleLocator

    columns = min(3, len(studies))
    lines = math.ceil(len(studies) / columns)
    figure, grid = _panels(lines, columns, 4.0 if columns > 1 else 6.5, 0.5 + 0.3 * _BARS)
    for axes, study in zip(grid, studies, strict=False):
        best = sorted((row for row in study.rows if row.estimates), key=_size, reverse=True)[:_BARS]
        for place, row in enumerate(reversed(best)):
            rho = row.estimates["spearman"]
            axes.barh(place, rho.value, color=PALE_GREY if row.is_count else PALE_BLUE, height=0.7)
            axes.plot([rho.low, rho.high], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
            if len(rho.by_repeat) > 1:
                axes.plot(rho.by_repeat, [place] * len(rho.by_repeat), "|", color=ORANGE, markersize=9)
        axes.set_yticks(range(len(best)), [row.proxy for row in reversed(best)], fontsize=9)
        axes.set_xlim(min(0.0, *(row.estimates["spearman"].low * 1.05 for row in best), 0.0), 1)
        axes.xaxis.set_major_locator(MultipleLocator(0.25))
        axes.tick_params(axis="x", labelsize=8)
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.grid(axis="x", linewidth=0.4)
        axes.set_axisbelow(True)
        axes.set_title(f"{_short(study.task.name)}, {study.architectures} architectures", fontsize=9)
    repeats = "; orange: each repeat" if any(study.repeats > 1 for study in studies) else ""
    figure.supxlabel(
        f"Spearman's rho (grey: counts) and its 95 % interval over resampled architectures{repeats}", fontsize=9
    )
    return _png(figure)


def scatter(study: TaskStudy) -> bytes:
    """Returns accuracy against the ranking by each of the six proxies with the highest |rho|."""
    best = sorted((row for row in study.rows if row.estimates), key=_size, reverse=True)[:_PANELS]
    columns = min(3, len(best))
    figure, grid = _panels(math.ceil(len(best) / columns), columns, 3.3 if columns > 1 else 5.0, 2.7)
    size = max(2.0, min(14.0, 6000 / study.architectures))
    opacity = 0.8 if study.architectures < 200 else 0.45
    for axes, row in zip(grid, best, strict=False):
        values = np.asarray(study.task.proxies[row.proxy])
        present = ~np.isnan(values).any(axis=0)
        places = np.mean([_percentiles(v) for v in values[:, present]], axis=0)
        colour = GREY if row.is_count else BLUE
        axes.scatter(places, study.task.accuracy[present], s=size, color=colour, alpha=opacity, linewidths=0)
        rho, partial = row.estimates["spearman"].value, row.estimates.get("partial")
        beyond = f", given counts {partial.value:z.2f}" if partial and math.isfinite(partial.value) else ""
        axes.set_title(f"{row.proxy}: rho {rho:z.2f}{beyond}", fontsize=9)
        axes.set_ylim(*_range(study.task.accuracy))
        axes.set_xlim(-3, 103)
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.4)
    figure.supxlabel("ranking by the proxy, percentile (the highest value at 100)", fontsize=9)
    figure.supylabel(f"accuracy, {_short(study.task.name)}", fontsize=9)
    return _png(figure)


def _strength(name: str, tasks: Sequence[str], found: dict[tuple[str, str], Row]) -> float:
    defined = [abs(value) for task in tasks if math.isfinite(value := _rho(found[name, task]))]
    return sum(defined) / len(defined) if defined else -1.0


def _rho(row: Row) -> float:
    return row.estimates["spearman"].value if row.estimates else math.nan


def _size(row: Row) -> float:
    return abs(_rho(row))


def _cell(row: Row) -> str:
    if not row.estimates:
        return row.status
    rho = row.estimates["spearman"]
    spread = f"\n± {rho.spread:.2f}" if math.isfinite(rho.spread) else ""
    return f"{rho.value:z.2f}{spread}"


def _on(rho: float) -> str:
    return "white" if abs(rho) > 0.6 else INK


def _short(name: str) -> str:
    return name if len(name) <= _SHORT else f"{name[: _SHORT - 1]}…"


def _percentiles(values: Any) -> Any:
    from ..correlation import ranks

    return 100 * (ranks(values) - 0.5) / len(values)


def _range(accuracy: Any) -> tuple[float, float]:
    """The range drawn: the lowest hundredth, often networks that did not train, would flatten all others."""
    low, high = float(np.sort(accuracy)[len(accuracy) // 100]), float(accuracy.max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["RdBu"].with_extremes(bad="#dddddd")


def _panels(lines: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of panels, each `width` x `height` inches; without pyplot, which keeps every figure and its settings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def _png(figure: Any) -> bytes:
    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, facecolor="white")
    return file.getvalue()
