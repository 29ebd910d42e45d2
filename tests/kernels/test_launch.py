"""How a kernel is started once Triton has compiled it, with a driver that only writes down what it is given."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")

import triton

from lswag_fast.kernels import launch
from lswag_fast.kernels.launch import Launch

SCRIPT = Path(__file__).with_name("two_launches.py")


class Compiled:
    function, packed_metadata = 7, ("metadata",)

    def __init__(self, started: list[tuple[object, ...]]) -> None:
        self.run = lambda *given: started.append(given)


class Kernel:
    """A kernel with two pointers, a number and a constant; compiled by its first call, like one of triton.jit."""

    arg_names = ("source", "target", "count", "BLOCK")

    def __init__(self, *, interpreted: bool = False) -> None:
        self.interpreted = interpreted
        self.calls: list[tuple[object, ...]] = []
        self.started: list[tuple[object, ...]] = []

    def __getitem__(self, grid):
        def call(*tensors, **arguments):
            self.calls.append((grid, tensors, arguments))
            if self.interpreted:
                return None
            compiled = Compiled(self.started)
            self.compiled = weakref.ref(compiled)
            return compiled

        return call


@pytest.fixture
def current(monkeypatch):
    """The current device, as the driver tells it."""
    device = {"number": 0}
    stand_in = SimpleNamespace(
        active=SimpleNamespace(
            get_current_device=lambda: device["number"], get_current_stream=lambda number: 100 + number
        )
    )
    monkeypatch.setattr(launch, "driver", stand_in)
    return device


def made(kernel, device="cpu"):
    return Launch(kernel, torch.device(device), {"BLOCK": 64, "num_warps": 4, "count": 9}, programs=5)


def test_the_first_launch_is_tritons_and_the_others_are_direct(current):
    kernel, (a, b, c, d) = Kernel(), torch.zeros(4, 16)
    start = made(kernel)
    start(a, b)
    start(c, d)
    start(b, a)
    assert kernel.calls == [((5, 1), (a, b), {"BLOCK": 64, "num_warps": 4, "count": 9, "enable_fp_fusion": True})]
    fixed = (5, 1, 1, 100, 7, ("metadata",), None, None, None)
    # Numbers and constants follow the pointers in the order of the kernel's signature.
    assert kernel.started == [
        (*fixed, c.data_ptr(), d.data_ptr(), 9, 64),
        (*fixed, b.data_ptr(), a.data_ptr(), 9, 64),
    ]


def test_a_tensor_that_is_not_there_stays_none(current):
    kernel, (a, b) = Kernel(), torch.zeros(2, 16)
    start = made(kernel)
    start(None, a)
    start(None, b)
    assert kernel.started[0][-4:] == (None, b.data_ptr(), 9, 64)


def test_pointers_that_are_not_aligned_are_tritons(current):
    kernel, (a, b, c) = Kernel(), torch.zeros(3, 16)
    start = made(kernel)
    start(a[1:], b)  # what this compiles is for pointers of any kind, and is not kept
    start(a, b)
    assert not kernel.started
    start(a, c[1:])
    assert not kernel.started
    assert len(kernel.calls) == 3
    start(b, c)
    assert len(kernel.started) == 1


def test_interpreted_and_watched_launches_are_tritons(current, monkeypatch):
    a, b = torch.zeros(2, 16)
    interpreted, watched = Kernel(interpreted=True), Kernel()
    for kernel in (interpreted, watched):
        start = made(kernel)
        start(a, b)
        with monkeypatch.context() as context:
            if kernel is watched:
                context.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
            start(a, b)
        assert len(kernel.calls) == 2
        assert not kernel.started
    start(a, b)
    assert len(watched.started) == 1


def test_another_current_device_is_left_to_triton(current, monkeypatch):
    switched = []
    monkeypatch.setattr(launch, "on", lambda device: switched.append(device) or torch.no_grad())
    kernel, (a, b) = Kernel(), torch.zeros(2, 16)
    start = made(kernel, "cuda:1")
    start(a, b)
    start(a, b)
    assert switched == [torch.device("cuda:1")] * 2
    assert not kernel.started
    current["number"] = 1
    start(a, b)
    assert kernel.started[0][3] == 101


def test_grids_and_numbers_may_differ(current):
    kernel, (a, b) = Kernel(), torch.zeros(2, 16)
    launch = Launch(kernel, torch.device("cpu"), {"BLOCK": 64})
    launch.start((2, 3), (a, b), (1,))
    launch.start((4, 5), (b, a), (6,))
    assert kernel.calls == [((2, 3), (a, b, 1), {"BLOCK": 64, "enable_fp_fusion": True})]
    assert kernel.started == [(4, 5, 1, 100, 7, ("metadata",), None, None, None, b.data_ptr(), a.data_ptr(), 6, 64)]


def test_a_compiled_kernel_lives_as_long_as_its_launch(current):
    kernel, (a, b) = Kernel(), torch.zeros(2, 16)
    start = made(kernel)
    start(a, b)
    gc.collect()
    assert kernel.compiled() is not None
    del start
    gc.collect()
    assert kernel.compiled() is None


def test_tritons_launcher_is_given_what_triton_gives_it(tmp_path):
    """Whatever Triton is installed, in a process that does not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert "FP_FUSION" not in run.stderr  # nor is the user told of an option that is not the user's
    tritons, ours = map(json.loads, run.stdout.splitlines())
    where = [3, 2, 1, 100, 7]
    assert ours[:6] == tritons[:6] == [*where, tritons[5]]
    # In place of what a profiler is told, and of its hooks.
    assert ours[6:9] == [None] * 3
    assert tritons[9:] == [{"tensor": ours[9]}, None, {"tensor": ours[11]}, 9, 200, 64]
    assert ours[10:] == [None, ours[11], 9, 200, 64]
