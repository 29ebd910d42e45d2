"""Which devices and dtypes this build computes on here, and why not on the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from .errors import InputError

IMPLEMENTATIONS = {
    "activation_patterns": ("cpp", "cuda"),
    "gradient_moments": ("cpp", "triton", "cuda"),
    "channel_saliency": ("cpp", "torch"),
    "relative_attention": ("cpp", "triton", "torch"),
    "layer_norm": ("triton", "torch"),
    "gelu": ("triton", "torch"),
}
"""Of each op: C++ for the CPU, CUDA C++, Triton, torch's operations for any device. The first that fits is taken.

The CUDA C++ of gradient moments is for some weights on Hopper GPUs alone; Triton takes the others.
"""

_preferred: ContextVar[str | None] = ContextVar("_preferred", default=None)


@dataclass(frozen=True)
class Backend:
    """One way to compute scores: its name, whether it works here, and the reason or the details."""

    name: str
    available: bool
    detail: str


def backends() -> tuple[Backend, ...]:
    """Returns every backend with its state on this machine, in order of preference."""
    return (_cuda(), _cpu())


def resolve_device(device: str) -> str:
    """Returns the device that `device` ("auto", "cpu", "cuda", "cuda:1") means here; raises InputError if none."""
    if device == "auto":
        return next(b.name for b in backends() if b.available)
    kind, _, index = device.partition(":")
    for backend in backends():
        if kind == backend.name and (index.isdigit() or device == kind):
            if not backend.available:
                raise InputError(f"device {device!r} cannot be used: {backend.detail}; pass device='cpu'")
            return kind if kind == "cpu" else device
    raise InputError(f"device must be auto or one of {', '.join(b.name for b in backends())}, got {device!r}")


def resolve_dtype(dtype: str, device: str) -> str:
    """Returns the dtype that `dtype` means on `device`: "auto" is bfloat16 with bf16 matrix instructions."""
    if dtype != "auto":
        return dtype
    from . import _C

    # Every CUDA device that the kernels run on (compute capability 8.0 or newer) has them.
    return "bfloat16" if device != "cpu" or _C.cpu_has_bf16() else "float32"


@contextmanager
def preferring(name: str) -> Iterator[None]:
    """Inside, `implementation` prefers this one to that of LSWAG_BACKEND: torch's can be differentiated twice."""
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def implementation(op: str, device: str) -> str | None:
    """Returns which implementation of an op takes tensors on `device` ("cpu", "cuda"); None where none can.

    LSWAG_BACKEND=cpp|cuda|triton|torch, or `preferring`, prefers one wherever an op has it for that device. Triton
    takes CPU tensors under TRITON_INTERPRET=1, and then only where it is preferred. Raises InputError for another name.
    """
    preferred = _preferred.get() or os.environ.get("LSWAG_BACKEND") or "auto"
    interpreted = preferred == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return _implementation(op, device, preferred, interpreted)


@cache
def _implementation(op: str, device: str, preferred: str, interpreted: bool) -> str | None:
    known = sorted({name for names in IMPLEMENTATIONS.values() for name in names})
    if preferred not in ("auto", *known):
        raise InputError(f"LSWAG_BACKEND must be auto or one of {', '.join(known)}, got {preferred!r}")
    devices = {"cpp": ["cpu"], "cuda": ["cuda"], "triton": ["cuda", "cpu"] if interpreted else ["cuda"]}
    fitting = [name for name in IMPLEMENTATIONS[op] if device in devices.get(name, [device])]
    return preferred if preferred in fitting else next(iter(fitting), None)


def _why_no_device(version: str, cuda: str | None) -> str:
    if cuda is None:
        return f"torch {version} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "torch finds no CUDA device" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})")


def _cpu() -> Backend:
    from . import _C

    paths = ", ".join(_C.cpu_paths())
    return Backend("cpu", True, f"instruction set {_C.cpu_path()} in use (this machine has {paths})")


def _cuda() -> Backend:
    import torch

    from . import _C

    if not _C.cuda_kernels():
        return Backend("cuda", False, "this build holds no CUDA kernels")
    if find_spec("triton") is None:
        return Backend("cuda", False, "Triton is not installed; pip install 'lswag-fast[gpu]'")
    if not torch.cuda.is_available():
        return Backend("cuda", False, _why_no_device(torch.__version__, torch.version.cuda))
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return Backend("cuda", False, f"compute capability {major}.{minor}; 8.0 or newer is needed")
    return Backend("cuda", True, torch.cuda.get_device_name())
