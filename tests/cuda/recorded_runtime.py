"""The bindings and launches of the newest build, linked again on a CUDA runtime that only writes down what is asked.

Objects are those that a device would run; no GPU is needed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from math import prod
from pathlib import Path
from typing import Any

import pytest
from resources import REPOSITORY, demangled, nvcc

RUNTIME = Path(__file__).with_name("runtime_on_host.cpp")
DLPACK_TYPES = {"int64": (0, 64), "float64": (2, 64), "float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}
CUDA = 2  # of DLPack's devices
UNKNOWN = 999  # cudaErrorUnknown
# No program has memory at such an address: the host that looked at an array would end at once.
NOWHERE = 1 << 62


class _Tensor(ctypes.Structure):
    """DLManagedTensor of DLPack 0.8, which has DLTensor first."""

    _fields_ = [
        ("data", ctypes.c_uint64),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class DeviceArray:
    """An array in the memory of a CUDA device, of any size, for nothing is ever read or written there."""

    def __init__(
        self, dtype: str, *shape: int, strides: Sequence[int] | None = None, address: int = NOWHERE, device: int = 1
    ) -> None:
        compact = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        sizes, steps = ((ctypes.c_int64 * len(shape))(*numbers) for numbers in (shape, strides or compact))
        where, kind = (ctypes.c_int32 * 2)(CUDA, device), DLPACK_TYPES[dtype]
        self._device = device
        self._tensor = _Tensor(address, where, len(shape), *kind, 1, sizes, steps, 0, None, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._device

    def __dlpack__(self, *, stream: int, **_: object) -> Any:
        assert stream == -1, "the producer's stream would have to wait for another"
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self._tensor), b"dltensor", None)


@dataclass(frozen=True)
class Launch:
    """A kernel's launch as the runtime was asked for it."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    device: int

    @property
    def name(self) -> str:
        """The kernel without its template arguments."""
        return self.kernel.partition("<")[0]


class RecordedRuntime:
    """`module` has the functions of lswag_fast._C, and here is what they asked the CUDA runtime for."""

    def __init__(self, library: Path) -> None:
        specification = importlib.util.spec_from_file_location("recorded._C", library)
        assert specification is not None
        assert specification.loader is not None
        self.module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(self.module)
        self._runtime = ctypes.CDLL(str(library))
        self._runtime.recorded_calls.restype = ctypes.c_char_p

    def start(self, failing_call: int = -1, failure: int = UNKNOWN) -> None:
        """Forgets what was written down; the call of that number from here on fails, with this cudaError_t."""
        self._runtime.start_recording(failing_call, failure)

    def pose(self, capability: tuple[int, int], multiprocessors: int = 132, static_shared_bytes: int = 1024) -> None:
        """Poses as such devices, with kernels of so much static shared memory."""
        self._runtime.set_device(*capability, multiprocessors, static_shared_bytes)

    def calls(self) -> list[dict[str, Any]]:
        """Returns the calls that can fail, in order, by `call` and what they were given."""
        found: list[dict[str, Any]] = json.loads(self._runtime.recorded_calls())
        return [call | {"kernel": _name(call["kernel"])} if "kernel" in call else call for call in found]

    def launches(self) -> list[Launch]:
        """Returns the launches among the calls."""
        rows = [call for call in self.calls() if call.pop("call") == "launch"]
        return [Launch(**row | {"grid": tuple(row["grid"]), "block": tuple(row["block"])}) for row in rows]

    def current_device(self) -> int:
        """Returns the current device, which calls leave as it was."""
        number: int = self._runtime.current_device()
        return number


@cache
def _name(symbol: str) -> str:
    return demangled([symbol])[0]


def newest_build() -> Path:
    """Returns the folder of object folders of this Python's newest build, or skips where there is none for CUDA."""
    if nvcc() is None:
        pytest.skip("nvcc is not installed")
    modules = sorted((REPOSITORY / "build").glob(f"*/_C{EXTENSION_SUFFIXES[0]}"), key=lambda path: path.stat().st_mtime)
    if not modules:
        pytest.skip("no build tree of this Python beneath build/ (an editable install leaves one)")
    folder = modules[-1].parent / "CMakeFiles"
    if not any(folder.glob("lswag_cuda.dir/**/*.o")):
        pytest.skip(f"{modules[-1].relative_to(REPOSITORY)} holds no CUDA kernels")
    return folder


def linked(build: Path, folder: Path) -> Path:
    """Links the objects of a build with the recording runtime, where the CUDA runtime would be, into `folder`."""
    objects = [str(path) for name in ("_C.dir", "lswag_*.dir") for path in build.glob(f"{name}/**/*.o")]
    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", (build.parent / "CMakeCache.txt").read_text(), re.MULTILINE)
    assert compiler is not None
    library = folder / "_C.so"
    # Symbolic: torch may have brought the CUDA runtime's functions, and what is global is found first.
    options = ["-std=c++17", "-shared", "-cudart=none", "-Xlinker=-Bsymbolic"]
    options += ["-Xcompiler=-fPIC,-fopenmp,-Wall,-Wextra,-Werror"]
    command = [str(nvcc()), "-ccbin", compiler[1], *options, "-o", str(library), str(RUNTIME), *objects]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return library
