"""The stand-in for CUDA of bench/rehearsal refuses what CUDA does, and rehearsed tests run to their end. No GPU."""

from __future__ import annotations

import ctypes
import json
import shutil
import threading
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_size_t, c_uint, c_void_p
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import rehearse
import stand_in
import unjudged

ILLEGAL_STATE, INVALID, RESOURCE, CAPTURED_EVENT, CONFIGURATION, MEMORY = 401, 1, 400, 907, 9, 2
UNSUPPORTED, SPOILT, UNJOINED, ISOLATION, IMPLICIT, WRONG_THREAD = 900, 901, 904, 905, 906, 908
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
TO_DEVICE, TO_HOST = 1, 2
DYNAMIC_SHARED_MEMORY = 8  # of cudaFuncAttribute
NON_BLOCKING, UNTIMED = 1, 2
KERNEL = c_void_p(1 << 40)


class Sizes(ctypes.Structure):
    _fields_ = [("x", c_uint), ("y", c_uint), ("z", c_uint)]


class Cuda:
    """The functions of the stand-in, with their codes returned."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.rehearsal_counts.restype = ctypes.c_char_p
        register = getattr(self.library, "__cudaRegisterFunction")  # which a class would take for its own
        register(None, KERNEL, None, b"a_kernel", -1, *[None] * 5)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def counts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.library.rehearsal_counts())
        return found

    def made(self, function: str, *arguments: Any) -> c_void_p:
        handle = c_void_p()
        assert getattr(self, function)(byref(handle), *arguments) == 0
        return handle

    def stream(self, flags: int = NON_BLOCKING) -> c_void_p:
        return self.made("cudaStreamCreateWithFlags", flags)

    def event(self, flags: int = UNTIMED) -> c_void_p:
        return self.made("cudaEventCreateWithFlags", flags)

    def launch(
        self,
        stream: c_void_p | None,
        grid: tuple[int, int, int] = (1, 1, 1),
        block: tuple[int, int, int] = (32, 1, 1),
        shared: int = 0,
        kernel: c_void_p = KERNEL,
    ) -> int:
        code: int = self.cudaLaunchKernel(kernel, Sizes(*grid), Sizes(*block), None, c_size_t(shared), stream)
        return code

    def begin(self, stream: c_void_p, mode: int = GLOBAL) -> None:
        assert self.cudaStreamBeginCapture(stream, mode) == 0

    def end(self, stream: c_void_p) -> tuple[int, c_void_p]:
        graph = c_void_p()
        return self.cudaStreamEndCapture(stream, byref(graph)), graph


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers = stand_in.toolkit()
    if headers is None or shutil.which("c++") is None:
        pytest.skip("no nvcc, with its headers, or no C++ compiler is installed")
    library = tmp_path_factory.mktemp("stand_in") / "stand_in.so"
    sources = [path for path in stand_in.sources() if path.name != "products.cpp"]  # whose headers nvcc comes without
    stand_in.compile_into(library, sources, [headers])
    return library


@pytest.fixture
def cuda(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    monkeypatch.setenv("REHEARSAL_ILLEGAL", str(tmp_path / "illegal"))
    copied = tmp_path / library.name  # another file each time: its state is new
    shutil.copy(library, copied)
    return Cuda(copied)


def test_work_is_counted_by_its_stream(cuda: Cuda) -> None:
    stream = cuda.stream()
    assert cuda.launch(stream) == 0
    assert cuda.launch(None) == 0
    found = cuda.counts()
    assert (found["launches"], found["on_default_stream"], found["illegal"]) == (2, 1, 0)
    assert found["streams"] == [stream.value]
    assert found["examples"]["on_default_stream"] == ["a_kernel"]
    cuda.rehearsal_reset()
    assert cuda.counts()["launches"] == 0
    assert cuda.counts()["streams"] == []


def test_a_graph_is_one_launch_of_what_was_captured(cuda: Cuda) -> None:
    stream = cuda.stream()
    cuda.begin(stream)
    assert cuda.launch(stream) == cuda.launch(stream) == 0
    code, graph = cuda.end(stream)
    assert code == 0
    nodes = c_size_t()
    assert cuda.cudaGraphGetNodes(graph, None, byref(nodes)) == 0
    assert nodes.value == 2
    executable = cuda.made("cudaGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
    assert cuda.cudaGraphLaunch(executable, stream) == 0
    found = cuda.counts()
    assert (found["captured"], found["launches"], found["graph_launches"], found["graphs"]) == (2, 0, 1, 1)
    assert cuda.cudaGraphExecDestroy(executable) == 0
    assert cuda.cudaGraphLaunch(executable, stream) == INVALID


WAITS: dict[str, Callable[[Cuda, c_void_p], int]] = {
    "cudaDeviceSynchronize": lambda cuda, _: cuda.cudaDeviceSynchronize(),
    "cudaStreamSynchronize": lambda cuda, stream: cuda.cudaStreamSynchronize(stream),
    "cudaEventSynchronize": lambda cuda, _: cuda.cudaEventSynchronize(cuda.event()),
}
UNSAFE: dict[str, Callable[[Cuda, c_void_p], int]] = {
    **WAITS,
    "cudaStreamQuery": lambda cuda, stream: cuda.cudaStreamQuery(stream),
    "cudaEventQuery": lambda cuda, _: cuda.cudaEventQuery(cuda.event()),
    "cudaMalloc": lambda cuda, _: cuda.cudaMalloc(byref(c_void_p()), c_size_t(8)),
    "cudaHostAlloc": lambda cuda, _: cuda.cudaHostAlloc(byref(c_void_p()), c_size_t(8), 0),
}


@pytest.mark.parametrize("call", WAITS)
def test_waits_are_counted(cuda: Cuda, call: str) -> None:
    assert WAITS[call](cuda, cuda.stream()) == 0
    assert cuda.counts()["waits"] == 1
    assert cuda.counts()["examples"]["waits"] == [call]


@pytest.mark.parametrize("call", UNSAFE)
@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL])
def test_a_capture_forbids_what_is_unsafe(cuda: Cuda, call: str, mode: int, tmp_path: Path) -> None:
    stream, other = cuda.stream(), cuda.stream()
    cuda.begin(stream, mode)
    assert UNSAFE[call](cuda, other) == UNSUPPORTED
    assert cuda.launch(stream) == SPOILT
    assert cuda.end(stream)[0] == SPOILT
    assert call in (tmp_path / "illegal").read_text()
    assert UNSAFE[call](cuda, other) == 0


@pytest.mark.parametrize(("mode", "code"), [(GLOBAL, UNSUPPORTED), (THREAD_LOCAL, 0), (RELAXED, 0)])
def test_other_threads_are_bound_by_global_captures_alone(cuda: Cuda, mode: int, code: int) -> None:
    stream, found = cuda.stream(), []
    cuda.begin(stream, mode)
    thread = threading.Thread(target=lambda: found.append(cuda.cudaDeviceSynchronize()))
    thread.start()
    thread.join()
    assert found == [code]
    assert cuda.end(stream)[0] == (SPOILT if code else 0)


def test_a_thread_may_relax_what_binds_it(cuda: Cuda) -> None:
    stream, mode = cuda.stream(), c_int(RELAXED)
    cuda.begin(stream)
    assert cuda.cudaThreadExchangeStreamCaptureMode(byref(mode)) == 0
    assert mode.value == GLOBAL
    assert cuda.cudaDeviceSynchronize() == 0
    assert cuda.cudaThreadExchangeStreamCaptureMode(byref(mode)) == 0
    assert cuda.cudaDeviceSynchronize() == UNSUPPORTED


def test_a_capture_ends_in_its_thread(cuda: Cuda) -> None:
    stream, found = cuda.stream(), []
    cuda.begin(stream, THREAD_LOCAL)
    thread = threading.Thread(target=lambda: found.append(cuda.end(stream)[0]))
    thread.start()
    thread.join()
    assert found == [WRONG_THREAD]


def test_captures_begin_once_and_on_no_default_stream(cuda: Cuda) -> None:
    stream = cuda.stream()
    cuda.begin(stream)
    assert cuda.cudaStreamBeginCapture(stream, GLOBAL) == ILLEGAL_STATE
    assert cuda.cudaStreamBeginCapture(None, GLOBAL) == UNSUPPORTED
    assert cuda.cudaStreamSynchronize(stream) == UNSUPPORTED
    assert cuda.end(cuda.stream())[0] == ILLEGAL_STATE


@pytest.mark.parametrize(("flags", "code"), [(NON_BLOCKING, 0), (0, IMPLICIT)])
def test_the_default_stream_joins_captures_of_blocking_streams(cuda: Cuda, flags: int, code: int) -> None:
    stream = cuda.stream(flags)
    cuda.begin(stream)
    assert cuda.launch(None) == code
    assert cuda.end(stream)[0] == (SPOILT if code else 0)


def test_work_of_other_streams_forks_from_a_capture_and_joins_it(cuda: Cuda) -> None:
    stream, middle, other, event, last = cuda.stream(), cuda.stream(), cuda.stream(), cuda.event(), cuda.event()

    def chain(*streams: c_void_p) -> None:
        for one, after in pairwise(streams):
            assert cuda.cudaEventRecord(event, one) == 0
            assert cuda.cudaStreamWaitEvent(after, event, 0) == 0
            assert cuda.launch(after) == 0

    cuda.begin(stream)
    chain(stream, middle, other, middle, stream)
    assert cuda.end(stream)[0] == 0
    cuda.begin(stream)
    chain(stream, middle, other, stream)  # what middle was given comes before what other was
    assert cuda.end(stream)[0] == 0
    cuda.begin(stream)
    chain(stream, other, stream)
    assert cuda.launch(other) == 0
    assert cuda.end(stream)[0] == UNJOINED
    assert cuda.launch(other) == 0
    assert cuda.counts()["launches"] == 1

    cuda.begin(stream)
    assert cuda.cudaEventRecord(last, stream) == 0
    assert cuda.cudaEventQuery(last) == CAPTURED_EVENT
    assert cuda.end(stream)[0] == SPOILT


def test_captured_work_waits_for_none_outside(cuda: Cuda) -> None:
    stream, other, event = cuda.stream(), cuda.stream(), cuda.event()
    assert cuda.cudaEventRecord(event, other) == 0
    cuda.begin(stream)
    assert cuda.cudaStreamWaitEvent(stream, event, 0) == ISOLATION
    assert cuda.end(stream)[0] == SPOILT


@pytest.mark.parametrize(
    "shape",
    [
        {"grid": (0, 1, 1)},
        {"grid": (2**31, 1, 1)},
        {"grid": (1, 65_536, 1)},
        {"grid": (1, 1, 65_536)},
        {"block": (0, 1, 1)},
        {"block": (1025, 1, 1)},
        {"block": (32, 32, 2)},
        {"block": (1, 1, 65)},
    ],
)
def test_launches_no_device_takes_are_refused(cuda: Cuda, shape: dict[str, Any]) -> None:
    assert cuda.launch(cuda.stream(), **shape) == CONFIGURATION
    assert cuda.cudaGetLastError() == CONFIGURATION
    assert cuda.cudaGetLastError() == 0
    assert cuda.counts()["launches"] == 0


def test_the_largest_launch_is_taken(cuda: Cuda) -> None:
    assert cuda.launch(cuda.stream(), grid=(2**31 - 1, 65_535, 65_535), block=(16, 1, 64)) == 0


def test_shared_memory_is_asked_for(cuda: Cuda) -> None:
    stream, most = cuda.stream(), 227 * 1024
    assert cuda.launch(stream, shared=48 * 1024) == 0
    assert cuda.launch(stream, shared=48 * 1024 + 1) == INVALID
    assert cuda.cudaFuncSetAttribute(KERNEL, DYNAMIC_SHARED_MEMORY, most + 1) == INVALID
    assert cuda.cudaFuncSetAttribute(KERNEL, DYNAMIC_SHARED_MEMORY, most) == 0
    assert cuda.launch(stream, shared=most) == 0


def test_what_does_not_exist_is_refused(cuda: Cuda) -> None:
    gone, event = cuda.stream(), cuda.event()
    assert cuda.cudaStreamDestroy(gone) == cuda.cudaEventDestroy(event) == 0
    assert cuda.launch(gone) == RESOURCE
    assert cuda.cudaEventRecord(event, None) == RESOURCE
    assert cuda.launch(None, kernel=c_void_p(1 << 41)) == 98
    assert cuda.cudaFree(c_void_p(4096)) == INVALID
    assert cuda.cudaSetDevice(1) == 101
    assert cuda.counts()["illegal"] == 5


def test_times_are_those_of_timed_events(cuda: Cuda) -> None:
    first, last, untimed, unrecorded = cuda.event(0), cuda.event(0), cuda.event(), cuda.event(0)
    for event in (first, last, untimed):
        assert cuda.cudaEventRecord(event, None) == 0
    milliseconds = c_float()
    assert cuda.cudaEventElapsedTime(byref(milliseconds), first, last) == 0
    assert milliseconds.value > 0
    for event in (untimed, unrecorded):
        assert cuda.cudaEventElapsedTime(byref(milliseconds), first, event) == RESOURCE


def test_memory_is_reserved_and_runs_out(cuda: Cuda) -> None:
    free, total = c_size_t(), c_size_t()
    block = cuda.made("cudaMalloc", c_size_t(100 << 30))
    assert cuda.cudaMemGetInfo(byref(free), byref(total)) == 0
    assert total.value - free.value == 100 << 30
    assert cuda.cudaMalloc(byref(c_void_p()), c_size_t(100 << 30)) == MEMORY
    assert cuda.cudaFree(block) == 0
    assert cuda.cudaFree(block) == INVALID
    cuda.made("cudaMalloc", c_size_t(100 << 30))
    assert cuda.counts()["illegal"] == 1
    assert cuda.cudaFree(cuda.made("cudaHostAlloc", c_size_t(8), 0)) == INVALID


def test_copies_stay_in_their_memory(cuda: Cuda) -> None:
    device, host = cuda.made("cudaMalloc", c_size_t(4096)), cuda.made("cudaHostAlloc", c_size_t(4096), 0)
    stream = cuda.stream()

    def copied(to: c_void_p, source: c_void_p, count: int, kind: int) -> int:
        code: int = cuda.cudaMemcpyAsync(to, source, c_size_t(count), kind, stream)
        return code

    assert copied(device, host, 4096, TO_DEVICE) == copied(host, device, 4096, TO_HOST) == 0
    assert ctypes.string_at(host.value or 0, 4096) == b"\x3f" * 4096
    assert cuda.counts()["waits"] == 0
    assert copied(host, device, 4097, TO_HOST) == INVALID
    assert copied(host, device, 4096, TO_DEVICE) == INVALID
    pageable = ctypes.create_string_buffer(16)
    assert copied(ctypes.cast(pageable, c_void_p), device, 16, TO_HOST) == 0
    assert cuda.counts()["waits"] == 1
    cuda.begin(stream)
    assert copied(host, device, 4096, TO_HOST) == 0
    assert copied(device, ctypes.cast(pageable, c_void_p), 16, TO_DEVICE) == UNSUPPORTED


def test_asserts_of_rehearsed_tests_are_evaluated_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text("seen = []\nassert seen.append(1), 1 / 0\nassert not seen\nassert [][0]\n")
    found: dict[str, Any] = {}
    with pytest.raises(IndexError):
        exec(unjudged.Loader("test_it", str(path)).get_code("test_it"), found)
    assert found["seen"] == [1]
    assert not list(tmp_path.glob("**/*.pyc"))


@pytest.mark.parametrize(("error", "hangs"), [(None, True), (ValueError("a shape"), True), (IndexError(), False)])
def test_errors_that_are_awaited_hang_on_numbers(error: Exception | None, hangs: bool) -> None:
    found: BaseException | None = None
    try:
        with pytest.raises(ValueError, match="of numbers"):
            _raise(error)
    except BaseException as what:
        found = what
    assert found is not None
    assert unjudged.hangs_on_numbers(found) == hangs


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def test_rows_without_a_measurement_are_told() -> None:
    found = {
        "score": {"tiny": {"score": "failed: KeyError: 3"}, "seconds": 3.0},
        "peers": {"opacus": "not measured: No module named 'opacus'", "loop": "not measured: shapes"},
        "memory checker": {"ok": True, "why": "not run: compute-sanitizer is not installed"},
    }
    assert list(rehearse.unmeasured(found)) == [
        "score, tiny, score: failed: KeyError: 3",
        "peers, loop: not measured: shapes",
        "memory checker, why: not run: compute-sanitizer is not installed",
    ]
