from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lswag_fast import _C, backends
from lswag_fast.errors import InputError
from lswag_fast.ops.channel_saliency import channel_saliency

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_definition(y: Tensor, d: Tensor, channel_axis: int) -> float:
    total = 0.0
    for products in y.double() * d.double():  # of one sample, with the samples' axis gone
        for channel in products.unbind(channel_axis):
            total += float(channel.sum()) ** 2
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [
        ((3, 7), -1),
        ((2, 1, 1), -1),
        ((3, 197, 75), -1),
        ((3, 5, 6, 33), -1),
        ((3, 33, 9, 7), -3),
        ((2, 20, 50), -2),
        ((2, 6, 5, 9, 7), -3),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "reversed", "slice", "samples last"])
def test_sums_hold_to_the_definition(
    layout: str, shape: tuple[int, ...], channel_axis: int, dtype: torch.dtype
) -> None:
    y, d = (normal(n, *shape).to(dtype) for n in range(2))
    if layout == "slice":
        y, d = (torch.nn.functional.pad(t, (1, 2), value=torch.nan)[..., 1:-2] for t in (y, d))
    elif layout == "reversed":
        d = d.permute(*reversed(range(d.dim()))).contiguous().permute(*reversed(range(d.dim())))
    elif layout == "samples last":
        y, d = (t.movedim(0, -1).contiguous().movedim(-1, 0) for t in (y, d))
    expected = by_definition(y, d, channel_axis)
    found = channel_saliency(y, d, channel_axis)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-5)
    with backends.preferring("torch"):
        assert float(channel_saliency(y, d, channel_axis)) == pytest.approx(expected, rel=1e-5)


def test_sums_hold_over_many_positions() -> None:
    y, d = (normal(n, 2, 3, 300, 300).abs() for n in range(2))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = channel_saliency(
            y.contiguous(memory_format=memory_format), d.contiguous(memory_format=memory_format), 1
        )
        assert float(found) == pytest.approx(by_definition(y, d, 0), rel=1e-7)


def test_sums_hold_where_gradients_are_tiny() -> None:
    y, d = normal(0, 4, 30, 20), normal(1, 4, 30, 20) * 1e-30
    assert float(channel_saliency(y, d)) == pytest.approx(by_definition(y, d, -1), rel=1e-5, abs=0)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    y, d = normal(0, 7, 30, 40), normal(1, 7, 30, 40)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(float(channel_saliency(y, d)))
    assert found == found[:1] * 3


def test_tensors_that_require_gradients_are_read() -> None:
    y, d = normal(0, 3, 4, 5), normal(1, 3, 4, 5)
    assert channel_saliency(y.requires_grad_(), d) == channel_saliency(y.detach(), d)


def test_float64_is_taken_by_torch() -> None:
    y, d = normal(0, 3, 4, 5).double(), normal(1, 3, 4, 5).double()
    assert float(channel_saliency(y, d)) == pytest.approx(by_definition(y, d, -1), rel=1e-5)


@pytest.mark.parametrize(
    ("y", "d", "axis", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), -1, r"of one shape, .* got torch.float32 \[2, 3\] on cpu and .*\[2, 4\]"),
        (torch.ones(2, 3), torch.ones(2, 3).bfloat16(), -1, "of one shape, floating dtype"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), -1, "of one shape, floating dtype"),
        (torch.ones(2), torch.ones(2), -1, "of one shape, floating dtype"),
        (torch.ones(2, 3), torch.ones(2, 3), 0, r"channel_axis of outputs \[2, 3\] other than the samples', got 0"),
        (torch.ones(2, 3), torch.ones(2, 3), -2, "got -2"),
        (torch.ones(2, 3), torch.ones(2, 3), 2, "got 2"),
    ],
)
def test_operands_that_do_not_fit_are_refused(y: Tensor, d: Tensor, axis: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        channel_saliency(y, d, axis)


def test_the_kernel_refuses_what_it_would_read_beyond() -> None:
    y, sums = torch.ones(2, 3, 4), torch.empty(2, 4, dtype=torch.float64)
    for other, out in ((torch.ones(2, 3, 5), sums), (torch.ones(2, 12), sums), (y, sums[:1]), (y.double(), sums)):
        with pytest.raises(ValueError, match="expected"):
            _C.channel_saliency(y, other, out, 1)


@pytest.mark.parametrize("path", [path for path in _C.cpu_paths() if path != _C.cpu_path()])
def test_every_instruction_set_gives_the_same(path: str) -> None:
    environment = {**os.environ, "LSWAG_CPU": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "hold"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
