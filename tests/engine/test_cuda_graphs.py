"""How launches are captured, with stand-ins for torch's streams and graphs: tests on a device use torch's own."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lswag_fast.engine.cuda_graphs import STREAMS, CudaGraphs, captures_on
from lswag_fast.errors import InputError

CUDA = torch.device("cuda")


class Graph:
    """Notes what is done to it."""

    made: list[Graph]

    def __init__(self) -> None:
        self.done: list[str] = []
        self.made.append(self)

    def capture_begin(self, **_: Any) -> None:
        self.done.append("begin")

    def capture_end(self) -> None:
        self.done.append("end")
        if "fail" in self.done:
            raise RuntimeError("the capture was invalidated")

    def replay(self) -> None:
        self.done.append("replay")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    Graph.made = []
    handles = cycle(range(STREAMS))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=next(handles)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)


def test_no_two_share_a_stream() -> None:
    alive = [CudaGraphs.on(CUDA) for _ in range(STREAMS)]
    assert len({graphs._stream.cuda_stream for graphs in alive}) == STREAMS
    assert CudaGraphs.on(CUDA) is None
    freed = alive.pop(7)._stream.cuda_stream
    gc.collect()
    assert CudaGraphs.on(CUDA)._stream.cuda_stream == freed


def test_work_is_captured_without_garbage_being_collected() -> None:
    collects = []
    replay = CudaGraphs.on(CUDA)(lambda: collects.append(gc.isenabled()))
    assert collects == [False]
    assert gc.isenabled()
    replay()
    assert Graph.made[0].done == ["begin", "end", "replay"]


def test_a_capture_that_fails_is_ended_and_tells_the_first_error() -> None:
    def fail() -> None:
        Graph.made[0].done.append("fail")
        raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="operation not permitted"):
        CudaGraphs.on(CUDA)(fail)
    assert Graph.made[0].done == ["begin", "fail", "end"]
    assert gc.isenabled()


@pytest.mark.parametrize(("wanted", "captures"), [("", True), ("on", True), ("off", False)])
def test_the_variable_says_whether(wanted: str, captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSWAG_CUDA_GRAPHS", wanted)
    assert (captures_on(CUDA)() is not None) is captures
    assert captures_on(torch.device("cpu"))() is None


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSWAG_CUDA_GRAPHS", "never")
    with pytest.raises(InputError, match="LSWAG_CUDA_GRAPHS must be on or off, got 'never'"):
        captures_on(CUDA)
