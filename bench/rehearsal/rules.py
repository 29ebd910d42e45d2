"""What this project asks of its work on a device, held against what was counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from gpu_cases import MIDDLE, cases, depthwise_cases, moments_case
from gpu_subject import FROM_PASS
from stand_in import counted
from steps import Rows

from lswag_fast import _C, images, spaces
from lswag_fast.backends import preferring
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.engine.cuda_graphs import no_captures
from lswag_fast.kernels.gradient_moments_launch import has_wgmma
from lswag_fast.ops.gradient_moments import Convolution, gradient_moments
from lswag_fast.options import ScoreOptions

SAMPLES = 64
CANDIDATES = 20
ROUNDS_BEFORE, ROUNDS = 4, 8
NOTHING = {"waits": 0, "device_allocations": 0, "device_frees": 0, "host_allocations": 0, "illegal": 0}
"""What an op does of this once its kernels are loaded and its memory is kept."""
CANDIDATE = {**NOTHING, "waits": 1, "graphs": 0}
MOST_EXTRA_BYTES = 64 * 2**20
"""Of device memory that gradient moments take beyond their operands, whatever the layer."""
LARGE_LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "linear, 576 to 2304": ((64, 197, 576), (64, 197, 2304), {}),
    "linear, 32768 to 32768": ((4, 8, 32768), (4, 8, 32768), {}),
    "linear, 8192 to 8192, signed": ((16, 64, 8192), (16, 64, 8192), {"signed": True}),
    "linear, 128 to 262144": ((4, 8, 128), (4, 8, 262144), {}),
    "convolution, 3 x 3, 1024 to 1024": (
        (16, 1024, 14, 14),
        (16, 1024, 14, 14),
        {"convolution": Convolution((3, 3), padding=(1, 1))},
    ),
    "depthwise convolution, 7 x 7, 768": (
        (64, 768, 14, 14),
        (64, 768, 14, 14),
        {"convolution": Convolution((7, 7), padding=(3, 3), groups=768)},
    ),
}
"""Shapes of inputs and output gradients, and what else gradient moments are asked."""
WAYS = {"CUDA graphs": None, "kernel by kernel": no_captures}


class BrokenRuleError(Exception):
    """The device was asked for what it may not be."""


def hold(found: dict[str, Any], rules: dict[str, int]) -> None:
    """Raises BrokenRuleError where something was counted another number of times than `rules` says."""
    for name, number in rules.items():
        if found[name] != number:
            examples = ", ".join(dict.fromkeys(found["examples"][name]))
            raise BrokenRuleError(f"{name} are {found[name]} and must be {number}: {examples}")


def ops(rows: Rows) -> None:
    """Holds every op that has kernels to its rules, on a stream of its own and in a graph."""
    if not has_wgmma(torch.device("cuda")):
        raise BrokenRuleError("the build holds no code for sm_90a, and the wgmma kernel is not launched")
    arch = MIDDLE["autoformer-tiny"]
    for case in [*cases(arch, SAMPLES), *depthwise_cases(SAMPLES)]:
        rows.attempt(partial(_op, case.make), case.name)
    with preferring("cuda"):
        case = moments_case(arch, SAMPLES)
        rows.attempt(partial(_op, case.make, "grouped_moments_kernel"), f"{case.name}, by wgmma")
    rows.attempt(partial(_op, _numbers, "write_numbers_kernel"), "numbers for a device")


def _numbers() -> Callable[[], Any]:
    numbers, room = torch.arange(20_000), torch.empty(20_000, dtype=torch.int64, device="cuda")
    return lambda: _C.cuda_write_numbers(numbers, room, torch.cuda.current_stream().cuda_stream)


def _op(make: Callable[[], Callable[[], Any]], kernel: str = "") -> dict[str, int]:
    """Returns what the device is given by an op, with this kernel among it; raises BrokenRuleError."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(2):
            call()
        found = counted(call)
    hold(found, {**NOTHING, "on_default_stream": 0})
    if not any(kernel in launched for launched in found["examples"]["launches"]):
        raise BrokenRuleError(f"{kernel or 'no kernel'} is not launched: {found['examples']['launches']}")
    if found["streams"] != [stream.cuda_stream]:
        raise BrokenRuleError(f"work goes to the streams {found['streams']} and not to {stream.cuda_stream} alone")
    with torch.cuda.graph(graph, stream=stream):
        kept.append(call())
    with torch.cuda.stream(stream):
        replayed = counted(graph.replay)
    hold(replayed, {**NOTHING, "on_default_stream": 0, "launches": 0, "graph_launches": 1})
    return {name: found[name] for name in ("launches", "copies", "fills")}


