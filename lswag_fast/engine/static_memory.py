"""Where the segments of a pass put their results: in new memory, or in static memory, as CUDA graphs need it.

Candidates of a space take the same few choices block by block, but hardly ever the same ones in all blocks, so it is
segments (a block forward, a block backward) that come again. What a segment reads and writes lies in the same place
whenever it does: it is run twice, captured the third time, and from then on a launch is all that the host does for it.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import is_out_of_memory
from ..memory import Empty

RUNS_BEFORE_CAPTURE = 2
"""A capture costs a few times what it saves once, and needs kernels that are loaded."""

Result = TypeVar("Result")
Emit = Callable[..., None]
"""Takes what a segment hands over beside its result, whenever it has run."""
Work = Callable[[Empty, Emit], Result]
"""A segment: puts its results into an Empty, and may hand some over. It may be run again on the same inputs."""
Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
"""Takes down what work launches, and returns what launches it again at once; RuntimeError where it cannot."""


class Memory(Protocol):
    """Runs segments, and decides where their results lie."""

    def run(
        self, place: Hashable, choice: Hashable, inputs: Sequence[Tensor], work: Work[Result], emit: Emit
    ) -> Result:
        """Returns the result of a segment.

        Args:
            place: of which there is one in a pass.
            choice: everything that changes what the segment does there, the addresses of `inputs` aside.
            inputs: the tensors it reads that other segments have written.
            work: the segment.
            emit: gets what the segment hands over.
        """
        ...

    def placed(self, place: Hashable, tensor: Tensor) -> Tensor:
        """Returns a tensor that was made outside every segment where segments find it again."""
        ...


class NewMemory:
    """Runs every segment as it comes; what nobody holds any more is free at once."""

    def run(
        self, place: Hashable, choice: Hashable, inputs: Sequence[Tensor], work: Work[Result], emit: Emit
    ) -> Result:
        """Runs the segment, which hands over as it goes."""
        return work(torch.empty, emit)

    def placed(self, place: Hashable, tensor: Tensor) -> Tensor:
        """Returns the tensor."""
        return tensor


class Borrower(Protocol):
    """Somebody who reads what a pass has left, until he has finished or is gone."""

    finished: bool


class StaticMemory:
    """Memory in which one pass after another lies, every place of it where it was before.

    A place keeps what its largest segment took: where the largest pass is run first, the others take no more.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture: Capture | None = capture
        self._buffers: dict[Hashable, _Buffers] = {}
        self._segments: dict[Hashable, _Segment] = {}
        self._borrower: weakref.ref[Borrower] | None = None
        self.aside: Callable[[], AbstractContextManager[object]] = nullcontext
        """Makes a context for captures, whose time is not that of the segment."""

    @property
    def is_free(self) -> bool:
        """Whether nobody reads any more what lies here."""
        borrower = None if self._borrower is None else self._borrower()
        return borrower is None or borrower.finished

    @property
    def buffers(self) -> list[Tensor]:
        """All that was taken so far, uint8."""
        return [buffer for place in self._buffers.values() for buffer in place.taken]

    @property
    def captured_share(self) -> float:
        """How many of the segments that have come up are launched as captured, from 0 to 1."""
        return sum(s.replay is not None for s in self._segments.values()) / max(1, len(self._segments))

    def lend(self, borrower: Borrower) -> None:
        """Keeps what lies here for somebody; `is_free` tells when it may be written over."""
        self._borrower = weakref.ref(borrower)

    def holds(self, tensor: Tensor) -> bool:
        """Tells whether a tensor lies here."""
        at = tensor.data_ptr()
        return any(buffer.data_ptr() <= at < buffer.data_ptr() + buffer.numel() for buffer in self.buffers)

    def run(
        self, place: Hashable, choice: Hashable, inputs: Sequence[Tensor], work: Work[Result], emit: Emit
    ) -> Result:
        """Runs the segment, or launches it as it was captured, and hands over when it is through."""
        segment = self._segments.setdefault((place, choice, *(t.data_ptr() for t in inputs)), _Segment())
        buffers = self._buffers_of(place)
        if segment.replay is None and segment.runs >= RUNS_BEFORE_CAPTURE:
            self._try_to_capture(segment, buffers, work)
        if segment.replay is None:
            segment.run(buffers, work)
        else:
            segment.replay()
        for arguments in segment.emitted:
            emit(*arguments)
        result: Result = segment.result
        return result

    def placed(self, place: Hashable, tensor: Tensor) -> Tensor:
        """Returns a copy that lies here."""
        buffers = self._buffers_of(place)
        buffers.begin_again()
        return buffers(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    def _buffers_of(self, place: Hashable) -> _Buffers:
        return self._buffers.setdefault(place, _Buffers())

    def _try_to_capture(self, segment: _Segment, buffers: _Buffers, work: Work[Any]) -> None:
        if self._capture is None:
            return
        try:
            with self.aside():
                segment.replay = self._capture(lambda: segment.run(buffers, work))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            warnings.warn(f"launches are not captured as CUDA graphs: {reason}", stacklevel=2)
            self._capture = None
            for captured in self._segments.values():
                captured.replay = None  # the failed graph may take with it what the others read


@dataclass
class _Segment:
    """What is known of one segment on inputs at certain addresses."""

    result: Any = None
    emitted: Sequence[tuple[Any, ...]] = ()
    replay: Replay | None = None
    runs: int = 0

    def run(self, buffers: _Buffers, work: Work[Any]) -> None:
        emitted: list[tuple[Any, ...]] = []
        buffers.begin_again()
        self.result = work(buffers, lambda *arguments: emitted.append(arguments))
        self.emitted = emitted
        self.runs += 1


class _Buffers:
    """Hands out its buffers in order, and makes one where none is left that is large enough.

    So the same requests get the same addresses, whatever came between.
    """

    def __init__(self) -> None:
        self.taken: list[Tensor] = []
        self._next = 0

    def begin_again(self) -> None:
        """Hands out the first buffer next."""
        self._next = 0

    def __call__(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(size) * dtype.itemsize
        while self._next < len(self.taken) and self.taken[self._next].numel() < count:
            self._next += 1
        if self._next == len(self.taken):
            self.taken.append(torch.empty(count, dtype=torch.uint8, device=device))
        buffer = self.taken[self._next]
        self._next += 1
        return buffer[:count].view(dtype).view(size)


class MemoryPool:
    """Static memory for as many passes as are under way at a time.

    Args:
        make: another such memory, or None where passes cannot have one.
        most: passes beyond so many take new memory.
    """

    def __init__(self, make: Callable[[], StaticMemory | None], most: int) -> None:
        self._make = make
        self._most = most
        self.memories: list[StaticMemory] = []

    def find(self) -> StaticMemory | None:
        """Returns memory that a pass may have, lent to nobody; None: it takes new memory."""
        for memory in self.memories:
            if memory.is_free:
                return memory
        if len(self.memories) >= self._most:
            return None
        made = self._make()
        if made is None:
            self._most = len(self.memories)
        else:
            self.memories.append(made)
        return made

    def give_up(self) -> None:
        """Frees all of it as soon as nobody reads it, for there is too little memory; passes take new memory then."""
        self.memories.clear()
        self._most = 0
