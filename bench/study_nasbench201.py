"""How well L-SWAG and its parts rank trained NAS-Bench-201 cells: the rows of the paper's table 3, beside the counts.

Scores random cells on crops of photographs at 32x32, several times: a seed draws images, labels and weights anew. Two
arms: two mini-batches with batch normalisation in training mode, and a group a sample with it in eval mode, since there
samples must not be coupled. Scores go to a store, so that the study can be stopped and started again; the correlations
are written as nasbench201-accuracy.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import study_tables
import torch
from torch import nn

from lswag_fast import Scorer, images
from lswag_fast.correlation import Floats
from lswag_fast.laboratory.study import Task, study
from lswag_fast.layer_statistics import layer_statistics, window_trainability
from lswag_fast.records import Record
from lswag_fast.spaces import NASBench201Space

NAME = "nasbench201-accuracy"
TABLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "nasbench201_accuracy.csv.gz"
SAMPLES = 64
CELLS = 300
REPEATS = 3
SHARED = ("lswag", "zico", "swap", "nwot", "grad_norm", "snip", "l2_norm", "params", "flops")
TRAINING, EVAL = "two mini-batches", "G = S, eval mode"
ACCURACIES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "ImageNet16-120": "ImageNet16-120"}
COUNTS = ("sum of log numel", "positions", "parameters")
PAPER = {
    "mu / sigma": (0.75, 0.80, 0.78),
    "1 / sigma x Psi": (0.79, 0.82, 0.80),
    "1 / sigma x Psi, window": (0.79, 0.83, 0.80),
}
"""Table 3 of the paper: 1000 cells, images of the data sets themselves."""


class EvalSpace(NASBench201Space):
    """The cells with batch normalisation in eval mode: at initialisation, the identity."""

    coupled = False

    @property
    def options(self) -> dict[str, Any]:
        """Those of the space, and the mode."""
        return {**super().options, "mode": "eval"}

    def build(self, arch: Any, seed: int = 0) -> Any:
        """Returns the candidate in eval mode."""
        model: nn.Module = super().build(arch, seed)
        return model.eval()


ARMS: dict[str, tuple[NASBench201Space, int]] = {TRAINING: (NASBench201Space(), 2), EVAL: (EvalSpace(), SAMPLES)}


def scores(cells: Sequence[Any], arm: str, seed: int, store: Path) -> list[Record]:
    """Returns the records of the cells in one arm and repeat; computes those that the store lacks."""
    space, groups = ARMS[arm]
    batch = images.load("photos", SAMPLES, image_size=32, seed=seed, num_classes=10)
    options = {"groups": groups, "dtype": "float32", "device": "cpu", "seed": seed, "proxies": SHARED}
    with Scorer(space, batch.images, batch.labels, store=store, **options) as scorer:
        by_cell = {space.encode(r.arch): r for r in scorer.score(cells)}
    print(f"{arm}, seed {seed}: done", flush=True)
    return [by_cell[space.encode(cell)] for cell in cells]


def predictors(records: Sequence[Record], window: tuple[int, int]) -> dict[str, list[float]]:
    """Returns the rows of table 3, other proxies and the counts: a value a cell, NaN where it failed."""
    columns: dict[str, Callable[[Record], float]] = {}
    for shown, numerator in (("mu", "mean"), ("1", "one")):
        for place, chosen in (("", (0, 100)), (", window", window)):
            value = partial(_trainability, window=chosen, numerator=numerator)
            columns[f"{shown} / sigma{place}"] = value
            columns[f"{shown} / sigma x Psi{place}"] = lambda r, value=value: value(r) * (r.expressivity or 0)
    columns |= {
        name: lambda r, key=key: study_tables.number(r.proxies.get(key))
        for name, key in (("SWAP", "swap"), ("NWOT", "nwot"), ("grad norm", "grad_norm"), ("SNIP", "snip"))
    }
    columns |= {
        "sum of log numel": lambda r: r.counts.sum_log_numel if r.counts else math.nan,
        "positions": lambda r: r.counts.positions if r.counts else math.nan,
        "parameters": lambda r: r.counts.parameters if r.counts else math.nan,
    }
    return {name: [value(r) if r.status == "ok" else math.nan for r in records] for name, value in columns.items()}


def _trainability(record: Record, window: tuple[int, int], numerator: Any) -> float:
    return window_trainability(record.layers, window, numerator=numerator)


def windows(by_arm: Mapping[str, Sequence[Sequence[Record]]], accuracy: Mapping[str, Floats]) -> dict[str, Any]:
    """Returns, for each arm, the window that log sigma suggests, and for each accuracy the best one in hindsight."""
    found = {}
    for arm, repeats in by_arm.items():
        statistics = layer_statistics(record.layers for records in repeats for record in records)
        rho = {task: statistics.window_rho(np.tile(values, len(repeats))) for task, values in accuracy.items()}
        best = {task: np.unravel_index(np.nanargmax(table), table.shape) for task, table in rho.items()}
        found[arm] = {
            "suggested": statistics.suggestion().window,
            "why": statistics.suggestion().reason,
            "mean_log_sigma": statistics.profile().mean.tolist(),
            "best": {
                t: [10 * int(first), 10 * int(last), float(rho[t][first, last])] for t, (first, last) in best.items()
            },
            "whole": {task: float(table[0, 10]) for task, table in rho.items()},
        }
    return found


def tasks(
    by_arm: Mapping[str, Sequence[Sequence[Record]]],
    accuracy: Mapping[str, Floats],
    cells: Sequence[str],
    chosen: Mapping[str, Any],
) -> dict[str, list[Task]]:
    """Returns one task an accuracy, for each arm."""
    found = {}
    for arm, repeats in by_arm.items():
        tables = [predictors(records, chosen[arm]["suggested"]) for records in repeats]
        columns = {name: np.array([table[name] for table in tables]) for name in tables[0]}
        found[arm] = [Task(ACCURACIES[name], cells, values, columns, COUNTS) for name, values in accuracy.items()]
    return found


def published(table: Path, cells: Sequence[str]) -> dict[str, Floats]:
    """Returns the accuracies of the cells, in percent."""
    with gzip.open(table, "rt", newline="") as file:
        rows = {row["arch"]: row for row in csv.DictReader(file)}
    return {task: np.array([float(rows[cell][task]) for cell in cells]) for task in ACCURACIES}


def markdown(settings: Mapping[str, Any], studies: Mapping[str, Any]) -> str:
    """Returns the study as text and tables."""
    lines = [
        "# Rank correlation with the accuracy of trained NAS-Bench-201 cells",
        "",
        f"{settings['cells']} random cells of the 15,625, with their published validation accuracies; S = {SAMPLES} "
        f"crops of photographs at 32x32; {settings['repeats']} repeats, each with images, labels and weights of its "
        f"own. {study_tables.HOW_TO_READ} The last column has table 3 of the paper (1000 cells, images of the "
        "data sets themselves) where it has the row. Lambda is taken over the whole network or over the window; Psi is "
        "always that of the whole network.",
    ]
    for arm, found in studies.items():
        window = settings["windows"][arm]
        best = "; ".join(f"{ACCURACIES[t]}: {a} to {b}, {rho:.2f}" for t, (a, b, rho) in window["best"].items())
        whole = ", ".join(f"{rho:.2f}" for rho in window["whole"].values())
        lines += [
            "",
            f"## {arm}",
            "",
            f"Window suggested by log sigma: {window['suggested'][0]} to {window['suggested'][1]} percent of depth "
            f"({window['why']}). Best of the 66 windows for Lambda, in hindsight: {best} (whole network: {whole}).",
            "",
            *study_tables.table(found, {"the paper": PAPER}),
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="cells and their accuracies, CSV")
    parser.add_argument("--store", type=Path, default=measure.RESULTS / f"{NAME}.db", help="where scores are kept")
    parser.add_argument("--cells", type=int, default=CELLS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    space = NASBench201Space()
    cells = list(space.sample(arguments.cells, seed=0))
    found: dict[str, list[list[Record]]] = {arm: [] for arm in ARMS}
    for seed in range(arguments.repeats):  # a study that is stopped has whole repeats of both arms
        for arm in ARMS:
            found[arm].append(scores(cells, arm, seed, arguments.store))
    encoded = [space.encode(cell) for cell in cells]
    accuracy = published(arguments.table, encoded)
    chosen = windows(found, accuracy)
    by_arm = tasks(found, accuracy, encoded, chosen)
    studies = {arm: study(of_arm) for arm, of_arm in by_arm.items()}
    settings = {"cells": len(cells), "repeats": arguments.repeats, "samples": SAMPLES, "windows": chosen}
    study_tables.write(NAME, settings | {"paper": PAPER}, studies, markdown(settings, studies))


if __name__ == "__main__":
    main()
