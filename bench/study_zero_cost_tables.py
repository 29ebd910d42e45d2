"""What combining proxies is worth on the published tables of NAS-Bench-Suite-Zero: LIBRA, its parts, libra_plus.

For each task and draw, 50 architectures are labelled, and every method is judged by Spearman's rho on the others. The
single proxies and LIBRA are chosen once in hindsight, by all accuracies, and once by the labels. Intervals resample
both the architectures and the draws. Beside each rho is what is left of it given the counts. Writes
zero-cost-tables.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn import __version__ as sklearn_version
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import RidgeCV

from lswag_fast import libra, libra_plus
from lswag_fast.correlation import Floats, partial_spearman, spearman
from lswag_fast.ensembles.ablations import ablations
from lswag_fast.ensembles.libra import weigh
from lswag_fast.ensembles.table import rankings

NAME = "zero-cost-tables"
TABLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "zero_cost_tables"
LABELS = 50
MORE_LABELS = (20, 100)
DRAWS = 20
FIRST_SEED = 1000
"""Of the draws; libra_plus was designed on draws of the seeds 0 to 104 of the same tables."""
RESAMPLES = 200
COUNTS = ("params", "flops")

BEST = "best single proxy, in hindsight"
LIBRA = "LIBRA, in hindsight"
PLUS = f"libra_plus, {LABELS} labels"
RIDGE = f"ridge regression on ranks, {LABELS} labels"
FOREST = f"random forest on ranks, {LABELS} labels"
VARIANTS: dict[str, dict[str, Any]] = {
    "mean log rank": {"combine": "mean_log_rank"},
    "8 bins": {"bins": 8},
    "24 bins": {"bins": 24},
    "bins of equal width": {"binning": "width"},
    "equal width, mean log rank": {"binning": "width", "combine": "mean_log_rank"},
    "rho as it is (oriented=False)": {"oriented": False},
}
ABLATIONS = (
    "two gradient-free",
    "two gradient-based",
    "one of each",
    "two random",
    "maximal information gain",
    "minimal information gain",
    "random z3",
    "minimal bias",
)


@dataclass(frozen=True)
class Table:
    """A published table: proxies and accuracies of the architectures of one task."""

    task: str
    scores: dict[str, Floats]  # each [N]
    accuracy: Floats  # [N]

    @property
    def params(self) -> Floats:
        return self.scores["params"]


def load(path: Path) -> Table:
    with gzip.open(path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0] if name != "arch"}
    return Table(path.name.removesuffix(".csv.gz"), columns, columns.pop("val_accuracy"))


def draw_labels(rows: int, draw: int, labels: int) -> NDArray[np.intp]:
    """Returns the labelled rows of a draw; more labels of the same draw include fewer."""
    return np.random.default_rng(FIRST_SEED + draw).permutation(rows)[:labels]


def in_hindsight(table: Table) -> dict[str, Floats]:
    """Returns the score of each method whose choice sees all accuracies."""
    pool = weigh(table.scores, table.accuracy, table.params)
    choose = partial(libra, table.scores, table.accuracy, table.params, resamples=0)
    parts = ablations(table.scores, table.accuracy, table.params, resamples=0)
    return {
        BEST: rankings(pool.columns[pool.best]),
        LIBRA: choose().score,
        **{f"LIBRA: {name}": choose(**options).score for name, options in VARIANTS.items()},
        **{name: parts[name].score for name in ABLATIONS if "random" not in name},
    }


def by_chance(table: Table, draw: int) -> dict[str, Floats]:
    """Returns the scores of the ablations that draw proxies, chosen otherwise in hindsight."""
    parts = ablations(table.scores, table.accuracy, table.params, resamples=0, seed=draw)
    return {name: parts[name].score for name in ABLATIONS if "random" in name}


def by_labels(table: Table, draw: int) -> dict[str, Floats]:
    """Returns the score of each method that sees the accuracies of one draw's labels only."""
    labelled = draw_labels(len(table.accuracy), draw, LABELS)
    known = np.full(len(table.accuracy), np.nan)
    known[labelled] = table.accuracy[labelled]
    pool = weigh(table.scores, known, table.params)
    ranks = np.column_stack([rankings(values) for values in table.scores.values()]) / len(known)
    ridge = RidgeCV(alphas=np.logspace(-2, 3, 11)).fit(ranks[labelled], rankings(known[labelled]))
    # A third of the features a split is Breiman's default for regression, and 0.01 better here than scikit-learn's all.
    forest = RandomForestRegressor(n_estimators=300, max_features=1 / 3, random_state=draw)
    return {
        f"best single proxy, {LABELS} labels": rankings(pool.columns[pool.best]),
        f"LIBRA, {LABELS} labels": libra(table.scores, known, table.params, resamples=0).score,
        RIDGE: ridge.predict(ranks),
        FOREST: forest.fit(ranks[labelled], known[labelled]).predict(ranks),
        **{f"libra_plus, {count} labels": _learn(table, draw, count) for count in (LABELS, *MORE_LABELS)},
    }