def memory(rows: Rows) -> None:
    """Holds gradient moments of large layers to the device memory that they may take."""
    for name, layer in LARGE_LAYERS.items():
        rows.attempt(partial(_extra_bytes, *layer), name)


def _extra_bytes(inputs: tuple[int, ...], output_grads: tuple[int, ...], options: dict[str, Any]) -> int:
    a, d = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in (inputs, output_grads))
    gradient_moments(a, d, **options)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradient_moments(a, d, **options)
    extra = torch.cuda.max_memory_allocated() - before
    if not 0 < extra < MOST_EXTRA_BYTES:
        raise BrokenRuleError(f"{extra} bytes beyond the operands, and {MOST_EXTRA_BYTES} are too many")
    return extra


def candidates(rows: Rows) -> None:
    """Holds candidates of every space to their rules, and finds the host's time and the device's memory."""
    for name in MIDDLE:
        *given, options = _given(name)
        for how, captures in WAYS.items():
            rows.attempt(partial(_candidates, (*given, options), captures), name, how)
        with_others = replace(options, proxies=FROM_PASS)
        rows.attempt(partial(_candidates, (*given, with_others), None), name, f"CUDA graphs, {len(FROM_PASS)} proxies")


def _given(name: str) -> tuple[Any, ...]:
    space = spaces.get(name, image_size=224, patch_size=16, num_classes=1000)
    assert isinstance(space, spaces.AutoFormerSpace)
    batch = images.load("noise", SAMPLES, image_size=224, seed=0)
    options = ScoreOptions(dtype="bfloat16", device="cuda").resolved(SAMPLES)
    return space.supernet(seed=0), batch.images, batch.labels, None, options


def _candidates(given: tuple[Any, ...], captures: Any) -> dict[str, Any]:
    """Returns medians over candidates that have come up before; raises BrokenRuleError."""
    engine = AutoFormerEngine(*given, captures=captures)
    if engine.in_flight < 2:
        raise BrokenRuleError("a candidate is not launched before the one in front of it is read")
    archs = list(given[0].space.sample(CANDIDATES, seed=1))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(ROUNDS_BEFORE):
        for arch in archs:
            engine.score(arch)
    found = [counted(partial(engine.score, arch)) for arch in archs]
    for of_one in found:
        hold(of_one, CANDIDATE)
        if (captures is None) != (of_one["graph_launches"] > 0):
            raise BrokenRuleError(f"{of_one['graph_launches']} graphs are launched")
    times = [[_times(engine, arch) for arch in archs] for _ in range(ROUNDS)]
    # The fastest of the rounds, for processors are shared.
    fastest = [[min(part) for part in zip(*of_one, strict=True)] for of_one in zip(*times, strict=True)]
    launch, finish = (1e3 * median(part) for part in zip(*fastest, strict=True))
    reserved = [torch.cuda.max_memory_reserved()]
    for _ in range(ROUNDS_BEFORE):
        _two_in_flight(engine, archs)
    both = counted(partial(_two_in_flight, engine, archs))
    hold(both, {**CANDIDATE, "waits": len(archs)})
    reserved.append(torch.cuda.max_memory_reserved())
    of_each = ("launches", "graph_launches", "copies", "waits", "device_allocations", "host_allocations")
    return {
        "launch_milliseconds": launch,
        "finish_milliseconds": finish,
        **{which: median(of_one[which] for of_one in found) for which in of_each},
        "bytes_reserved": dict(zip(("one in flight", "two in flight"), reserved, strict=True)),
    }


def _times(engine: AutoFormerEngine, arch: Any) -> tuple[float, float]:
    began = perf_counter()
    pending = engine.launch(arch)
    launched = perf_counter()
    pending.finish()
    return launched - began, perf_counter() - launched


def _two_in_flight(engine: AutoFormerEngine, archs: list[Any]) -> None:
    before = None
    for arch in archs:
        pending = engine.launch(arch)
        if before is not None:
            before.finish()
        before = pending
    if before is not None:
        before.finish()
