"""What the host does to start the score of a middle AutoFormer candidate, measured without a GPU.

A device computes AutoFormer-Tiny's middle candidate in 1.3 to 3 ms, so a host that takes longer to start it sets the
pace. Here nothing runs on a device: tensors lie on the CPU, kernels are compiled for compute capability 9.0 and their
launches are counted only, library products give empty tensors, and packing and counting of patterns only exchange
theirs. What is left is the time of Python, of torch's allocations and views, and of launches up to the driver.

The time is that of the thread, the fastest of all rounds; both ways take turns, since processors are shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import measure
import pytest
import torch
import torch.nn.functional as F
from conftest import Show
from gpu_cases import MIDDLE
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lswag_fast import _C, backends, images, spaces
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.engine.cuda_graphs import no_captures
from lswag_fast.options import ScoreOptions

triton = pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")
if torch.cuda.is_available():
    pytest.skip("make bench-gpu times launches where there is a device", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from lswag_fast.kernels import gradient_moments_launch  # noqa: E402

SAMPLES = 2
ROUNDS = 200


class Device:
    """Stands in for Triton's driver of an H100 or H200, and counts what is launched."""

    launches = graphs = 0

    def launch_graph(self) -> None:
        self.graphs += 1

    def launcher_cls(self, *_: Any) -> Any:
        return self._launch

    def _launch(self, *_: Any) -> None:
        self.launches += 1

    @property
    def utils(self) -> Device:
        return self

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return (1, 1, 100, 0, 1024)

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


DEVICE = Device()  # kernels once compiled keep it


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    implementation = backends.implementation

    def on_device(op: str, kind: str) -> str | None:
        return "triton" if "triton" in backends.IMPLEMENTATIONS[op] else implementation(op, kind)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(*a.shape[:-1], b.shape[-1])

    def linear(x: Tensor, weight: Tensor, _: Tensor | None = None) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def addmm(*_: Tensor, out: Tensor) -> Tensor:
        return out

    def exchanged(*given: Any) -> tuple[int, list[int]]:
        tensors = [t for argument in given for t in (argument if isinstance(argument, list) else [argument])]
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                tensor.__dlpack__(max_version=(1, 0))
        return 0, []

    monkeypatch.setattr(backends, "implementation", on_device)
    monkeypatch.setattr(_C, "pack_signs", exchanged)
    monkeypatch.setattr(_C, "count_patterns_by_tags", exchanged)
    monkeypatch.setattr(gradient_moments_launch, "architecture_of", lambda _: 90)
    monkeypatch.setattr(torch, "matmul", product)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(F, "linear", linear)
    driver.set_active(DEVICE)
    return DEVICE


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Stands in for the capture of a CUDA graph, whose launch costs the host some microseconds more."""
    work()
    return DEVICE.launch_graph


@pytest.mark.parametrize("name", ["autoformer-tiny", "autoformer-small"])
def test_launch(benchmark: BenchmarkFixture, device: Device, show: Show, name: str) -> None:
    torch.set_num_threads(1)
    space = spaces.get(name, image_size=32, patch_size=16, num_classes=10)
    batch = images.load("noise", SAMPLES, image_size=32, seed=0, num_classes=10)
    given = (space.supernet(seed=0), batch.images, batch.labels, None)
    options = ScoreOptions(dtype="bfloat16", device="cpu").resolved(SAMPLES)
    captures = {"kernel by kernel": no_captures, "blocks as CUDA graphs": lambda: captured}
    engines = {how: AutoFormerEngine(*given, options, captures=made) for how, made in captures.items()}
    arch = space.canonical(MIDDLE[name])
    found: dict[str, dict[str, Any]] = {}
    for how, engine in engines.items():
        for _ in range(4):
            device.launches = device.graphs = 0
            engine.launch(arch)
        found[how] = {"launches_by_triton": device.launches, "graphs": device.graphs, "seconds": []}

    def launch_each() -> None:
        for how, engine in engines.items():
            start = time.thread_time()
            engine.launch(arch)
            found[how]["seconds"].append(time.thread_time() - start)

    benchmark.pedantic(launch_each, rounds=ROUNDS)
    for row in found.values():
        seconds = row.pop("seconds")
        row |= {"fastest_seconds": min(seconds), "median_seconds": median(seconds)}
    path = measure.write("cpu", f"host-launch-{name}", {"arch": arch, "rounds": ROUNDS, "launches": found})
    rows = [
        [
            how,
            *(f"{1e3 * r[f'{which}_seconds']:.2f}" for which in ("fastest", "median")),
            *map(str, list(r.values())[:2]),
        ]
        for how, r in found.items()
    ]
    title = f"launch of the middle candidate of {name} ({path.name})"
    show(title, ["", "fastest ms", "median ms", "by Triton", "graphs"], rows)
