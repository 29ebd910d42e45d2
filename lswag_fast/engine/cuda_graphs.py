"""Captures of launches as CUDA graphs."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import ClassVar

import torch

from ..errors import InputError
from .static_memory import Replay

STREAMS = 32
"""That torch hands out in turn, again and again."""


class CudaGraphs:
    """Captures work on a device as CUDA graphs, which share the memory that they need while they run.

    They may run in any order, but one after the other, on one stream, and go all together: when a graph goes, torch
    (some versions: pytorch/pytorch#193402) frees the workspace of the matrix products that were captured on the same
    stream, so no two objects of this class share one, either.
    """

    _by_stream: ClassVar[weakref.WeakValueDictionary[int, CudaGraphs]] = weakref.WeakValueDictionary()

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._by_stream[stream.cuda_stream] = self

    @classmethod
    def on(cls, device: torch.device) -> CudaGraphs | None:
        """Returns a new one; None: there is no CUDA device, or every stream is another's."""
        if device.type != "cuda":
            return None
        for _ in range(STREAMS):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if stream.cuda_stream not in cls._by_stream:
                return cls(stream)
        return None

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Returns the launch of what work launches, which runs it later; RuntimeError where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), _no_collection():
            # Other threads may do as they like meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # of a capture that has failed
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay


def captures_on(device: torch.device) -> Callable[[], CudaGraphs | None]:
    """Returns what makes CudaGraphs on a device, or, where LSWAG_CUDA_GRAPHS is off, none.

    Raises InputError where LSWAG_CUDA_GRAPHS is neither on nor off.
    """
    wanted = os.environ.get("LSWAG_CUDA_GRAPHS") or "on"
    if wanted not in ("on", "off"):
        raise InputError(f"LSWAG_CUDA_GRAPHS must be on or off, got {wanted!r}")
    return partial(CudaGraphs.on, device) if wanted == "on" else no_captures


def no_captures() -> None:
    """Gives nothing that captures launches."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps garbage: a graph that is collected while another is captured would spoil it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
