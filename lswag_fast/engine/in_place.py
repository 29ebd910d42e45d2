"""Where the stretches of a pass put their results: in new memory, or in places that CUDA graphs can write again.

Candidates of a space take the same few choices block by block, but hardly ever the same ones in all blocks, so it is
stretches (a block forward, a block backward) that come again. What a stretch reads and writes lies in the same place
whenever it does: it is run twice, recorded the third time, and from then on a launch is all that the host does for it.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import is_out_of_memory
from ..memory import Empty

RUNS_BEFORE_RECORDING = 2
"""Recording costs a few times what it saves once, and needs kernels that are loaded."""
STREAMS = 32
"""That torch hands out in turn, again and again."""

Result = TypeVar("Result")
Emit = Callable[..., None]
"""Takes what a stretch hands over beside its result, whenever it has run."""
Work = Callable[[Empty, Emit], Result]
"""A stretch: puts its results into an Empty, and may hand some over. It may be run again on the same inputs."""
Replay = Callable[[], None]


class Recorder(Protocol):
    """Records what work launches, so that it can be launched again at once; `CudaGraphs` is one."""

    def __call__(self, work: Callable[[], Result]) -> tuple[Result, Replay]:
        """Returns the result of work, which holds its values only after the replay."""
        ...


class Memory(Protocol):
    """Runs stretches, and decides where their results lie."""

    def run(
        self, place: Hashable, choice: Hashable, inputs: Sequence[Tensor], work: Work[Result], emit: Emit
    ) -> Result:
        """Returns the result of a stretch.

        Args:
            place: of which there is one in a pass.
            choice: everything that changes what the stretch does there, the addresses of `inputs` aside.
            inputs: the tensors it reads that other stretches have written.
            work: the stretch.
            emit: gets what the stretch hands over.
        """
        ...

    def placed(self, place: Hashable, tensor: Tensor) -> Tensor:
        """Returns a tensor that was made outside every stretch where stretches find it again."""
        ...


class NewMemory:
    """Runs every stretch as it comes; what nobody holds any more is free at once."""

    def run(
        self, place: Hashable, choice: Hashable, inputs: Sequence[Tensor], work: Work[Result], emit: Emit
    ) -> Result:
        """Runs the stretch, which hands over as it goes."""
        return work(torch.empty, emit)

    def placed(self, place: Hashable, tensor: Tensor) -> Tensor:
        """Returns the tensor."""
        return tensor


class Borrower(Protocol):
    """Somebody who reads what a pass has left, until he has finished or is gone."""

    finished: bool


class InPlace:
    """Memory in which one pass after another lies, every place of it where it was before.

    A place keeps what its largest stretch took: where the largest pass is run first, the others take no more.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._shelves: dict[Hashable, _Shelf] = {}
        self._stretches: dict[Hashable, _Stretch] = {}
        self._borrower: weakref.ref[Borrower] | None = None

    @property
    def is_free(self) -> bool:
        """Whether nobody reads any more what lies here."""
        borrower = None if self._borrower is None else self._borrower()
        return borrower is None or borrower.finished

    def lend(self, borrower: Borrower) -> None:
        """Keeps what lies here for somebody; `is_free` tells when it may be written over."""
        self._borrower = weakref.ref(borrower)

    def holds(self, tensor: Tensor) -> bool:
        """Tells whether a tensor lies here."""
        return any(shelf.holds(tensor.data_ptr()) for shelf in self._shelves.values())

    def run(
        self, place: Hashable, choice: Hashable, inputs: Sequence[Tensor], work: Work[Result], emit: Emit
    ) -> Result:
        """Runs the stretch, or launches its recording, and hands over when it is through."""
        stretch = self._stretches.setdefault((place, choice, *(t.data_ptr() for t in inputs)), _Stretch())
        shelf = self._shelf(place)
        if stretch.replay is None and stretch.runs >= RUNS_BEFORE_RECORDING:
            self._record(stretch, shelf, work)
        if stretch.replay is None:
            stretch.run(shelf, work)
        else:
            stretch.replay()
        for arguments in stretch.emitted:
            emit(*arguments)
        result: Result = stretch.result
        return result

    def placed(self, place: Hashable, tensor: Tensor) -> Tensor:
        """Returns a copy that lies here."""
        shelf = self._shelf(place)
        shelf.clear()
        return shelf(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    def _shelf(self, place: Hashable) -> _Shelf:
        return self._shelves.setdefault(place, _Shelf())

    def _record(self, stretch: _Stretch, shelf: _Shelf, work: Work[Any]) -> None:
        if self._recorder is None:
            return
        try:
            _, stretch.replay = self._recorder(lambda: stretch.run(shelf, work))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            warnings.warn(f"launches are not recorded as CUDA graphs: {reason}", stacklevel=2)
            self._recorder = None
            for recorded in self._stretches.values():
                recorded.replay = None  # the failed graph may take with it what the others read


@dataclass
class _Stretch:
    """What is known of one stretch on inputs at certain addresses."""

    result: Any = None
    emitted: Sequence[tuple[Any, ...]] = ()
    replay: Replay | None = None
    runs: int = 0

    def run(self, shelf: _Shelf, work: Work[Any]) -> None:
        emitted: list[tuple[Any, ...]] = []
        shelf.clear()
        self.result = work(shelf, lambda *arguments: emitted.append(arguments))
        self.emitted = emitted
        self.runs += 1


class _Shelf:
    """Hands out its buffers in order, and makes one where none is left that is large enough.

    So the same requests get the same addresses, whatever came between.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._next = 0

    def clear(self) -> None:
        """Begins again with the first buffer."""
        self._next = 0

    def holds(self, address: int) -> bool:
        return any(b.data_ptr() <= address < b.data_ptr() + b.numel() for b in self._buffers)

    def __call__(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(size) * dtype.itemsize
        while self._next < len(self._buffers) and self._buffers[self._next].numel() < count:
            self._next += 1
        if self._next == len(self._buffers):
            self._buffers.append(torch.empty(count, dtype=torch.uint8, device=device))
        buffer = self._buffers[self._next]
        self._next += 1
        return buffer[:count].view(dtype).view(size)


class Places:
    """In-place memory for as many passes as are under way at a time.

    Args:
        make: another such memory, or None where passes cannot lie in place.
        most: passes beyond so many get new memory.
    """

    def __init__(self, make: Callable[[], InPlace | None], most: int) -> None:
        self._make = make
        self._most = most
        self._memories: list[InPlace] = []

    def find(self) -> InPlace | None:
        """Returns memory that a pass may have, lent to nobody; None: it takes new memory."""
        for memory in self._memories:
            if memory.is_free:
                return memory
        if len(self._memories) == self._most:
            return None
        made = self._make()
        if made is None:
            self._most = len(self._memories)
        else:
            self._memories.append(made)
        return made

    def give_up(self) -> None:
        """Frees all of it as soon as nobody reads it, for there is too little memory; passes take new memory then."""
        self._memories.clear()
        self._most = 0


class CudaGraphs:
    """Records work on a device as CUDA graphs, which share the memory that they need while they run.

    They may run in any order, but one after the other, on one stream, and go all together: when a graph goes, torch
    (some versions: pytorch/pytorch#193402) frees the workspace of the matrix products that were recorded on the same
    stream, so that no two recorders may share one, either.
    """

    _by_stream: ClassVar[weakref.WeakValueDictionary[int, CudaGraphs]] = weakref.WeakValueDictionary()

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        for _ in range(STREAMS):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if stream.cuda_stream not in self._by_stream:
                break
        else:
            raise RuntimeError(f"{STREAMS} recorders are in use at once, each with a stream of its own")
        self._by_stream[stream.cuda_stream] = self
        self._stream = stream

    def __call__(self, work: Callable[[], Result]) -> tuple[Result, Replay]:
        """Returns the result and the graph's launch; raises RuntimeError where the work cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), _no_collection():
            # Other threads may do as they like meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # of a capture that has failed
                    graph.capture_end()
                raise
            graph.capture_end()
        return result, graph.replay


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
