"""Proxies that need no images, beside the values that NAS-Bench-Suite-Zero publishes of the same cells."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest
import torch

import lswag_fast
from lswag_fast import spaces
from lswag_fast.correlation import spearman

CELLS = 24


def test_zen_and_synflow_rank_cells_as_published(shared_data: Path) -> None:
    table = shared_data / "zero_cost_tables" / "nasbench201-cifar10.csv.gz"
    if not table.exists():
        pytest.skip(f"the published table {table.name} is not there")
    with gzip.open(table, "rt", newline="") as file:
        rows = list(csv.DictReader(file))[:CELLS]
    space = spaces.get("nasbench201")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"groups": 2, "dtype": "float32", "proxies": ("zen", "synflow")}
    found = [lswag_fast.score(space.build(row["arch"]), images, **options).proxies for row in rows]  # type: ignore[arg-type]
    for name in ("zen", "synflow"):
        published = [float(row[name]) for row in rows]
        assert spearman([values[name] for values in found], published) > 0.98, name
