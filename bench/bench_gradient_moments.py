"""Gradient moments of AutoFormer-Tiny's layers beside the plain weight gradient of the same layers, one matrix product.

The product computes the gradient of the whole batch: the same multiplications, without telling samples apart. It is
the floor that a score can be asked to keep to. Ratios are taken within a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import measure
import pytest
import torch
from conftest import Show
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lswag_fast.ops.gradient_moments import Convolution, gradient_moments

SAMPLES, TOKENS = 16, 197
ROUNDS = 20
THREADS = 2
LINEAR = ((576, 192), (192, 192), (768, 192), (192, 768), (576, 240), (756, 216), (960, 240), (240, 960))
CONVOLUTIONS = {
    "patches 16x16": (Convolution((16, 16), stride=(16, 16)), 3, 192, 224),
    "3x3, 64 channels": (Convolution((3, 3), padding=(1, 1)), 64, 64, 56),
    "3x3, 256 channels": (Convolution((3, 3), padding=(1, 1)), 256, 256, 14),
    "7x7 depthwise, 96 channels": (Convolution((7, 7), padding=(3, 3), groups=96), 96, 96, 56),
}
HEADS = ("", "ms", "GF/s", "x plain gradient", "fastest / fastest", "processor time")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers(benchmark: BenchmarkFixture, device: str, show: Show, dtype: str) -> None:
    _cpu_only(device)
    cases = {f"{out} x {width}": _linear(out, width, getattr(torch, dtype)) for out, width in LINEAR}
    work = {name: 2 * SAMPLES * TOKENS * out * width for name, (out, width) in zip(cases, LINEAR, strict=True)}
    _measure(benchmark, device, show, f"gradient-moments-{dtype}", cases, work)


def test_convolutions(benchmark: BenchmarkFixture, device: str, show: Show) -> None:
    _cpu_only(device)
    cases, work = {}, {}
    for name, (convolution, in_channels, out_channels, size) in CONVOLUTIONS.items():
        side = size // convolution.stride[0]
        cases[name] = _convolution(convolution, in_channels, out_channels, size, side)
        weights = out_channels * in_channels // convolution.groups * convolution.kernel_size[0] ** 2
        work[name] = 2 * SAMPLES * side**2 * weights
    _measure(benchmark, device, show, "gradient-moments-convolutions", cases, work)


Case = tuple[Callable[[], object], Callable[[], Tensor]]


def _linear(out: int, width: int, dtype: torch.dtype) -> Case:
    a, d = torch.randn(SAMPLES, TOKENS, width).to(dtype), torch.randn(SAMPLES, TOKENS, out).to(dtype)
    return partial(gradient_moments, a, d), partial(torch.mm, d.flatten(0, 1).T, a.flatten(0, 1))


def _convolution(convolution: Convolution, in_channels: int, out_channels: int, size: int, side: int) -> Case:
    a, d = torch.randn(SAMPLES, in_channels, size, size), torch.randn(SAMPLES, out_channels, side, side)
    c = convolution
    plain = partial(
        torch.nn.grad.conv2d_weight,
        a,
        (out_channels, in_channels // c.groups, *c.kernel_size),
        d,
        c.stride,
        c.padding,
        c.dilation,
        c.groups,
    )
    return partial(gradient_moments, a, d, convolution=convolution), plain


def _measure(
    benchmark: BenchmarkFixture, device: str, show: Show, what: str, cases: dict[str, Case], work: dict[str, int]
) -> None:
    rounds = {
        name: measure.Rounds({"moments": moments, "plain": plain}, device) for name, (moments, plain) in cases.items()
    }
    benchmark.pedantic(lambda: [in_turn() for in_turn in rounds.values()], rounds=ROUNDS, warmup_rounds=1)
    found = {}
    for name, in_turn in rounds.items():
        summary = in_turn.summary("plain")
        row = {**summary["moments"], "plain_fastest_seconds": summary["plain"]["fastest_seconds"]}
        found[name] = {**row, "gflops": work[name] / row["fastest_seconds"] / 1e9}
    benchmark.extra_info.update(found)
    path = measure.write(device, what, {"samples": SAMPLES, "groups": "one a sample", "layers": found})
    rows = [
        (
            name,
            f"{row['fastest_seconds'] * 1e3:.2f}",
            f"{row['gflops']:.0f}",
            *(f"{row[column]:.2f}" for column in ("ratio", "ratio_of_fastest", "ratio_of_processor_time")),
        )
        for name, row in found.items()
    ]
    show(f"S = G = {SAMPLES}, {THREADS} threads, {path.name}", HEADS, rows)


def _cpu_only(device: str) -> None:
    if device != "cpu":
        pytest.skip("gradient moments have CPU kernels only")
