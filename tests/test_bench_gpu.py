"""The steps of `make bench-gpu`, run through on the CPU in place of a GPU: their times mean nothing, but no row fails.

Without it, most of these lines would first run on a machine that is lent by the minute.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")
if torch.cuda.is_available():
    pytest.skip("on a CUDA device the steps themselves run", allow_module_level=True)

import float64_ranking
import gpu
import gpu_subject
import gpu_timing
from steps import Rows

from lswag_fast import backends, images, spaces
from lswag_fast.engine import cuda_graphs

SAMPLES, SIDE = 2, 32


class OnTheCpu(TorchFunctionMode):
    """Puts on the CPU whatever is asked for on a CUDA device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = _on_the_cpu(kwargs["device"])
        return func(*map(_on_the_cpu, args), **kwargs)


def _on_the_cpu(given: Any) -> Any:
    is_cuda = isinstance(given, (str, torch.device)) and str(given).startswith("cuda")
    return torch.device("cpu") if is_cuda else given


class Event:
    """A moment of the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.moment = 0.0

    def record(self, stream: Any = None) -> None:
        self.moment = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.moment - self.moment)


def once(call: Callable[[], Any], rounds: int = 1, *, waits: bool = False) -> dict[str, float]:
    """Stands in for `timed`, which runs a call a few times before it measures; the rates are found with `timed`."""
    call()
    return {"seconds": 1.0, "host_seconds": 1.0}


def captured(work: Callable[[], None]) -> Callable[[], None]:
    work()
    return work


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the steps ask of CUDA, and small images, few samples, candidates and rounds."""
    stand_ins = {
        "Event": Event,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "device": lambda device: nullcontext(),
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(backends, "_cuda", lambda: backends.Backend("cuda", True, "a stand-in"))
    monkeypatch.setattr(cuda_graphs.CudaGraphs, "on", lambda device: captured)
    monkeypatch.setattr(torch.profiler, "ProfilerActivity", SimpleNamespace(CPU="CPU", CUDA="CUDA"))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext(SimpleNamespace(key_averages=list)))

    monkeypatch.delenv("TRITON_INTERPRET")  # the CPU's kernels do

    make, load, start, in_turn = spaces.get, images.load, gpu.Subject.__init__, gpu.Subject._in_turn
    read, cases, moments = float64_ranking.read_scores, gpu.cases, gpu.moments_case
    small = {"image_size": SIDE, "num_classes": 10}
    smaller: dict[tuple[Any, str], Any] = {
        (spaces, "get"): lambda name, **sizes: make(name, **{**sizes, **small}),
        (images, "load"): lambda source, samples, **options: load(source, SAMPLES, **{**options, **small}),
        (gpu.Subject, "__init__"): lambda self, name, samples: start(self, name, SAMPLES),
        (gpu.Subject, "_in_turn"): lambda self, engine, archs, most: in_turn(self, engine, islice(archs, 3), most),
        (gpu, "MIDDLE"): {"autoformer-tiny": gpu.MIDDLE["autoformer-tiny"]},
        (gpu, "cases"): lambda arch, samples: cases(arch, SAMPLES),
        (gpu, "moments_case"): lambda arch, samples: moments(arch, SAMPLES, 5),
        (gpu, "depthwise_cases"): lambda samples, of=gpu.depthwise_cases: of(SAMPLES),
        (gpu, "has_wgmma"): lambda device: True,
        (gpu, "CACHE_BYTES"): 1,
        (gpu_timing, "COPY_BYTES"): 2**20,
        (gpu_timing, "PRODUCT"): 64,
        (gpu, "timed"): once,
        (gpu_subject, "timed"): once,
        (float64_ranking, "read_scores"): lambda: (read()[0], read()[1][:3]),
        (float64_ranking, "strata"): lambda archs: {"all": range(len(archs))},
    }
    for (owner, name), value in smaller.items():
        monkeypatch.setattr(owner, name, value)
    with OnTheCpu():
        yield


@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize("name", sorted(gpu.STEPS))
def test_no_row_of_a_step_fails(name: str, tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.json")
    gpu.STEPS[name](rows)
    failed = [text for text in leaves(json.loads(rows.path.read_text())) if str(text).startswith("failed")]
    assert not failed
    assert rows.failed == 0
    assert rows.found["autoformer-tiny"]


def leaves(found: Any) -> Iterator[Any]:
    if not isinstance(found, dict):
        yield found
        return
    for value in found.values():
        yield from leaves(value)