def _learn(table: Table, draw: int, labels: int) -> Floats:
    labelled = draw_labels(len(table.accuracy), draw, labels)
    return libra_plus(table.scores, labelled, table.accuracy[labelled], seed=draw).score


def labels_of(method: str) -> int:
    """Returns how many architectures a method is not judged on, as they are labelled in its draw."""
    return next((count for count in MORE_LABELS if method == f"libra_plus, {count} labels"), LABELS)


def study(path: Path, draws: int = DRAWS, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Returns, for one task, each method's rho by draw, and the mean over draws in each resample, [methods][...]."""
    table = load(path)
    fixed = in_hindsight(table)
    scores = [{**fixed, **by_chance(table, draw), **by_labels(table, draw)} for draw in range(draws)]
    methods = list(scores[0])
    by_draw, given_counts = {}, {}
    for method in methods:
        judged = [_unlabelled(table, draw, labels_of(method)) for draw in range(draws)]
        by_draw[method] = [spearman(s[method][j], table.accuracy[j]) for s, j in zip(scores, judged, strict=True)]
        given_counts[method] = [_given_counts(table, s[method], j) for s, j in zip(scores, judged, strict=True)]
    everything = libra(table.scores, table.accuracy, table.params)
    return {
        "task": table.task,
        "architectures": len(table.accuracy),
        "libra": {
            "names": everything.names,
            "reasons": everything.reasons,
            "notes": everything.notes,
            "rho_of_all": everything.rho,
            "interval": everything.interval,
        },
        "by_draw": by_draw,
        "given_counts": given_counts,
        "resampled": _resampled(table, scores, resamples) if resamples else None,
    }


def _given_counts(table: Table, score: Floats, judged: NDArray[np.bool_]) -> float:
    """Returns the partial rho given the counts; NaN where they determine the score, which then is one of them."""
    counts = [table.scores[name] for name in COUNTS]
    rows = judged & np.isfinite(counts).all(axis=0)
    return partial_spearman(score[rows], table.accuracy[rows], [count[rows] for count in counts])


def _unlabelled(table: Table, draw: int, labels: int) -> NDArray[np.bool_]:
    judged = np.ones(len(table.accuracy), bool)
    judged[draw_labels(len(judged), draw, labels)] = False
    return judged


def _resampled(table: Table, scores: Sequence[Mapping[str, Floats]], resamples: int) -> dict[str, Floats]:
    """Returns the mean rho over draws of each method in each resample of the architectures and of the draws."""
    generator = np.random.default_rng(0)
    rows, draws = len(table.accuracy), len(scores)
    picks = [(generator.integers(rows, size=rows), generator.integers(draws, size=draws)) for _ in range(resamples)]
    found: dict[str, Floats] = {}
    for labels in (LABELS, *MORE_LABELS):
        methods = [method for method in scores[0] if labels_of(method) == labels]
        judged = [_unlabelled(table, draw, labels) for draw in range(draws)]
        stacked = [np.stack([*(s[m] for m in methods), table.accuracy]) for s in scores]
        means = [np.mean([_rhos(stacked[d][:, r[judged[d][r]]]) for d in drawn], axis=0) for r, drawn in picks]
        found |= dict(zip(methods, np.array(means).T, strict=True))
    return found


def _rhos(values: Floats) -> Floats:
    """Returns Spearman's rho of each row but the last with the last."""
    ranks = rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    sizes = np.sqrt((ranks**2).sum(axis=1))
    return np.asarray(ranks[:-1] @ ranks[-1] / (sizes[:-1] * sizes[-1]))


def summarise(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns rho and interval of each method, by task, in the mean over tasks, and beyond the best single proxy."""
    methods = list(tasks[0]["by_draw"])

    def cell(values: Sequence[Floats], resampled: Sequence[Floats]) -> dict[str, Any]:
        return {"rho": float(np.mean(values)), "interval": np.percentile(np.mean(resampled, 0), [2.5, 97.5]).tolist()}

    def across(method: str, baseline: str | None = None) -> dict[str, Any]:
        rhos = [np.subtract(t["by_draw"][method], t["by_draw"][baseline] if baseline else 0) for t in tasks]
        boots = [t["resampled"][method] - (t["resampled"][baseline] if baseline else 0) for t in tasks]
        return cell(rhos, boots)

    return {
        "tasks": {
            t["task"]: {
                "architectures": t["architectures"],
                "libra": t["libra"],
                "rho": {m: cell([np.array(t["by_draw"][m])], [t["resampled"][m]]) for m in methods},
                "given_counts": {m: _mean(t["given_counts"][m]) for m in methods},
                "by_draw": t["by_draw"],
            }
            for t in tasks
        },
        "mean": {method: across(method) for method in methods},
        "mean_given_counts": {m: _mean([v for t in tasks for v in t["given_counts"][m]]) for m in methods},
        "beyond_best_single_proxy": {method: across(method, BEST) for method in methods},
    }


def _mean(values: Sequence[float]) -> float | None:
    """Returns the mean of those that are numbers; None where none is."""
    numbers = [value for value in values if np.isfinite(value)]
    return float(np.mean(numbers)) if numbers else None


def markdown(data: Mapping[str, Any]) -> str:
    """Returns the study as text and tables."""
    settings, tasks = data["settings"], data["tasks"]
    labelled = [method for method in data["mean"] if method.endswith("labels")]
    main = [BEST, LIBRA, *labelled]
    lines = [
        "# Combining proxies on the tables of NAS-Bench-Suite-Zero",
        "",
        f"{len(tasks)} tasks (Krishnakumar et al., NeurIPS 2022), {settings['draws']} draws of {LABELS} labelled "
        "architectures each. Spearman's rho on the architectures not labelled, mean over the draws; in brackets the "
        f"95 % interval over {settings['resamples']} resamples of architectures and draws. In hindsight: chosen by all "
        "accuracies, those it is judged on included. The other rows see the accuracies of their labels alone. "
        "Proxies are turned by the sign of their rho where not said otherwise. Given the counts, and by task behind "
        f"the slash: the partial rho given {' and '.join(COUNTS)}; a choice that is a count itself has none, and is "
        "left out of that mean.",
        "",
        "## Mean over the tasks",
        "",
        *_means(data, main),
        "",
        "libra_plus was designed on other draws of the same tables: its six estimators and their settings were fixed "
        "there, its weights and fits never see an architecture it is judged on. On a space that had no part in that "
        "it may gain less. Ridge regression is of the labels' ranks; the forest has 300 trees, a third of the features "
        "a split, and learns the accuracies.",
        "",
        *_reading(data),
        "",
        "## By task",
        "",
        *_by_task(tasks, [BEST, LIBRA, *(m for m in labelled if labels_of(m) == LABELS)]),
        "",
        "## LIBRA taken apart (table 4 of the paper)",
        "",
        "All in hindsight. LIBRA itself is the matching bias; without z3 it is the pair of minimal information gain.",
        "",
        *_means(data, [*ABLATIONS, LIBRA]),
        "",
        "## What the paper leaves open",
        "",
        "The paper fixes neither bins nor combination, and takes rho as it is. LIBRA above sums rankings, with "
        "Sturges' number of bins of equal frequency.",
        "",
        *_means(data, [LIBRA, *(f"LIBRA: {name}" for name in VARIANTS)]),
        "",
        "Bins of equal width rank better by an accident: on NAS-Bench-201 the published jacov is -1e8 where it failed, "
        "so one bin holds all other architectures, jacov seems to tell nothing beyond nwot, and is chosen as z2. Bins "
        "of equal frequency, which depend on ranks alone, have no such accident, and stay the default.",
        "",
        "## What LIBRA chose in hindsight",
        "",
        *(f"- {task}: {'; '.join(t['libra']['reasons'])}." for task, t in tasks.items()),
        "",
    ]
    return "\n".join(lines)


def _reading(data: Mapping[str, Any]) -> list[str]:
    mean, beyond = data["mean"], data["beyond_best_single_proxy"]
    few, gain = f"LIBRA, {LABELS} labels", "information gain"
    return [
        f"- LIBRA in hindsight is {_cell(beyond[LIBRA], signed=True)} beyond the best single proxy: as good, hardly "
        f"better. Chosen by {LABELS} labels it falls below that proxy, {_cell(beyond[few], signed=True)}.",
        f"- The pair of maximal {gain} has a mean rho of {mean[f'maximal {gain}']['rho']:.3f}, that of minimal {gain} "
        f"{mean[f'minimal {gain}']['rho']:.3f}: on these tables the criterion of z2 does not help.",
        f"- {LABELS} labels are worth more to an estimator than to a choice of proxies: ridge regression has "
        f"{mean[RIDGE]['rho']:.3f}, a random forest {mean[FOREST]['rho']:.3f}, libra_plus {mean[PLUS]['rho']:.3f}.",
    ]


def _means(data: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    beyond = data["beyond_best_single_proxy"]
    partials = data["mean_given_counts"]
    rows = [
        f"| {m} | {_cell(data['mean'][m])} | {_partial(partials[m])} | {_cell(beyond[m], signed=True)} |"
        for m in methods
    ]
    head = "| | mean rho | given the counts | beyond the best single proxy in hindsight |"
    return [head, "| --- | ---: | ---: | ---: |", *rows]


def _by_task(tasks: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    rows = []
    for task, t in tasks.items():
        cells = [f"{_cell(t['rho'][m])} / {_partial(t['given_counts'][m])}" for m in methods]
        rows.append(f"| {task} | {' | '.join(cells)} |")
    return [f"| | {' | '.join(methods)} |", f"| --- |{' ---: |' * len(methods)}", *rows]


def _partial(value: float | None) -> str:
    return "a count" if value is None else f"{value:.3f}"


def _cell(value: Mapping[str, Any], *, signed: bool = False) -> str:
    form: Callable[[float], str] = (lambda x: f"{x:+.3f}") if signed else (lambda x: f"{x:.3f}")
    low, high = value["interval"]
    return f"{form(value['rho'])} [{form(low)}, {form(high)}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the published tables, *.csv.gz")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--resamples", type=int, default=RESAMPLES)
    parser.add_argument("--workers", type=int, default=2, help="processes, a task each")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    start = time.perf_counter()
    paths = sorted(arguments.tables.glob("*.csv.gz"))
    with ProcessPoolExecutor(arguments.workers) as pool:
        tasks = list(pool.map(partial(study, draws=arguments.draws, resamples=arguments.resamples), paths))
    settings = {"labels": LABELS, "draws": arguments.draws, "resamples": arguments.resamples, "first_seed": FIRST_SEED}
    data = {"settings": settings, **summarise(tasks)}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = {"seconds": time.perf_counter() - start, "processor_seconds": usage.ru_utime + usage.ru_stime}
    machine = {**measure.machine("cpu"), "scikit-learn": sklearn_version, "workers": arguments.workers, **cost}
    data = measure.rounded({"machine": machine, **data})
    (arguments.output / f"{NAME}.json").write_text(json.dumps(data) + "\n")
    (arguments.output / f"{NAME}.md").write_text(markdown(data))
    print(markdown(data))


if __name__ == "__main__":
    main()
