"""Registers, spills and shared memory of every CUDA C++ kernel, compiled without a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import resources


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    if resources.nvcc() is None:
        pytest.skip("nvcc is not installed")
    found: dict[str, Any] = resources.table()
    return found


def test_no_kernel_spills_and_four_blocks_share_a_multiprocessor(compiled: dict[str, Any]) -> None:
    assert len(compiled["rows"]) > 20
    for name, row in compiled["rows"].items():
        assert row["stack_bytes"] == row["spill_bytes"] == 0, name
        if name.startswith("gradient_moments"):
            continue  # a block has all registers of a multiprocessor
        # An sm_80 multiprocessor has 164 KB, of which a block takes 1 KB more than it asks for.
        assert 4 * (row["shared_bytes"] + 1024) <= 164 * 1024, name


def test_products_of_moments_run_on_tensor_cores_and_overlap(tmp_path: Path) -> None:
    source = resources.REPOSITORY / "csrc" / "cuda" / "gradient_moments.cu"
    kernels = resources.instructions(source, tmp_path)
    if kernels is None:
        pytest.skip("nvcc or a disassembler (cuobjdump) is not installed")
    assert len(kernels) == 2
    for code in kernels:
        # Chunks of 4, 3, 2 and 1 products, both operands transposed.
        assert len(re.findall(r"HGMMA\.64x128x16\.F32\S* R\d+, gdesc\[UR\d+\]\.tnspA\.tnspB", code)) == 10
        # A compiler that serialises products waits after each; these two are ours.
        assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == 2
        assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128", code)) == 16
        assert "USETMAXREG.DEALLOC" in code
        assert "USETMAXREG.TRY_ALLOC" in code


def test_the_committed_table_is_what_the_kernels_compile_to(compiled: dict[str, Any]) -> None:
    committed = json.loads(resources.TABLE.read_text())
    if compiled["nvcc"] != committed["nvcc"]:
        pytest.skip(f"the table was made with nvcc {committed['nvcc']}, this is {compiled['nvcc']}")
    assert compiled == committed, "python tests/cuda/resources.py --write makes the table anew"
