"""What the host asks the CUDA runtime for, recorded without a GPU: no allocation, no waiting, no stream but the given.

The calls are those of the built objects, by the bindings, on arrays at addresses that no host can read.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from recorded_runtime import NOWHERE, DeviceArray, RecordedRuntime, linked, newest_build
from resources import TABLE

STREAM = 0x5EED0
SAMPLES = [2, 64, 65, 1024]
# Asking, launching, and what nvcc makes of a launch and of a binary: nothing of it allocates or waits.
ASKED = {"cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaGetDevice", "cudaGetErrorString", "cudaGetLastError"}
CHANGED = {"cudaSetDevice", "cudaFuncSetAttribute"}
LAUNCHED = {"cudaLaunchKernel", "__cudaLaunchKernel", "__cudaGetKernel"}
LAUNCHED |= {"__cudaPushCallConfiguration", "__cudaPopCallConfiguration"}
REGISTERED = {"__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary"}
REGISTERED |= {"__cudaRegisterFunction", "__cudaInitModule"}
THREADS = {
    "pack_signs_kernel": 256,
    "write_table_kernel": 256,
    "dedupe_tiles_kernel": 256,
    "scan_partitions_kernel": 1024,
    "scatter_tiles_kernel": 256,
    "count_partitions_kernel": 256,
    "count_agreements_kernel": 256,
    "write_numbers_kernel": 128,
    "grouped_moments_kernel": 384,
}
"""The threads that each kernel is written for."""
DYNAMIC_SHARED_MEMORY = 8  # of cudaFuncAttribute
KIB = 1024

Op = Callable[..., None]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> RecordedRuntime:
    return RecordedRuntime(linked(newest_build(), tmp_path_factory.mktemp("recorded")))


@pytest.fixture(autouse=True)
def hopper(request: pytest.FixtureRequest) -> None:
    if "runtime" in request.fixturenames:
        runtime = request.getfixturevalue("runtime")
        runtime.pose((9, 0))
        runtime.start()


@pytest.fixture(scope="module")
def shared_bytes() -> dict[str, int]:
    """The static shared memory of each kernel."""
    rows = json.loads(TABLE.read_text())["rows"]
    return {
        name.partition(": ")[2].removesuffix(", sm_90a"): row["shared_bytes"]
        for name, row in rows.items()
        if name.endswith(", sm_90a")
    }


def pack(
    module: Any,
    stream: int = STREAM,
    device: int = 1,
    *,
    samples: int,
    positions: int,
    dtype: str = "bfloat16",
    activation: int = 0,
    first_sample: int = 0,
    address: int = NOWHERE,
) -> None:
    pre = DeviceArray(dtype, samples, positions, address=address, device=device)
    rows = -(-(first_sample + samples) // 64)
    words = DeviceArray("int64", rows, positions, device=device)
    post = None if activation == 0 else pre
    module.cuda_pack_signs(pre, post, words, activation, first_sample, samples, first_sample > 0, stream)


def words_of(samples: int, positions: Sequence[int], device: int) -> list[DeviceArray]:
    return [DeviceArray("int64", -(-samples // 64), number, device=device) for number in positions]


def count(module: Any, stream: int = STREAM, device: int = 1, *, samples: int, positions: Sequence[int]) -> None:
    counts = DeviceArray("int64", 1 + len(positions), device=device)
    space = DeviceArray("int64", module.cuda_count_workspace(list(positions)), device=device)
    module.cuda_count_patterns(words_of(samples, positions, device), samples, counts, space, stream)


def compare(module: Any, stream: int = STREAM, device: int = 1, *, samples: int, positions: Sequence[int]) -> None:
    out = DeviceArray("int64", samples, samples, device=device)
    space = DeviceArray("int64", module.cuda_agreement_workspace(len(positions)), device=device)
    module.cuda_count_agreements(words_of(samples, positions, device), samples, out, space, stream)


def write(module: Any, stream: int = STREAM, device: int = 1, *, numbers: int) -> None:
    module.cuda_write_numbers(np.arange(numbers), DeviceArray("int64", numbers, device=device), stream)


def moments(module: Any, stream: int = STREAM, device: int = 1, *, weights: int, tiles: int, half: bool) -> None:
    sizes = {"problems": 24 * weights, "uses": 16 * weights, "ends": weights, "magnitudes": weights}
    tables = [DeviceArray("int64", size, device=device) for size in sizes.values()]
    partials = DeviceArray("float64", 5 * 2 * tiles, device=device)
    module.cuda_grouped_moments(*tables, partials, weights, 0, 2 * tiles, half, stream)


OPS: dict[str, Op] = {
    "pack_signs": partial(pack, samples=65, positions=197 * 864),
    "pack_signs of an activation": partial(pack, samples=64, positions=197 * 864, activation=3),
    "count_patterns": partial(count, samples=64, positions=[197 * 864, 0, 5] * 30),
    "count_agreements": partial(compare, samples=65, positions=[197 * 864, 0, 5] * 30),
    "write_numbers": partial(write, numbers=10_000),
    "grouped_moments": partial(moments, weights=50, tiles=1000, half=False),
}
"""Calls of every function that launches, with several parts where there can be."""

MANY = [197 * 864, 0, 1] * 300
NEAR_2_31 = [2**31 - 2**20, 2**20 - 3 * 1024 + 1, 1023]  # with each rounded up to tiles of 1024, 1024 fewer than 2^31
EMPTY = [0] * 999
LAYERS = {"one": [1], "large": [2**31 - 1024], "near 2^31": NEAR_2_31, "many": MANY, "one empty": [0], "empty": EMPTY}

EXTREMES: dict[str, Op] = {
    **{
        f"{name}, S = {samples}, {which}": partial(op, samples=samples, positions=positions)
        for name, op in (("count", count), ("compare", compare))
        for samples, (which, positions) in product(SAMPLES, LAYERS.items())
    },
    **{
        f"pack {dtype}, S = {samples}, P = {size}": partial(pack, dtype=dtype, samples=samples, positions=size)
        for samples, dtype in product(SAMPLES, ("float32", "bfloat16", "float16"))
        for size in (0, 1, 2**31 - 1, 2**31 - 8, 2**36 - 32)
    },
    **{f"activation {k}": partial(pack, activation=k, samples=64, positions=2**31 - 8) for k in range(1, 7)},
    **{f"from sample {n}": partial(pack, first_sample=n, samples=2, positions=2**31 - 8) for n in (1, 62, 63, 1022)},
    **{f"{n} numbers": partial(write, numbers=n) for n in (0, 1, 4088, 4089, 1_000_000)},
    **{
        f"moments of {tiles} tiles, half = {half}": partial(moments, weights=3, tiles=tiles, half=half)
        for tiles, half in product((0, 1, 131, 133, 2**30 - 1), (False, True))
    },
}


def test_objects_ask_the_runtime_for_nothing_that_allocates_or_waits() -> None:
    build = newest_build()
    objects = [str(path) for name in ("_C.dir", "lswag_*.dir") for path in build.glob(f"{name}/**/*.o")]
    listing = subprocess.run(["nm", "-u", *objects], check=True, capture_output=True, text=True).stdout
    asked = set(re.findall(r"^\s+U (_*cu\w*)$", listing, re.MULTILINE))
    assert asked - (ASKED | CHANGED | LAUNCHED | REGISTERED) == set()
    assert "cudaGetLastError" in asked


@pytest.mark.parametrize("op", OPS)
def test_launches_go_to_the_stream_and_the_device_they_are_given(runtime: RecordedRuntime, op: str) -> None:
    for stream, device in product((STREAM, 0, 0x7FFF_FFFF_FFF0), (0, 1)):
        runtime.start()
        OPS[op](runtime.module, stream, device)
        launches = runtime.launches()
        assert launches
        assert {(launch.stream, launch.device) for launch in launches} == {(stream, device)}
        assert runtime.current_device() == 0


@pytest.mark.parametrize("case", EXTREMES)
def test_launches_are_such_as_a_device_takes(runtime: RecordedRuntime, shared_bytes: dict[str, int], case: str) -> None:
    EXTREMES[case](runtime.module)
    opted_in: dict[tuple[str, int], int] = {}
    for call in runtime.calls():
        if call["call"] == "cudaFuncSetAttribute":
            assert call["attribute"] == DYNAMIC_SHARED_MEMORY
            opted_in[call["kernel"], call["device"]] = call["value"]
        if call["call"] != "launch":
            continue
        x, y, z = call["grid"]
        assert 1 <= x <= 2**31 - 1
        assert 1 <= y <= 65_535
        assert z == 1
        assert call["block"] == [THREADS[call["kernel"].partition("<")[0]], 1, 1]
        static, dynamic = shared_bytes[call["kernel"]], call["shared_bytes"]
        assert static + dynamic <= 227 * KIB
        assert static + dynamic <= 48 * KIB or dynamic <= opted_in.get((call["kernel"], call["device"]), 0)


@pytest.mark.parametrize("layers", [1, 2, 64, 65, 640, 1000])
def test_layers_of_a_candidate_share_their_launches(runtime: RecordedRuntime, layers: int) -> None:
    tables = ["write_table_kernel"] * -(-layers // 64)  # arguments of a kernel hold 64
    counted = ["dedupe_tiles_kernel", "scan_partitions_kernel", "scatter_tiles_kernel", "count_partitions_kernel"]
    count(runtime.module, samples=64, positions=[197 * 864] * layers)
    assert [launch.name for launch in runtime.launches()] == tables + counted
    runtime.start()
    compare(runtime.module, samples=64, positions=[197 * 864] * layers)
    assert [launch.name for launch in runtime.launches()] == [*tables, "count_agreements_kernel"]
    runtime.start()
    moments(runtime.module, weights=layers, tiles=30 * layers, half=False)
    assert [launch.kernel for launch in runtime.launches()] == ["grouped_moments_kernel<BFloat16Product>"]


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("positions", [1, 255, 256, 197 * 864, 2**31 - 1, 2**31 - 8])
@pytest.mark.parametrize(("dtype", "shift", "run"), [("bfloat16", 0, 8), ("float16", 8, 4), ("float32", 4, 1)])
def test_blocks_that_pack_cover_all_positions(
    runtime: RecordedRuntime, samples: int, positions: int, dtype: str, shift: int, run: int
) -> None:
    pack(runtime.module, samples=samples, positions=positions, dtype=dtype, address=NOWHERE + shift)
    (launch,) = runtime.launches()
    run = run if positions % run == 0 else 1
    assert launch.kernel.endswith(f", {run}>")
    bytes_of_a_word = 1 << ((min(samples, 64) + 7) // 8 - 1).bit_length()
    assert launch.grid[:2] == (-(-positions // (8 // bytes_of_a_word * 32 * run)), -(-samples // 64))


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("layers", LAYERS)
def test_blocks_that_count_cover_all_tiles(runtime: RecordedRuntime, samples: int, layers: str) -> None:
    positions, width = LAYERS[layers], -(-samples // 64)
    tiles = sum(-(-number // 1024) for number in positions)
    count(runtime.module, samples=samples, positions=positions)
    grids = {launch.name: launch.grid for launch in reversed(runtime.launches())}
    first = grids.pop("write_table_kernel")
    partitions = min(1 << (tiles - 1).bit_length(), 2**20) if tiles else 1
    assert first == (-(-max(1 + len(positions), partitions) // 256), 1, 1)
    expected = [(tiles, 1, 1), (1, 1, 1), (tiles, 1, 1), (partitions, 1, 1)] if tiles else []
    assert list(grids.values())[::-1] == expected

    runtime.start()
    compare(runtime.module, samples=samples, positions=positions)
    grids = {launch.name: launch.grid for launch in reversed(runtime.launches())}
    assert grids.pop("write_table_kernel") == (-(-max(min(len(positions), 64), samples**2) // 256), 1, 1)
    pairs = width * (width + 1) // 2
    assert list(grids.values()) == ([(min(tiles, 1056 // pairs), pairs, 1)] if tiles else [])


@pytest.mark.parametrize("tiles", [1, 131, 132, 133, 2**30 - 1])
def test_a_multiprocessor_has_one_block_of_moments(runtime: RecordedRuntime, tiles: int) -> None:
    for multiprocessors in (132, 114):
        runtime.pose((9, 0), multiprocessors)
        runtime.start()
        moments(runtime.module, weights=9, tiles=tiles, half=True)
        (launch,) = runtime.launches()
        assert launch.grid == (min(tiles, multiprocessors), 1, 1)


@pytest.mark.parametrize("tiles", [0, 1])
def test_nothing_is_launched_for_nothing(runtime: RecordedRuntime, tiles: int) -> None:
    for op in (
        partial(pack, samples=64, positions=tiles),
        partial(write, numbers=tiles),
        partial(moments, weights=1, tiles=tiles, half=False),
    ):
        runtime.start()
        op(runtime.module)
        assert len(runtime.launches()) == tiles


@pytest.mark.parametrize("op", OPS)
def test_every_error_is_reported_once_and_names_what_failed(runtime: RecordedRuntime, op: str) -> None:
    OPS[op](runtime.module)
    whole = runtime.calls()
    for number, failing in enumerate(whole):
        if failing["call"] == "cudaSetDevice" and number == len(whole) - 1:
            continue  # back to the device that was current: a destructor has no one to tell
        runtime.start(failing_call=number)
        what = failing["kernel"].partition("_kernel")[0] if failing["call"] == "launch" else failing["call"]
        with pytest.raises(RuntimeError, match=f"{what}.* failed: as asked"):
            OPS[op](runtime.module)
        after = [call["call"] for call in runtime.calls()[number + 1 :]]
        assert after in ([], ["cudaSetDevice"])
        assert runtime.current_device() == 0
        # The runtime keeps an error until it is asked for it: the next launch must not be blamed.
        runtime.start()
        OPS[op](runtime.module)
        assert runtime.calls() == whole


@pytest.mark.parametrize("failure", [98, 209])  # no such function on this device, no binary for this device
def test_a_build_for_no_device_like_this_one_is_told(runtime: RecordedRuntime, failure: int) -> None:
    def asked_for_a_kernel_that_is_missing(op: Callable[[], Any]) -> Any:
        runtime.start()
        op()
        runtime.start([call["call"] for call in runtime.calls()].index("cudaFuncGetAttributes"), failure)
        return op()

    assert not asked_for_a_kernel_that_is_missing(partial(runtime.module.cuda_has_grouped_moments, 0))
    with pytest.raises(RuntimeError, match="a build for sm_90a"):
        asked_for_a_kernel_that_is_missing(partial(moments, runtime.module, weights=1, tiles=1, half=False))


def test_grids_beyond_a_launch_are_refused_before_it(runtime: RecordedRuntime) -> None:
    with pytest.raises(RuntimeError, match="packing signs: more blocks than one launch can have"):
        pack(runtime.module, samples=65, positions=2**36 - 31, dtype="float32")
    with pytest.raises(ValueError, match=r"fewer than 2\^31 positions can be counted"):
        count(runtime.module, samples=2, positions=[2**31 - 1024, 1])
    assert runtime.launches() == []
    assert runtime.current_device() == 0


def test_devices_that_are_too_old_are_refused(runtime: RecordedRuntime) -> None:
    runtime.pose((7, 5))
    for op in OPS.values():
        with pytest.raises(RuntimeError, match=r"compute capability 7\.5; 8\.0 or newer is needed"):
            op(runtime.module)
    assert runtime.launches() == []
    assert runtime.current_device() == 0


def test_moments_by_wgmma_run_where_there_is_code_for_it(runtime: RecordedRuntime) -> None:
    has = runtime.module.cuda_has_grouped_moments
    assert has(0)
    runtime.pose((9, 0), static_shared_bytes=0)  # as the kernel of another architecture, which is empty
    assert not has(0)
    with pytest.raises(RuntimeError, match="a build for sm_90a"):
        OPS["grouped_moments"](runtime.module)
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        runtime.pose(capability)
        assert not has(0)
    runtime.pose((9, 0))
    with pytest.raises(RuntimeError, match="cudaDeviceGetAttribute failed"):
        has(7)
    assert runtime.current_device() == 0
