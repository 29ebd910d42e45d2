"""What every Triton kernel becomes on sm_80 and sm_90, compiled ahead of time: no GPU is needed.

Prints the table as JSON. With --write, writes it to resources.json, which the tests compare with a fresh one; with
--only TEXT, compiles the variants whose name holds the text.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lswag_fast import kernels
from lswag_fast.kernels.launch import OPTIONS
from lswag_fast.kernels.variant import Variant

TABLE = Path(__file__).with_name("resources.json")
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def variants() -> Iterator[Variant]:
    """Every variant of every kernel file: what its `variants()` gives."""
    for file in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{file.name}")
        yield from getattr(module, "variants", lambda: ())()


def compiled(variant: Variant, architecture: int) -> dict[str, Any]:
    """Compiles and returns one row of the table."""
    names = variant.kernel.arg_names
    types = {**{name: kind.removesuffix(":16") for name, kind in variant.types.items()}}
    signature = {name: types.get(name, "constexpr") for name in names}
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if variant.types.get(name, "").endswith(":16")
    }
    constants = {name: None for name in names if name not in types} | variant.constants
    source = ASTSource(variant.kernel, signature, constants, divisible)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, **OPTIONS}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [TOOL, "-res-usage", "-sass", file.name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", code)
    assert found is not None, code
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "spill_instructions": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared_bytes": built.metadata.shared,
        "matrix_instructions": len(re.findall(r"\bH?(?:HGMMA|GMMA|HMMA|IGMMA|QGMMA)\b", code)),
        "asynchronous_copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", code)),
    }


def table(only: str = "") -> dict[str, dict[str, Any]]:
    """Returns the rows by "name, sm_NN"."""
    _JOBS.extend((v, architecture) for v in variants() if only in v.name for architecture in v.architectures)
    # Kernels cannot be sent to another process, but a forked one has them.
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        return dict(pool.map(_row, range(len(_JOBS))))


_JOBS: list[tuple[Variant, int]] = []


def _row(number: int) -> tuple[str, dict[str, Any]]:
    variant, architecture = _JOBS[number]
    facts = {"matrix": variant.matrix, "pipelined": variant.pipelined}
    return f"{variant.name}, sm_{architecture}", {**compiled(variant, architecture), **facts}


def main() -> None:
    """Prints or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    rows = table(arguments.only)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    text = f'{{\n "triton": {json.dumps(triton.__version__)},\n "rows": {{\n{lines}\n }}\n}}\n'
    if arguments.write:
        TABLE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
