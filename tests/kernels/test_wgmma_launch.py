"""Whole launches with the CUDA C++ kernel in them: it runs as tests/cuda emulates it, the Triton kernels interpreted.

No GPU is needed.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lswag_fast import _C, reference
from lswag_fast.kernels.gradient_moments_launch import Placed, launch
from lswag_fast.kernels.gradient_moments_layout import WGMMA, Weight, layout_of

REPOSITORY = Path(__file__).resolve().parents[2]
POINTERS = ("problems", "uses", "ends", "magnitudes", "partials")
NUMBERS = ("problem_count", "first_tile", "end_tile")


class Task(ctypes.Structure):
    """GroupedMoments of csrc/include/lswag/gradient_moments_cuda.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int) for name in NUMBERS]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    if torch.cuda.is_available():
        pytest.skip("here the kernel itself runs, in test_wgmma_moments_on_device.py")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("host") / "moments_on_host.so"
    includes = [f"-I{REPOSITORY / 'csrc' / part}" for part in ("include", "cpu", "cuda")]
    source = REPOSITORY / "tests" / "cuda" / "moments_on_host.cpp"
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-DLSWAG_ISA=host", "-x", "c++"]
    subprocess.run([compiler, *options, *includes, str(source), "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).moments_on_host

    def grouped_moments(*arguments: Any) -> None:
        *tensors, problem_count, first_tile, end_tile, half, stream = arguments
        assert [t.dtype for t in tensors] == [torch.int64] * 4 + [torch.float64]
        assert stream == 7
        task = Task(*(t.data_ptr() for t in tensors), problem_count, first_tile, end_tile)
        run(ctypes.byref(task), int(half), 3)

    return grouped_moments


@pytest.fixture(autouse=True)
def kernels(device: torch.device, emulated: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cuda_grouped_moments", emulated)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def line(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).unsqueeze(2)


def test_a_launch_of_both_kinds_holds_to_the_definition() -> None:
    half, bf16, single = torch.float16, torch.bfloat16, torch.float32
    taken = [(136, 72, bf16), (24, 200, half), (8, 136, bf16)]
    left = [(40, 36, bf16), (16, 24, single), (20, 12, half)]
    weights, wanted = [], []
    for n, (out, width, dtype) in enumerate(shape for pair in zip(taken, left, strict=True) for shape in pair):
        a, d = normal(n, 4, 20, width).to(dtype), (normal(n + 9, 4, 20, out) * 1e-3).to(dtype)
        layout = layout_of(Weight([line(a)], [line(d)], 4), 0, wgmma=True)
        assert (layout.form.kernel is WGMMA) == (n % 2 == 0)
        weights.append(Placed(layout, [line(a), line(d)]))
        wanted.append(reference.gradient_moments(a, d, 4))
    rows = launch(weights, every_element=True).results
    for row, moments in zip(rows, wanted, strict=True):
        scale = 2.0 ** row[5].item()
        assert row[0] == (~moments.dead).sum()
        assert row[1].item() * scale == pytest.approx((1 / moments.sigma).sum().item(), rel=1e-4)
        assert row[3].item() / scale == pytest.approx(moments.sigma.sum().item(), rel=1e-5)
        assert row[4].item() / scale == pytest.approx(moments.mean_abs.sum().item(), rel=1e-5)


def test_bits_depend_on_nothing_else_in_the_launch() -> None:
    weights = []
    for n, (out, width) in enumerate([(136, 72), (40, 36), (264, 8), (8, 200)]):
        a, d = normal(n, 4, 20, width).bfloat16(), normal(n + 9, 4, 20, out).bfloat16()
        layout = layout_of(Weight([line(a)], [line(d)], 4), 0, wgmma=True)
        weights.append(Placed(layout, [line(a), line(d)]))
    together = launch(weights).results
    for row, weight in zip(together, weights, strict=True):
        assert torch.equal(launch([weight]).results[0], row)
    assert torch.equal(launch(weights[::-1]).results.flip(0), together)
