"""Mean gradients times the weight, summed by the Triton kernels, against the definition: interpreted without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from gradients import assert_signed_holds, convolution_gradients, linear_gradients, normal, output_sides
from torch import Tensor

from lswag_fast.errors import InputError
from lswag_fast.ops.gradient_moments import Convolution, GradientMoments, gradient_moments
from lswag_fast.ops.gradient_moments_grouped import (
    MomentProblem,
    _matrix,
    gradient_moments_grouped,
    launch_gradient_moments,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def assert_saliencies_hold(moments: GradientMoments, gradients: list[Tensor], weight: Tensor) -> None:
    """Holds the sums of mean g * w to those of the definition in float64."""
    products = torch.stack(gradients).mean(0) * weight.cpu().double()
    assert moments.signed is not None
    scale = products.abs().sum().item()
    assert moments.signed.saliency == pytest.approx(products.sum().item(), abs=1e-6 * scale)
    assert moments.signed.absolute_saliency == pytest.approx(scale, rel=1e-6)


LAYOUTS = {
    "contiguous": lambda w: w,
    "a slice of a supernet": lambda w: torch.nn.functional.pad(w, (1, 2), value=math.nan)[..., 1:-2],
    "columns apart": lambda w: w.transpose(0, -1).contiguous().transpose(0, -1),
    "negated lazily": lambda w: torch._neg_view(-w),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("samples", "groups", "tokens", "out", "width", "dtype", "of_weight"),
    [
        (4, 4, 17, 40, 24, BF16, BF16),
        (4, 4, 17, 37, 43, FP16, FP32),
        (64, 64, 1, 40, 24, FP32, FP16),
        (6, 2, 33, 40, 72, FP32, FP32),
        (5, 5, 197, 20, 12, BF16, FP32),
    ],
)
def test_saliencies_of_a_linear_weight(
    device: torch.device,
    samples: int,
    groups: int,
    tokens: int,
    out: int,
    width: int,
    dtype: torch.dtype,
    of_weight: torch.dtype,
    layout: str,
) -> None:
    a, d = normal(0, samples, tokens, width).to(dtype), (normal(1, samples, tokens, out) + 0.1).to(dtype)
    weight = LAYOUTS[layout](normal(2, out, width).to(device, of_weight))
    gradients = linear_gradients([a], [d], groups).groups
    moments = gradient_moments(a.to(device), d.to(device), groups, signed=True, weight=weight)
    assert_saliencies_hold(moments, gradients, weight)
    with_maps = gradient_moments(a.to(device), d.to(device), groups, signed=True, maps=True, weight=weight)
    assert_signed_holds(with_maps, gradients)
    assert_saliencies_hold(with_maps, gradients, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("convolution", "in_channels", "out_channels"),
    [
        (Convolution((8, 8), stride=(8, 8)), 3, 24),
        (Convolution((3, 2), (2, 1), padding=(1, 0), dilation=(1, 2), groups=2), 6, 40),
        (Convolution((3, 3), padding=(1, 1), groups=5), 5, 10),
        (Convolution((1, 1)), 40, 8),
    ],
)
def test_saliencies_of_a_kernel(
    device: torch.device, convolution: Convolution, in_channels: int, out_channels: int, layout: str
) -> None:
    c, size = convolution, 16
    out = output_sides(c, size)
    a, d = normal(0, 4, in_channels, size, size), normal(1, 4, out_channels, *out)
    weight = LAYOUTS[layout](normal(2, out_channels, in_channels // c.groups, *c.kernel_size).to(device))
    moments = gradient_moments(a.to(device), d.to(device), convolution=c, signed=True, weight=weight)
    assert_saliencies_hold(moments, convolution_gradients(a, d, c, 4).groups, weight)


def test_saliencies_of_a_weight_that_is_used_several_times(device: torch.device) -> None:
    a = [normal(n, 8, t, 24) for n, t in enumerate((17, 5, 1))]
    d = [normal(n + 9, 8, t, 40) for n, t in enumerate((17, 5, 1))]
    weight = normal(20, 40, 24).to(device)
    moments = gradient_moments([t.to(device) for t in a], [t.to(device) for t in d], 4, signed=True, weight=weight)
    assert_saliencies_hold(moments, linear_gradients(a, d, 4).groups, weight)


def test_a_weight_whose_rows_lie_far_apart_is_copied(device: torch.device) -> None:
    """Places in it are counted in 32 bits."""
    a, d = normal(0, 4, 3, 16), normal(1, 4, 3, 8)
    rows = 2**31 // 7 + 1
    memory = torch.empty(7 * rows + 16, dtype=torch.float16, device="meta")
    problem = MomentProblem(a.to(device), d.to(device), signed=True, weight=memory.as_strided((8, 16), (rows, 1)))
    assert _matrix(problem.weight).is_contiguous()
    near = memory.as_strided((8, 16), (rows - 4, 1))
    assert not _matrix(near).is_contiguous()


def test_a_weight_on_another_device_is_refused(device: torch.device) -> None:
    a, d = normal(0, 4, 3, 16).to(device), normal(1, 4, 3, 8).to(device)
    with pytest.raises(InputError, match=f"expected weight on {a.device} as inputs are, got meta"):
        gradient_moments(a, d, signed=True, weight=torch.empty(8, 16, device="meta"))


def test_what_a_weight_makes_infinite_is_not_computed_again(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lswag_fast.kernels import gradient_moments_launch as launcher

    monkeypatch.setattr(launcher, "SAMPLED_ELEMENTS", 64)
    a, d, weight = normal(0, 4, 33, 16).to(device), normal(1, 4, 33, 8).to(device), normal(2, 8, 16).to(device)
    (finite,) = gradient_moments_grouped([MomentProblem(a, d, signed=True, weight=weight)])
    pending = launch_gradient_moments([MomentProblem(a, d, signed=True, weight=1e33 * weight)])
    monkeypatch.setattr(launcher, "launch", None)
    (found,) = pending.finish()
    assert found.signed is not None
    assert finite.signed is not None
    assert not math.isfinite(found.signed.absolute_saliency or 0)
    assert found.signed.mean_sigma == finite.signed.mean_sigma
    assert found.log_sum_inverse_sigma == finite.log_sum_inverse_sigma


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_or_a_weight_that_is_not_finite_shows(device: torch.device, bad: float) -> None:
    a, d, weight = normal(0, 4, 3, 16), normal(1, 4, 3, 8), normal(2, 8, 16)
    finite = gradient_moments(a.to(device), d.to(device), signed=True, weight=weight.to(device))
    weight[3, 5] = bad
    signed = gradient_moments(a.to(device), d.to(device), signed=True, weight=weight.to(device)).signed
    assert signed is not None
    assert finite.signed is not None
    assert not math.isfinite(signed.saliency or 0)
    assert not math.isfinite(signed.absolute_saliency or 0)
    assert signed.mean_squared_mean == finite.signed.mean_squared_mean
    weight[3, 5], d[2, 1, 4] = 0, bad
    signed = gradient_moments(a.to(device), d.to(device), signed=True, weight=weight.to(device)).signed
    assert signed is not None
    assert math.isnan(signed.mean_squared_mean)
    assert not math.isfinite(signed.absolute_saliency or 0)
