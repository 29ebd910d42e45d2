"""Whether L-SWAG knows more than counts of weights and activations in some setting.

Settings are patterns over fewer samples, windows of depth, photographs against noise, initialisations, and gradient
groups. Scores the networks of a table of trained AutoFormer-Tiny networks (JSON lines: "arch" and accuracies in
percent) in several arms, each of which changes one thing. Scores go to a store, so that the study can be stopped and
started again; the correlations are written as autoformer-tiny-beyond-counts.json and .md, and drawn as .png.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import measure
import numpy as np
import study_tables
import torch
from matplotlib import pyplot as plt
from study_autoformer_accuracy import ACCURACIES, SPACE, TABLE

from lswag_fast import Scorer, images
from lswag_fast.laboratory.study import Task, TaskStudy, study
from lswag_fast.ops.activation_patterns import count_distinct
from lswag_fast.proxies.evidence import Evidence
from lswag_fast.proxies.proxy import Need, Proxy
from lswag_fast.records import Record
from lswag_fast.spaces.autoformer import AutoFormerSupernet

NAME = "autoformer-tiny-beyond-counts"
SAMPLES = 48
PATTERN_SAMPLES = (16, 18, 19, 20, 21, 22, 24, 26, 28, 32, 48)
WINDOWS = ((0, 100), (0, 30), (30, 70), (70, 100), (0, 90))
COUNTS = ("sum of log numel", "positions", "parameters", "depth")
TASKS = ("c100_kd_acc", "flower_kd_acc", "chaoyang_kd_acc", "imagenet_super_acc")
OTHERS = ("zico", "nwot", "grad_norm", "snip", "plain", "gradsign", "gsnr", "l2_norm")


def _psi(samples: int) -> type[Proxy]:
    """Returns the proxy that counts the patterns of all activations over the first so many samples."""

    @dataclass(frozen=True)
    class PatternsOfFewer(Proxy):
        name: ClassVar[str] = f"psi over {samples}"
        source: ClassVar[str] = "L-SWAG, equation 7, over fewer samples than gradients are taken of"
        gradient_based: ClassVar[bool] = False
        needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS,))

        def value(self, evidence: Evidence) -> float:
            return float(count_distinct(evidence.words, samples))

    return PatternsOfFewer


@dataclass(frozen=True)
class Arm:
    """One setting of the study."""

    images: str = "noise"
    groups: int = SAMPLES
    dtype: str = "bfloat16"
    spread: float = 1.0  # of the weight matrices, in units of the published 0.02
    samples: Sequence[int] = field(default=PATTERN_SAMPLES)


ARMS = {
    "noise": Arm(),
    "photographs": Arm(images="photos"),
    "two mini-batches": Arm(groups=2, dtype="float32"),
    "weights of 0.08": Arm(spread=4.0),
}


def supernet(arm: Arm, seed: int) -> AutoFormerSupernet:
    """Returns the supernet of a seed, its matrices scaled."""
    drawn = SPACE.supernet(seed).state_dict()
    return SPACE.supernet(state_dict={n: arm.spread * w if w.dim() == 2 else w for n, w in drawn.items()})


def scores(rows: Sequence[Mapping[str, Any]], arm: Arm, seed: int, store: Path) -> list[Record]:
    """Returns the records of the table's rows; computes those that the store lacks."""
    batch = images.load(arm.images, SAMPLES, image_size=224, seed=seed)
    proxies = (*OTHERS, *(_psi(samples)() for samples in arm.samples))
    options = {"groups": arm.groups, "dtype": arm.dtype, "device": "cpu", "seed": seed, "proxies": proxies}
    weights = None if arm.spread == 1 else supernet(arm, seed)
    with Scorer(SPACE, batch.images, batch.labels, store=store, supernet=weights, **options) as scorer:
        found = {SPACE.encode(r.arch): r for r in scorer.score(row["arch"] for row in rows)}
    return [found[SPACE.encode(row["arch"])] for row in rows]


def predictors(records: Sequence[Record], arm: Arm) -> dict[str, list[float]]:
    """Returns Lambda by window, Psi and L-SWAG by pattern samples, other proxies and counts: a value a network."""
    lambdas = {w: [_lambda(r, w) for r in records] for w in WINDOWS}
    columns = {f"Lambda, {first} to {last}": values for (first, last), values in lambdas.items()}
    for samples in arm.samples:
        psi = [study_tables.number(r.proxies.get(f"psi over {samples}")) for r in records]
        columns[f"Psi over {samples}"] = psi
        columns[f"L-SWAG, Psi over {samples}"] = [a * b for a, b in zip(lambdas[0, 100], psi, strict=True)]
    columns |= {name: [study_tables.number(r.proxies.get(name)) for r in records] for name in OTHERS}
    sizes = [r.counts for r in records]
    columns["sum of log numel"] = [c.sum_log_numel if c else math.nan for c in sizes]
    columns["positions"] = [c.positions if c else math.nan for c in sizes]
    columns["parameters"] = [c.parameters if c else math.nan for c in sizes]
    columns["depth"] = [r.arch["depth"] for r in records]
    return columns


