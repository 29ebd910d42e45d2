"""Registers, spills, shared memory and tensor-core instructions of every Triton kernel, compiled without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")

SCRIPT = Path(__file__).with_name("resources.py")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SCRIPT.with_suffix(".json").read_text())
    return found


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The table made afresh, in a process of its own: in this one kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.fixture
def same_triton(committed: dict[str, Any]) -> None:
    """Skips under another Triton than the table's: each allocates registers and shared memory in its own way."""
    if triton.__version__ != committed["triton"]:
        pytest.skip(f"the table was made with Triton {committed['triton']}, this is {triton.__version__}")


@pytest.mark.usefixtures("same_triton")
def test_no_kernel_spills(compiled: dict[str, Any]) -> None:
    assert compiled["rows"]
    for name, row in compiled["rows"].items():
        assert row["spill_instructions"] == row["stack_bytes"] == 0, name


def test_matrix_products_use_tensor_cores_and_copy_ahead(compiled: dict[str, Any]) -> None:
    for name, row in compiled["rows"].items():
        assert bool(row["matrix_instructions"]) == row["matrix"], name
        assert row["asynchronous_copies"] > 0 or not row["pipelined"], name


def test_three_tiles_of_operands_are_under_way_at_a_time(compiled: dict[str, Any]) -> None:
    """The hot kernel on Hopper, by its shared memory: a pipeline that was dropped would leave one tile or none."""
    found = 0
    for name, row in compiled["rows"].items():
        if row["pipelined"] and row["matrix"] and re.match("gradient_moments (?:bf16|fp16|tf32).*sm_90", name):
            rows, columns, chunk = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", name)[0])
            assert row["shared_bytes"] == 3 * (4 if "tf32" in name else 2) * chunk * (rows + columns), name
            found += 1
    assert found >= 8


@pytest.mark.usefixtures("same_triton")
def test_the_committed_table_is_what_the_kernels_compile_to(
    compiled: dict[str, Any], committed: dict[str, Any]
) -> None:
    assert compiled == committed, "python tests/kernels/resources.py --write makes the table anew"
