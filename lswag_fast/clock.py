"""Where the time of a score goes, by label."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Measures labelled stretches of work; a stretch inside another is taken out of the outer one.

    On a CUDA device stretches are those of its current stream, by events, and nothing waits before `seconds`, which
    waits for the last of them. One that is not `running` costs and measures nothing.
    """

    def __init__(self, device: str, *, running: bool = True) -> None:
        self.running = running
        """Whether it measures."""
        self._device = torch.device(device)
        self.device = self._device.type
        """The type of the device, "cpu" or "cuda"."""
        self._cuda = self.device == "cuda"
        self._labels = [""]
        self._marks: list[tuple[str, Any]] = []
        self._on_host: defaultdict[str, float] = defaultdict(float)

    def __call__(self, label: str) -> AbstractContextManager[None]:
        """Counts what runs inside under `label`."""
        return self._stretch(label) if self.running else nullcontext()

    def on_host(self, label: str) -> AbstractContextManager[None]:
        """Counts what the host alone does inside, while a device may be at other work already."""
        return self._stretch_on_host(label) if self.running and self._cuda else self(label)

    @contextmanager
    def _stretch_on_host(self, label: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._on_host[label] += time.perf_counter() - began

    @contextmanager
    def _stretch(self, label: str) -> Iterator[None]:
        self._labels.append(label)
        self._mark()
        try:
            yield
        finally:
            self._labels.pop()
            self._mark()

    def seconds(self) -> Mapping[str, float]:
        """Returns the seconds of every label so far, 0 for one that never came; waits for a CUDA device."""
        if self._cuda and self._marks and not self._marks[-1][1].query():
            self._marks[-1][1].synchronize()
        found = self._on_host.copy()
        for (label, begin), (_, end) in pairwise(self._marks):
            found[label] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        return found

    def _mark(self) -> None:
        if not self._cuda:
            self._marks.append((self._labels[-1], time.perf_counter()))
            return
        with torch.cuda.device(self._device):  # whichever is current: the backward pass has a thread of its own
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._marks.append((self._labels[-1], event))