def _lambda(record: Record, window: tuple[int, int]) -> float:
    terms = [r.log_sum_inverse_sigma for r in record.layers if window[0] <= r.percentile <= window[1]]
    return math.fsum(term for term in terms if term is not None)


def studied(rows: Sequence[Mapping[str, Any]], arm: Arm, seeds: Sequence[int], store: Path) -> list[TaskStudy]:
    """Returns the study of one arm, a task an accuracy."""
    tables = [predictors(scores(rows, arm, seed, store), arm) for seed in seeds]
    columns = {name: np.array([table[name] for table in tables], dtype=float) for name in tables[0]}
    archs = [SPACE.encode(row["arch"]) for row in rows]
    given = {task: np.array([row[task] for row in rows]) for task in ACCURACIES}
    return study([Task(ACCURACIES[t], archs, values, columns, COUNTS) for t, values in given.items()])


def draw(studies: Mapping[str, Sequence[TaskStudy]]) -> None:
    """Draws partial rho given the counts by pattern samples, a panel a task, a line an arm."""
    figure, panels = plt.subplots(2, len(TASKS), figsize=(13, 6), sharex=True, sharey="row", layout="constrained")
    for column, key in enumerate(TASKS):
        for line, kind in enumerate(("Psi over", "L-SWAG, Psi over")):
            panel = panels[line][column]
            for arm, found in studies.items():
                by_task = {s.task.name: {r.proxy: r for r in s.rows} for s in found}
                values = [_partial(by_task[ACCURACIES[key]][f"{kind} {k}"]) for k in ARMS[arm].samples]
                panel.plot(ARMS[arm].samples, values, "o-", markersize=3, linewidth=1.2, label=arm)
            panel.axhline(0, color="black", linewidth=0.6)
            panel.grid(linewidth=0.3)
            if line == 0:
                panel.set_title(ACCURACIES[key], fontsize=10)
            else:
                panel.set_xlabel("samples that patterns are taken over", fontsize=8)
            if column == 0:
                panel.set_ylabel(f"{kind.split(',')[0].removesuffix(' over')}: partial rho", fontsize=9)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(studies), fontsize=9)
    figure.savefig(measure.RESULTS / f"{NAME}.png", dpi=130)


def _partial(row: Any) -> float:
    found = row.estimates.get("partial") if row.estimates else None
    return found.value if found else math.nan


def markdown(settings: Mapping[str, Any], studies: Mapping[str, Sequence[TaskStudy]]) -> str:
    """Returns the study as text and tables."""
    lines = [
        "# What L-SWAG knows beyond counts on AutoFormer-Tiny",
        "",
        f"{settings['networks']} networks with the accuracies of Auto-Prox (Wei et al., AAAI 2024), S = {SAMPLES}, "
        f"seeds: {settings['seeds']}. {study_tables.HOW_TO_READ} A constant row is saturated: it ranks nothing.",
    ]
    for arm, found in studies.items():
        lines += ["", f"## {arm}", "", beyond_chance(found), "", *study_tables.table(found)]
    return "\n".join([*lines, ""])


def beyond_chance(studies: Sequence[TaskStudy]) -> str:
    """Returns how many partial correlations have an interval without 0, beside how many chance would give."""
    found = [r.estimates["partial"] for s in studies for r in s.rows if r.estimates and "partial" in r.estimates]
    partials = [p for p in found if math.isfinite(p.value)]
    beyond = sum(p.low > 0 or p.high < 0 for p in partials)
    return (
        f"Of {len(partials)} partial rho, {beyond} have an interval that excludes 0; were all of them 0 and "
        f"independent, some {0.05 * len(partials):.0f} would."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="networks and their accuracies, JSON lines")
    parser.add_argument("--store", type=Path, default=measure.RESULTS / f"{NAME}.db", help="where scores are kept")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--networks", type=int, help="the first so many of the table; all by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [json.loads(line) for line in arguments.table.read_text().splitlines()][: arguments.networks]
    studies: dict[str, list[TaskStudy]] = {}
    for name in arguments.arms:
        studies[name] = studied(rows, ARMS[name], range(arguments.seeds), arguments.store)
        print(f"{name}: done", flush=True)
    settings = {"networks": len(rows), "samples": SAMPLES, "seeds": arguments.seeds, "image_size": 224}
    study_tables.write(NAME, settings, studies, markdown(settings, studies))
    draw(studies)


if __name__ == "__main__":
    main()
