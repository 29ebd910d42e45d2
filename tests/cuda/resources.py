"""What every CUDA C++ kernel becomes on sm_80 and sm_90a, compiled ahead of time: no GPU is needed.

Also makes the PTX of compute_80 and compute_90, which newer devices compile for themselves. Prints the table as JSON;
with --write, writes it to resources.json instead, which the tests compare with a fresh one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = ("80", "90a")
PTX_ARCHITECTURES = ("80", "90")
ACTIVATIONS = ("none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish")


def nvcc() -> str | None:
    """Returns the compiler: CUDACXX, else the one on the path, else none."""
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def version() -> str:
    """Returns the compiler's release, such as "13.0"."""
    compiler = nvcc()
    assert compiler is not None, "nvcc is not installed"
    text = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    assert found is not None, text
    return found[1]


def compiled(source: Path, folder: Path) -> str:
    """Compiles a source for every architecture at once and returns what the assembler says of its kernels."""
    compiler = nvcc()
    assert compiler is not None
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in PTX_ARCHITECTURES]
    includes = [f"-I{REPOSITORY / 'csrc' / part}" for part in ("include", "cpu")]
    warnings = ["-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    options = ["-std=c++17", "-O3", "-DLSWAG_ISA=gpu", "--threads=2", "-Xptxas=-v", "-fatbin"]
    output = folder / f"{source.stem}.fatbin"
    command = [compiler, *options, *targets, *includes, *warnings, "-o", str(output), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert output.stat().st_size > 0
    # C7500 and on: products that wait for one another, registers that were not handed over.
    assert "(C75" not in run.stderr + run.stdout, run.stderr
    return run.stderr + run.stdout


def instructions(source: Path, folder: Path) -> list[str] | None:
    """Returns the machine code of a source for sm_90a, a string a kernel; None without a disassembler."""
    compiler, disassembler = nvcc(), shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if disassembler is None and triton is not None and triton.origin is not None:
        disassembler = shutil.which(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if compiler is None or disassembler is None:
        return None
    output = folder / f"{source.stem}.cubin"
    includes = [f"-I{REPOSITORY / 'csrc' / part}" for part in ("include", "cpu")]
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-std=c++17", "-O3", "-DLSWAG_ISA=gpu"]
    subprocess.run([compiler, *target, *includes, "-o", str(output), str(source)], check=True)
    command = [disassembler, "-sass", str(output)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.split(r"\n\s*Function : ", text)[1:]


def demangled(names: list[str]) -> list[str]:
    """Returns the C++ names of symbols, without namespaces and parameters, and with the names of activations."""
    text = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout
    plain = re.sub(r"lswag::(?:cuda::)?(?:\(anonymous namespace\)::)?|void |\(anonymous namespace\)::", "", text)
    plain = re.sub(r"\(Activation\)(\d)", lambda found: ACTIVATIONS[int(found[1])], plain)
    return [re.sub(r"\(\w+\)$", "", line) for line in plain.splitlines()]


def rows(log: str) -> dict[str, dict[str, int]]:
    """Returns the rows of one source, by "kernel, sm_NN"."""
    blocks = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        log,
        re.DOTALL,
    )
    names = demangled([block[0] for block in blocks])
    found = {}
    for name, (_, architecture, stack, stores, loads, registers, rest) in zip(names, blocks, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[f"{name}, {architecture}"] = {
            "registers": int(registers),
            "stack_bytes": int(stack),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared[1]) if shared else 0,
        }
    return found


def table() -> dict[str, Any]:
    """Returns the compiler's release and the rows by "source: kernel, sm_NN"."""
    sources = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        logs = [compiled(source, Path(folder)) for source in sources]
    found = {
        f"{source.stem}: {name}": row
        for source, log in zip(sources, logs, strict=True)
        for name, row in sorted(rows(log).items())
    }
    return {"nvcc": version(), "rows": found}


def main() -> None:
    """Prints or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    made = table()
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in made["rows"].items())
    text = f'{{\n "nvcc": {json.dumps(made["nvcc"])},\n "rows": {{\n{lines}\n }}\n}}\n'
    if parser.parse_args().write:
        TABLE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
