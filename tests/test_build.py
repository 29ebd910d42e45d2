from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from lswag_fast import _C

REPOSITORY = Path(__file__).resolve().parents[1]
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
# AVX registers; those numbered 16 to 31, and masks, need AVX-512 too.
AVX = re.compile(r"%[yz]mm")
AVX512 = re.compile(r"%zmm|%[xy]mm(?:1[6-9]|2\d|3[01])|%k[0-7]")


@pytest.fixture(scope="module")
def objects() -> Path:
    """The folder of object folders of the newest build tree."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"instruction sets are chosen at run time on x86-64 alone, not on {platform.machine()}")
    for tool in ("objdump", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} (binutils) is not installed")
    folders = [f for f in (REPOSITORY / "build").glob("*/CMakeFiles") if f.parent.name != "sanitize"]
    built = [f for f in folders if all(list(f.glob(f"lswag_{isa}.dir/**/*.o")) for isa in ISAS)]
    if not built:
        pytest.skip("no build tree with objects beneath build/ (an editable install leaves one)")
    return max(built, key=lambda f: max(o.stat().st_mtime for o in f.glob("**/*.o")))


def objects_of(folder: Path, *targets: str) -> list[str]:
    return [str(o) for target in targets for o in sorted((folder / f"{target}.dir").glob("**/*.o"))]


def text_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("targets", "forbidden"), [(("_C", "lswag_generic"), AVX), (("lswag_avx2",), AVX512)], ids=["baseline", "avx2"]
)
def test_objects_hold_no_wider_instructions(objects: Path, targets: tuple[str, ...], forbidden: re.Pattern[str]):
    listing = text_of("objdump", "-d", "--no-show-raw-insn", *objects_of(objects, *targets))
    assert listing.count("\n") > 10_000
    wider = [line.strip() for line in listing.splitlines() if forbidden.search(line)]
    assert wider == []


def test_wide_objects_do_use_wide_instructions(objects: Path):
    for isa, wide in (("avx2", "%ymm"), ("avx512", "%zmm"), ("avx512_bf16", "vdpbf16ps")):
        assert wide in text_of("objdump", "-d", "--no-show-raw-insn", *objects_of(objects, f"lswag_{isa}"))


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_define_no_symbol_that_another_instruction_set_could_take(objects: Path, isa: str):
    # Of a weak function that several objects define the linker keeps one, perhaps for a wider instruction set.
    listing = text_of("nm", "-C", "--defined-only", "--extern-only", *objects_of(objects, f"lswag_{isa}"))
    symbols = [line.split(maxsplit=2)[2] for line in listing.splitlines() if len(line.split(maxsplit=2)) == 3]
    assert any(f"lswag::{isa}::" in s for s in symbols)
    shared = [s for s in symbols if f"lswag::{isa}::" not in s and not s.startswith("DW.ref.")]
    assert shared == []


def test_unknown_instruction_set_is_refused_in_words():
    code = "import torch; from lswag_fast import _C; _C.cpu_path()"
    environment = os.environ | {"LSWAG_CPU": "nonsense"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert f"LSWAG_CPU=nonsense is not one of what this machine runs: {', '.join(_C.cpu_paths())}" in run.stderr


def test_importing_costs_little_beyond_torch():
    code = "import time, torch; start = time.process_time(); import lswag_fast; print(time.process_time() - start)"
    seconds = [float(text_of(sys.executable, "-c", code)) for _ in range(3)]
    assert median(seconds) < 1


def test_builds_by_make_take_every_processor(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$CMAKE_BUILD_PARALLEL_LEVEL"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CMAKE", "MAKE"))}
    command = ["make", "-s", "-C", str(REPOSITORY), "bench-gpu", f"PYTHON={python}"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OMP")}
    processors = subprocess.run(["nproc"], env=plain, check=True, capture_output=True, text=True).stdout.strip()
    for threads in ({}, {"OMP_NUM_THREADS": "1"}):
        printed = subprocess.run(command, env=environment | threads, check=True, capture_output=True, text=True).stdout
        assert set(re.findall(r"^\d+$", printed, re.MULTILINE)) == {processors}


def test_stubs_name_what_the_module_holds():
    stub = ast.parse((REPOSITORY / "lswag_fast" / "_C.pyi").read_text())
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    constants = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert functions.keys() | classes.keys() | constants == public(_C)
    for name, node in functions.items():
        assert parameters(getattr(_C, name)) == arity(node), name
    for name, node in classes.items():
        methods = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
        real = getattr(_C, name)
        assert methods.keys() - {"__init__"} == public(real)
        for method in methods.values():
            if not isinstance(getattr(real, method.name), property):
                assert parameters(getattr(real, method.name)) == arity(method), f"{name}.{method.name}"


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def arity(node: ast.FunctionDef) -> int:
    return len(node.args.posonlyargs) + len(node.args.args)


def parameters(function: object) -> int:
    """The number of parameters in the signature that pybind11 writes into a docstring."""
    signature = (function.__doc__ or "").split("\n")[0]
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    return len(re.findall(r"\w+: ", inside))
