"""Every proxy against the accuracies of trained AutoFormer-Tiny networks, and the ensembles made of them.

Scores every network of a table (JSON lines: "arch" and accuracies in percent) on Gaussian images with labels of ten
classes, so that proxies which compare images of one class have some. Scores go to a store, so that the study can be
stopped and started again; the correlations are written as autoformer-tiny-proxies.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import study_tables
import torch
from study_autoformer_accuracy import ACCURACIES, SPACE, TABLE

import lswag_fast
from lswag_fast import Scorer, images
from lswag_fast.correlation import Floats
from lswag_fast.ensembles import aggregation
from lswag_fast.laboratory.study import Task, TaskStudy, study
from lswag_fast.layer_statistics import layer_statistics, window_trainability
from lswag_fast.proxies import names
from lswag_fast.records import Record

NAME = "autoformer-tiny-proxies"
SAMPLES = 48
LABELS = 10
COUNTS = ("params", "flops", "sum of log numel", "positions", "depth")
LOWER_IS_BETTER = ("te_nas_ntk",)


def scores(rows: Sequence[Mapping[str, Any]], seed: int, store: Path, proxies: Sequence[str]) -> list[Record]:
    """Returns the records of the table's rows; computes those that the store lacks."""
    batch = images.load("noise", SAMPLES, image_size=224, seed=seed, num_classes=LABELS)
    options = {"groups": SAMPLES, "dtype": "float32", "device": "cpu", "seed": seed, "proxies": proxies}
    with Scorer(SPACE, batch.images, batch.labels, store=store, **options) as scorer:
        found = {SPACE.encode(r.arch): r for r in scorer.score(row["arch"] for row in rows)}
    print(f"seed {seed}: done", flush=True)
    return [found[SPACE.encode(row["arch"])] for row in rows]


def predictors(records: Sequence[Record], proxies: Sequence[str], window: tuple[int, int]) -> dict[str, list[float]]:
    """Returns every proxy, the rows of table 3, ensembles without accuracies and counts: a value a network."""
    columns = {name: [study_tables.number(r.proxies.get(name)) for r in records] for name in proxies}
    for name in LOWER_IS_BETTER:
        if name in columns:
            columns[f"minus {name}"] = [-value for value in columns.pop(name)]
    psi = [r.expressivity or 0 for r in records]
    for numerator, shown in (("mean", "mu"), ("one", "1")):
        for place, chosen in (("", (0, 100)), (", window", window)):
            terms = [window_trainability(r.layers, chosen, numerator=numerator) for r in records]  # type: ignore[arg-type]
            columns[f"{shown} / sigma{place}"] = terms
            columns[f"{shown} / sigma x Psi{place}"] = [a * b for a, b in zip(terms, psi, strict=True)]
    if "minus te_nas_ntk" in columns:
        condition = [-value for value in columns["minus te_nas_ntk"]]
        columns["TE-NAS, ranks"] = list(aggregation.te_nas(columns["te_nas_regions"], condition))
    if "az_nas_expressivity" in columns:
        parts = (columns[f"az_nas_{part}"] for part in ("expressivity", "trainability", "complexity"))
        expressivity, trainability, complexity = parts
        columns["AZ-NAS, ranks"] = list(aggregation.az_nas(expressivity, None, trainability, complexity))
    columns["sum of log numel"] = [r.counts.sum_log_numel if r.counts else math.nan for r in records]
    columns["positions"] = [r.counts.positions if r.counts else math.nan for r in records]
    columns["depth"] = [r.arch["depth"] for r in records]
    return columns


def with_libra(columns: Mapping[str, Floats], accuracy: Floats) -> tuple[dict[str, Floats], Sequence[str]]:
    """Returns the columns with LIBRA's, chosen for this accuracy in hindsight, a repeat at a time; and its proxies."""
    pool = [name for name in names() if name in columns and name not in COUNTS]
    if len(pool) < 2:
        return dict(columns), ()
    found = []
    for repeat in range(len(next(iter(columns.values())))):
        given = {name: columns[name][repeat] for name in pool}
        found.append(lswag_fast.libra(given, accuracy, columns["params"][repeat], resamples=20))
    return {**columns, "LIBRA, in hindsight": np.array([libra.score for libra in found])}, found[0].names


def markdown(settings: Mapping[str, Any], studies: Sequence[TaskStudy]) -> str:
    """Returns the study as text and tables."""
    first, last = settings["window"]
    chosen = "; ".join(f"{task}: {', '.join(of_task)}" for task, of_task in settings["libra"].items() if of_task)
    libra = f" LIBRA chose, with all accuracies at hand: {chosen}." if chosen else ""
    return "\n".join(
        [
            "# Every proxy against the accuracy of trained AutoFormer-Tiny networks",
            "",
            f"{settings['networks']} networks with the accuracies of Auto-Prox (Wei et al., AAAI 2024); S = G = "
            f"{SAMPLES} Gaussian images at 224x224, labels of {LABELS} classes, float32, seeds: {settings['seeds']}. "
            f"The window, {first} to {last} percent of depth, is the one that layer statistics of these networks "
            f"suggest. {study_tables.HOW_TO_READ}{libra}",
            "",
            *study_tables.table(studies),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="networks and their accuracies, JSON lines")
    parser.add_argument("--store", type=Path, default=measure.RESULTS / f"{NAME}.db", help="where scores are kept")
    parser.add_argument("--proxies", nargs="*", default=list(names()), choices=names())
    parser.add_argument("--name", default=NAME, help="of the results, where only some proxies are studied")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--networks", type=int, help="the first so many of the table; all by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [json.loads(line) for line in arguments.table.read_text().splitlines()][: arguments.networks]
    by_seed = [scores(rows, seed, arguments.store, arguments.proxies) for seed in range(arguments.seeds)]
    window = layer_statistics([r.layers for records in by_seed for r in records]).suggestion().window
    tables = [predictors(records, arguments.proxies, window) for records in by_seed]
    columns = {name: np.array([table[name] for table in tables], dtype=float) for name in tables[0]}
    archs = [SPACE.encode(row["arch"]) for row in rows]
    tasks, libra = [], {}
    for key, shown in ACCURACIES.items():
        accuracy = np.array([row[key] for row in rows])
        complete, libra[shown] = with_libra(columns, accuracy)
        tasks.append(Task(shown, archs, accuracy, complete, [c for c in COUNTS if c in complete]))
    studies = study(tasks)
    settings = {"networks": len(rows), "samples": SAMPLES, "seeds": arguments.seeds, "window": window, "libra": libra}
    study_tables.write(arguments.name, settings, {"all": studies}, markdown(settings, studies))


if __name__ == "__main__":
    main()
