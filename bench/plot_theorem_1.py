"""Draws theorem 1 (see theorem_1.py): loss after a step against its bound, and both against the learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from measure import RESULTS
from theorem_1 import bound, bound_by_absolute, random_regression

REGRESSIONS = 300
SAMPLES = (4, 64)
FEATURES = (2, 32)
PROVED, ABSOLUTE, LOSS = "#1f5fa8", "#c2571a", "#222222"


def scatter(axes: Any) -> None:
    """Regressions of many sizes, each at a learning rate of 0 to 2 / M."""
    generator = np.random.default_rng(0)
    points = []
    for seed in range(REGRESSIONS):
        samples, features = generator.integers(*SAMPLES), generator.integers(*FEATURES)
        regression = random_regression(samples, features, seed)
        eta = generator.uniform(0, 2) / samples
        gradients = regression.gradients()
        points.append((bound(gradients, eta), bound_by_absolute(gradients, eta), regression.loss_after_step(eta)))
    proved, absolute, loss = np.array(points).T
    for limit, colour, name in ((proved, PROVED, "sigma, mu of g (proved)"), (absolute, ABSOLUTE, "sigma, mu of |g|")):
        label = f"{name}: loss above it in {(loss > limit).sum()} of {REGRESSIONS}"
        axes.loglog(limit, loss, ".", color=colour, alpha=0.6, label=label)
    ends = [loss.min(), max(proved.max(), absolute.max())]
    axes.loglog(ends, ends, color=LOSS, linewidth=0.8)
    axes.set_xlabel("bound")
    axes.set_ylabel("training loss after one step")
    axes.set_title(f"{REGRESSIONS} random regressions, learning rate 0 to 2 / M", fontsize=10)
    axes.legend(fontsize=8)


def curves(axes: Any) -> None:
    """One regression whose gradients do not change sign, where both forms are one bound."""
    regression = random_regression(16, 4, seed=1, one_sign=True)
    gradients, samples = regression.gradients(), len(regression.targets)
    steps = np.linspace(0, 2, 101)
    axes.plot(steps, [bound(gradients, s / samples) for s in steps], color=PROVED, label="bound")
    axes.plot(steps, [regression.loss_after_step(s / samples) for s in steps], color=LOSS, label="loss after the step")
    sigma_alone = bound(gradients, 1 / samples)
    axes.axhline(sigma_alone, color=PROVED, linestyle="--", linewidth=1, label="M/2 x sum of sigma squared")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("learning rate x M")
    axes.set_title("One regression without changes of sign: at 1 / M sigma alone is the bound", fontsize=10)
    axes.grid(linewidth=0.4)
    axes.legend(fontsize=8)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    scatter(left)
    curves(right)
    figure.savefig(RESULTS / "theorem-1.png", dpi=130)


if __name__ == "__main__":
    main()
