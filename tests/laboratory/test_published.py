"""Published tables, read and studied; known values were computed by scipy from the tables themselves."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from lswag_fast.laboratory import own_tasks, read, study

stats = pytest.importorskip("scipy.stats")


def test_nasbench201_cifar10_is_as_scipy_has_it(shared_data: Path):
    path = shared_data / "zero_cost_tables" / "nasbench201-cifar10.csv.gz"
    (done,) = study(own_tasks(read(path)[0], []), draws=20)
    with gzip.open(path, "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["synflow"]]
    accuracy, synflow = ([float(row[name]) for row in rows] for name in ("val_accuracy", "synflow"))
    found = next(row for row in done.rows if row.proxy == "synflow")
    assert found.architectures == len(rows) == 724
    assert found.estimates["spearman"].value == pytest.approx(stats.spearmanr(synflow, accuracy)[0])
    assert found.estimates["kendall"].value == pytest.approx(stats.kendalltau(synflow, accuracy)[0])
    assert found.estimates["spearman"].value == pytest.approx(0.736, abs=5e-4)
    assert done.top == 73


def test_twelve_tasks_have_every_proxy(shared_data: Path):
    tables = [read(path)[0] for path in sorted((shared_data / "zero_cost_tables").glob("*.csv.gz"))]
    done = study([task for table in tables for task in own_tasks(table, [])], draws=20)
    names = {row.proxy for row in done[0].rows}
    assert len(done) == 12
    assert all({row.proxy for row in one.rows} == names for one in done)
    status = {(one.task.name, row.proxy): row.status for one in done for row in one.rows}
    assert status["transnas_micro-normal", "epe_nas"] == "constant"
    assert status["transnas_micro-normal", "synflow"] == "missing"


def test_autoformer_accuracies_have_seven_tasks(shared_data: Path):
    (table,) = read(shared_data / "vit" / "autoformer_tiny_accuracy.jsonl")
    assert len(table.archs) == 100
    assert len(table.columns) == 7


def test_all_cells_of_nasbench201_rank_in_seconds(shared_data: Path):
    from lswag_fast.correlation import kendall_tau

    (table,) = read(shared_data / "nasbench201_accuracy.csv.gz")
    a, b = table.columns["cifar10"], table.columns["ImageNet16-120"]
    assert len(a) == 15_625
    assert kendall_tau(a, b) == pytest.approx(stats.kendalltau(a, b)[0], abs=1e-12)
    assert np.isfinite(a).all()
