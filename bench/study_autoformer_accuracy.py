"""How well L-SWAG and its factors rank trained AutoFormer-Tiny networks, and what they know beyond counts.

Scores every network of a table (JSON lines: "arch" and accuracies in percent) with several seeds, each of which draws
Gaussian images, labels and weights anew. Scores go to a store, so that the study can be stopped and started again;
the correlations are written as autoformer-tiny-accuracy.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from numpy.typing import NDArray

from lswag_fast import Scorer, images, spaces
from lswag_fast.correlation import Floats, bootstrap, partial_spearman, spearman

NAME = "autoformer-tiny-accuracy"
TABLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "vit" / "autoformer_tiny_accuracy.jsonl"
SAMPLES = 48
SEEDS = range(5)
SPACE = spaces.get("autoformer-tiny", image_size=224, patch_size=16, num_classes=1000)

PROXIES = {"L-SWAG": "lswag", "Lambda": "trainability", "Psi": "expressivity"}
PRODUCT = "sum of log numel x positions"
GIVEN = ("sum of log numel", "positions")
ACCURACIES = {
    "c100_kd_acc": "CIFAR-100, distilled",
    "flower_kd_acc": "Flowers-102, distilled",
    "chaoyang_kd_acc": "Chaoyang, distilled",
    "c100_base_acc": "CIFAR-100, plain",
    "flower_base_acc": "Flowers-102, plain",
    "chaoyang_base_acc": "Chaoyang, plain",
    "imagenet_super_acc": "ImageNet, supernet weights",
}


def scores(
    rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], store: Path, groups: int, dtype: str
) -> list[list[Any]]:
    """Returns the records of the table's rows, for each seed; computes those that the store lacks."""
    found = []
    for seed in seeds:
        batch = images.load("noise", SAMPLES, image_size=224, seed=seed)
        options = {"groups": groups, "dtype": dtype, "device": "cpu", "seed": seed}
        with Scorer(SPACE, batch.images, batch.labels, store=store, **options) as scorer:
            by_arch = {SPACE.encode(r.arch): r for r in scorer.score(row["arch"] for row in rows)}
        found.append([by_arch[SPACE.encode(row["arch"])] for row in rows])
        print(f"groups {groups}, {dtype}, seed {seed}: done", flush=True)
    return found


def predictors(by_seed: Sequence[Sequence[Any]], suffix: str = "") -> dict[str, Floats]:
    """Returns each proxy's values, [seeds, networks]."""
    return {
        name + suffix: np.array([[getattr(r, field) for r in records] for records in by_seed])
        for name, field in PROXIES.items()
    }


def counts(records: Sequence[Any]) -> dict[str, Floats]:
    """Returns what a network is by size alone, [1, networks]: it depends on no seed."""
    columns: dict[str, list[float]] = {
        "sum of log numel": [r.counts.sum_log_numel for r in records],
        "positions": [r.counts.positions for r in records],
        PRODUCT: [r.counts.sum_log_numel * r.counts.positions for r in records],
        "depth": [r.arch["depth"] for r in records],
        "parameters": [r.counts.parameters for r in records],
    }
    return {name: np.array([values]) for name, values in columns.items()}


def correlation(values: Floats, accuracy: Floats, given: Sequence[Floats] = ()) -> dict[str, Any]:
    """Returns the mean of rho over the seeds, its interval over resampled networks, and its range over the seeds.

    `given` makes it the partial correlation given these counts.
    """

    def mean_rho(rows: NDArray[np.intp]) -> float:
        return float(np.mean([_rho(v[rows], accuracy[rows], [g[rows] for g in given]) for v in values]))

    everything = np.arange(len(accuracy))
    by_seed = [_rho(v, accuracy, given) for v in values]
    return {
        "rho": mean_rho(everything),
        "interval": bootstrap(mean_rho, len(accuracy)),
        "by_seed": by_seed if len(by_seed) > 1 else None,
    }


def _rho(x: Floats, y: Floats, given: Sequence[Floats]) -> float:
    return partial_spearman(x, y, given) if given else spearman(x, y)


