"""The figure of layer statistics, as PNG (as figure 2 of the L-SWAG paper). Needs the extra `lab`."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .correlation import Floats
from .laboratory.plots import require
from .layer_statistics import PERCENTILES, LayerStatistics, Profile

BLUE, PALE_BLUE, ORANGE, INK = "#1f5fa8", "#86b0dd", "#c2410c", "#222222"
_DEPTHS = 8
_DPI = 130


def draw(statistics: LayerStatistics, window_rho: Mapping[str, Floats] | None = None) -> bytes:
    """Returns the profile of log sigma, of all networks and by number of layers, and a heat map a task.

    Args:
        statistics: of the networks.
        window_rho: for each task what :meth:`LayerStatistics.window_rho` returns.

    Raises:
        InputError: matplotlib is not installed.
    """
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paintings: list[Callable[[Any], None]] = [partial(_whole, statistics=statistics)]
    if len(statistics.depths()) > 1:
        paintings.append(partial(_by_depth, statistics=statistics))
    paintings += [partial(_heat_map, task=task, rho=rho) for task, rho in (window_rho or {}).items()]
    columns = min(3, len(paintings))
    lines = math.ceil(len(paintings) / columns)
    figure = Figure(figsize=(5.6 * columns, 4.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, paint in zip(panels, paintings, strict=False):
        paint(panel)
    for unused in panels[len(paintings) :]:
        unused.set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, facecolor="white")
    return file.getvalue()


def _whole(panel: Any, statistics: LayerStatistics) -> None:
    found = statistics.suggestion()
    profile = statistics.profile()
    panel.fill_between(PERCENTILES, profile.mean - profile.std, profile.mean + profile.std, color=PALE_BLUE, alpha=0.45)
    _line(panel, profile, color=BLUE)
    if found.spikes:
        panel.axvspan(found.window[0] - 4, found.window[1] + 4, color=ORANGE, alpha=0.15)
        heights = [profile.mean[PERCENTILES.index(spike)] for spike in found.spikes]
        panel.plot(found.spikes, heights, "o", color=ORANGE, label="spikes, the suggested window shaded")
        panel.legend(fontsize=8)
    panel.set_title(f"{profile.networks} networks: mean and deviation", fontsize=10)
    _label(panel)


def _by_depth(panel: Any, statistics: LayerStatistics) -> None:
    from matplotlib import colormaps

    depths = statistics.depths()
    shown = sorted(sorted(depths, key=lambda number: -depths[number])[:_DEPTHS])
    colours = colormaps["viridis"](np.linspace(0.05, 0.85, len(shown)))
    for number, colour in zip(shown, colours, strict=True):
        _line(panel, statistics.having(number).profile(), color=colour, label=f"{number} layers ({depths[number]})")
    panel.legend(fontsize=8)
    most = f", the {_DEPTHS} most frequent of {len(depths)} numbers" if len(depths) > len(shown) else ""
    panel.set_title(f"By number of layers (networks){most}", fontsize=10)
    _label(panel)


def _line(panel: Any, profile: Profile, **style: Any) -> None:
    known = np.isfinite(profile.mean)  # a percentile without layers leaves no gap
    panel.plot(np.array(PERCENTILES)[known], profile.mean[known], "-o", markersize=4, **style)


def _label(panel: Any) -> None:
    panel.set_xlabel("percentile of depth")
    panel.set_ylabel("log of a layer's mean sigma")
    panel.set_xticks(PERCENTILES)
    panel.grid(linewidth=0.4)


def _heat_map(panel: Any, task: str, rho: Floats) -> None:
    panel.imshow(np.ma.masked_invalid(rho), cmap="RdBu", vmin=-1, vmax=1)
    for first, last in np.argwhere(np.isfinite(rho)):
        value = rho[first, last]
        colour = "white" if abs(value) > 0.6 else INK
        panel.text(last, first, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    panel.set_xticks(range(len(PERCENTILES)), PERCENTILES)
    panel.set_yticks(range(len(PERCENTILES)), PERCENTILES)
    panel.set_xlabel("last percentile of the window")
    panel.set_ylabel("first percentile")
    panel.set_title(f"rho of Lambda with {task}, by window", fontsize=10)
