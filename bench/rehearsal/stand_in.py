"""The stand-in for CUDA: what it needs, how it is built, which processes have it, and what it counted in this one."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).with_name("stand_in")
PROCESS = Path(__file__).with_name("process")
CUDA = 13
"""The major version whose headers the sources are written for."""


def missing() -> Iterator[str]:
    """Yields what a rehearsal lacks here, a sentence each."""
    if find_spec("torch") is None:
        yield "PyTorch is not installed"
    else:
        import torch

        if torch.version.cuda is None:
            yield f"torch {torch.__version__} is built without CUDA: a CUDA {CUDA} build is needed, and no GPU"
        elif int(torch.version.cuda.split(".")[0]) != CUDA:
            yield f"torch {torch.__version__} is built for CUDA {torch.version.cuda}: {CUDA} is needed"
    for name in ("triton", "pytest", "scikit_build_core", "pybind11"):
        if find_spec(name) is None:
            yield f"{name} is not installed"
    if compiler() is None:
        yield "no C++ compiler is on the path (CXX names one)"
    release = _nvcc_release()
    if release is None:
        yield "nvcc is not on the path (CUDACXX names one)"
    elif release != CUDA:
        yield f"nvcc is of CUDA {release}: {CUDA} is needed"
    elif toolkit() is None:
        yield "nvcc's headers are not beside it"
    elif not headers():
        yield "cublas_v2.h and cublasLt.h are neither beside nvcc nor among torch's packages"


def compiler() -> str | None:
    """Returns the C++ compiler."""
    return shutil.which(os.environ.get("CXX") or "c++")


def toolkit() -> Path | None:
    """Returns the folder of nvcc's headers."""
    nvcc = _nvcc()
    if nvcc is None:
        return None
    # nvcc says where it lies as "#$ _HERE_=...", wherever a link to it does.
    run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    here = re.search(r"^#\$ _HERE_=(.+)$", run.stderr, re.MULTILINE)
    folder = None if here is None else Path(here[1]).parent / "include"
    return folder if folder is not None and (folder / "cuda_runtime_api.h").exists() else None


def headers() -> list[Path]:
    """Returns the folders of CUDA's headers, nvcc's own first; none where cuBLAS's are in neither."""
    packages = find_spec("nvidia")
    places = [] if packages is None else list(packages.submodule_search_locations or ())
    folders = [toolkit(), *(Path(place) / f"cu{CUDA}" / "include" for place in places)]
    found = [folder for folder in folders if folder is not None and folder.exists()]
    return found if any((folder / "cublas_v2.h").exists() for folder in found) else []


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def build(folder: Path) -> Path:
    """Compiles the stand-in where it is older than its sources, and returns the library."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in SOURCES.iterdir()):
        # By this name it is the driver that is looked for.
        compile_into(library, sources(), headers(), f"-Wl,-soname,{library.name}")
    checker = folder / "compute-sanitizer"
    checker.write_text('#!/bin/sh\n# Runs a command without a look at its memory.\nshift 2\nexec "$@"\n')
    checker.chmod(0o755)
    return library


def compile_into(library: Path, files: Sequence[Path], folders: Sequence[Path], *further: str) -> None:
    """Compiles sources with the headers of folders, the first of which come before those of the others."""
    first, *others = folders
    # Torch's packages lack headers that their own include.
    options = [f"-isystem{first}", *(f"-idirafter{other}" for other in others)]
    options += ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *further]
    subprocess.run([str(compiler()), *options, "-o", str(library), *map(str, files), "-ldl"], check=True)


def environment(library: Path, illegal: Path) -> dict[str, str]:
    """Returns the environment of processes that find the stand-in for CUDA.

    The library comes before all others, as the CUDA runtime, cuBLAS and the driver. Illegal calls go to a file.
    """
    given = os.environ
    search = [str(PROCESS), str(PROCESS.parent), str(PROCESS.parents[1]), given.get("PYTHONPATH", "")]
    return {
        **given,
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "PATH": os.pathsep.join([str(library.parent), given["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "PYTEST_ADDOPTS": "--assert=plain -p unjudged",
        "REHEARSAL_ILLEGAL": str(illegal),
    }


def counted(call: Callable[[], Any]) -> dict[str, Any]:
    """Returns what a call gave the device to do, asked of it and waited for, with examples of each."""
    library = _library()
    library.rehearsal_reset()
    call()
    found: dict[str, Any] = json.loads(library.rehearsal_counts())
    return found


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")  # which is loaded
    library.rehearsal_counts.restype = ctypes.c_char_p
    return library


def _nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def _nvcc_release() -> int | None:
    nvcc = _nvcc()
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)", text)
    return None if found is None else int(found[1])
