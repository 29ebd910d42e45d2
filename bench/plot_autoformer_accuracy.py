"""Draws the rank correlations of results/autoformer-tiny-accuracy.json, with their intervals, as a PNG beside it."""

from __future__ import annotations

import json

from matplotlib import pyplot as plt
from measure import RESULTS
from study_autoformer_accuracy import ACCURACIES, NAME

PROXY, COUNT = "#1f5fa8", "#8a8a8a"
PANELS = ("c100_kd_acc", "flower_kd_acc", "chaoyang_kd_acc", "imagenet_super_acc")


def main() -> None:
    data = json.loads((RESULTS / f"{NAME}.json").read_text())
    rows = data["spearman"]
    proxies = set(data["spearman_with_counts"])
    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 0.36 * len(rows) + 1.3), sharey=True)
    for panel, column in zip(panels, PANELS, strict=True):
        for place, (name, row) in enumerate(reversed(rows.items())):
            low, high = row[column]["interval"]
            colour = PROXY if name in proxies else COUNT
            panel.plot([low, high], [place, place], color=colour, linewidth=2)
            panel.plot(row[column]["rho"], place, "o", color=colour, markersize=6)
        panel.axvline(0, color="black", linewidth=0.6)
        panel.set_xlim(-0.65, 1)
        panel.set_title(ACCURACIES[column], fontsize=10)
        panel.grid(axis="x", linewidth=0.4)
    panels[0].set_yticks(range(len(rows)), list(reversed(rows)))
    figure.supxlabel("Spearman's rho, 95 % bootstrap interval over networks (blue: proxies, grey: counts)", fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{NAME}.png", dpi=130)


if __name__ == "__main__":
    main()
