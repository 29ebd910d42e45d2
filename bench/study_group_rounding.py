"""How far rounding moves a layer's log(sum of 1/sigma) from its float64 value, by the number of groups.

With two groups sigma is half the distance of two numbers, so a layer of n weights has one some n times closer than
they are large, and that one can carry the sum of 1 / sigma: the term hangs on the last bits of activations and
gradients, whatever the kernel that sums them. Writes autoformer-tiny-group-rounding.json and .png.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import float64_ranking as ranking
import measure
import torch
from matplotlib import pyplot as plt

from lswag_fast import images, reference, score

NAME = "autoformer-tiny-group-rounding"
SAMPLES = 24
GROUPS = (2, 3, 4, 6, 8, 12, 24)
CANDIDATES = 2
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}
COLOURS = {"float32": "#1f5fa8", "bfloat16": "#c2571a"}
FLOOR = 1e-10
"""Smaller errors are drawn here: a logarithmic axis has no zero."""


def errors() -> dict[str, dict[int, list[float]]]:
    """Returns |log term - its float64 value| of every layer of every candidate, by dtype and groups."""
    net, data = ranking.supernet(), images.load("noise", SAMPLES, image_size=ranking.SPACE["image_size"], seed=0)
    found: dict[str, dict[int, list[float]]] = {dtype: {groups: [] for groups in GROUPS} for dtype in TOLERANCE}
    for arch in ranking.candidates()[:CANDIDATES]:
        for groups in GROUPS:
            exact = reference.lswag(net.subnet(arch), data.images, data.labels, groups=groups).moments
            for dtype, by_groups in found.items():
                result = score(net.subnet(arch), data.images, data.labels, groups=groups, dtype=dtype)
                for row, moments in zip(result.layers, exact, strict=True):
                    assert row.log_sum_inverse_sigma is not None
                    assert moments.log_sum_inverse_sigma is not None
                    by_groups[groups].append(abs(row.log_sum_inverse_sigma - moments.log_sum_inverse_sigma))
            print({dtype: f"{max(rows[groups]):.2g}" for dtype, rows in found.items()}, f"groups {groups}", flush=True)
    return found


def summary(found: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    return {
        dtype: {
            str(groups): {"layers": len(rows), "median_error": median(rows), "largest_error": max(rows)}
            for groups, rows in by_groups.items()
        }
        for dtype, by_groups in found.items()
    }


def draw(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    for shift, (dtype, by_groups) in zip((-1, 1), found.items(), strict=True):
        for place, rows in enumerate(by_groups.values()):
            spread = [place + shift * (0.12 + 0.1 * i / len(rows)) for i in range(len(rows))]
            axes.plot(spread, [max(e, FLOOR) for e in rows], ".", color=COLOURS[dtype], alpha=0.35, markersize=4)
        places = [place + 0.17 * shift for place in range(len(GROUPS))]
        axes.plot(places, [median(rows) for rows in by_groups.values()], "o-", color=COLOURS[dtype], label=dtype)
        axes.hlines(TOLERANCE[dtype], 1.5, len(GROUPS) - 0.5, color=COLOURS[dtype], linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(GROUPS)), [str(g) for g in GROUPS])
    axes.set_xlabel(f"groups G of S = {SAMPLES} samples")
    axes.set_ylabel("|log sum 1/sigma - float64 value|, a dot a layer")
    axes.set_title("What rounding does to a layer's term (line: median; dashed: tolerance, G >= 4)", fontsize=10)
    axes.grid(axis="y", linewidth=0.4)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    found = errors()
    settings = {"samples": SAMPLES, "images": "noise", "candidates": CANDIDATES, "space": ranking.SPACE}
    data = {"machine": measure.machine("cpu"), "settings": settings, "errors": measure.rounded(summary(found))}
    (measure.RESULTS / f"{NAME}.json").write_text(json.dumps(data, indent=1) + "\n")
    draw(found, measure.RESULTS / f"{NAME}.png")


if __name__ == "__main__":
    main()