def analyse(rows: Sequence[Mapping[str, Any]], proxies: dict[str, Floats], sizes: dict[str, Floats]) -> dict[str, Any]:
    """Returns rho with every accuracy of all proxies and counts, and of the proxies given counts."""
    accuracies = {name: np.array([row[name] for row in rows]) for name in ACCURACIES}

    def table(predictors: Mapping[str, Floats], given: Sequence[str] = ()) -> dict[str, Any]:
        fixed = [sizes[name][0] for name in given]
        return {
            name: {column: correlation(values, accuracy, fixed) for column, accuracy in accuracies.items()}
            for name, values in predictors.items()
        }

    return {
        "spearman": table({**proxies, **sizes}),
        "partial_spearman": table({**proxies, PRODUCT: sizes[PRODUCT]}, GIVEN),
        "partial_spearman_given_product_too": table(proxies, (*GIVEN, PRODUCT)),
        "spearman_with_counts": {
            name: {size: float(np.mean([spearman(v, c[0]) for v in values])) for size, c in sizes.items()}
            for name, values in proxies.items()
        },
    }


def markdown(data: Mapping[str, Any]) -> str:
    """Returns the study as text and tables."""
    settings = data["settings"]
    seeds = ", ".join(f"{n} (seeds: {len(s)})" for n, s in settings["seeds"].items())
    lines = [
        "# Rank correlation with the accuracy of trained AutoFormer-Tiny networks",
        "",
        f"{settings['networks']} networks; accuracies of Auto-Prox (Wei et al., AAAI 2024). S = {SAMPLES} Gaussian "
        f"images at 224x224, whole network; a seed draws images, labels and weights. {seeds}. "
        "Spearman's rho, mean over the seeds; in brackets the 95 % bootstrap interval over networks (1000 resamples).",
        "",
        *_table(data["spearman"]),
        "",
        f"Partial rho given {' and '.join(GIVEN)}: Pearson's correlation of what is left of the ranks of proxy and "
        "accuracy after a least-squares fit on the ranks of these counts.",
        "",
        *_table(data["partial_spearman"]),
        "",
        "The product of the counts is no sum of their ranks, so that something is left of it, and of L-SWAG, which "
        "follows it. Partial rho given the product as well:",
        "",
        *_table(data["partial_spearman_given_product_too"]),
        "",
        "Rho of the proxies with the counts themselves:",
        "",
        *_table(data["spearman_with_counts"]),
        "",
    ]
    return "\n".join(lines)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(next(iter(rows.values())))
    heads = ["", *(ACCURACIES.get(column, column) for column in columns)]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * len(columns)}"]
    return lines + [f"| {name} | {' | '.join(_cell(row[c]) for c in columns)} |" for name, row in rows.items()]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    low, high = value["interval"]
    return f"{value['rho']:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="networks and their accuracies, JSON lines")
    parser.add_argument("--store", type=Path, default=measure.RESULTS / f"{NAME}.db", help="where scores are kept")
    parser.add_argument("--dtype", default="bfloat16", help="of the score with a group a sample (default: bfloat16)")
    parser.add_argument("--batch-seeds", type=int, default=1, help="seeds of the score with two mini-batches, float32")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [json.loads(line) for line in arguments.table.read_text().splitlines()]
    by_sample = scores(rows, SEEDS, arguments.store, SAMPLES, arguments.dtype)
    proxies = predictors(by_sample)
    seeds = {f"G = S = {SAMPLES}, {arguments.dtype}": list(SEEDS)}
    if arguments.batch_seeds:
        # With two groups sigma is the distance of two numbers, and rounding in bfloat16 would be most of it.
        by_batch = scores(rows, range(arguments.batch_seeds), arguments.store, 2, "float32")
        proxies |= predictors(by_batch, ", two mini-batches")
        seeds["two mini-batches, float32"] = list(range(arguments.batch_seeds))
    settings = {"networks": len(rows), "samples": SAMPLES, "image_size": 224, "images": "noise", "seeds": seeds}
    data = {"settings": settings, **analyse(rows, proxies, counts(by_sample[0]))}
    measure.RESULTS.mkdir(exist_ok=True)
    machine = measure.machine("cpu")
    (measure.RESULTS / f"{NAME}.json").write_text(json.dumps({"machine": machine, **measure.rounded(data)}) + "\n")
    (measure.RESULTS / f"{NAME}.md").write_text(markdown(data))
    print(markdown(data))


if __name__ == "__main__":
    main()
