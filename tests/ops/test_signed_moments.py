"""Moments of the signed gradients, and their products with the weight."""

from __future__ import annotations

import math

import pytest
import torch
from gradients import (
    DTYPES,
    assert_holds,
    convolution_gradients,
    linear_gradients,
    normal,
    ones,
    uniform,
)

from lswag_fast import _C, reference
from lswag_fast.errors import InputError
from lswag_fast.ops.gradient_moments import Convolution, gradient_moments


def test_signed_sums_that_overflow_are_computed_again() -> None:
    """g of both signs near the largest float32: |g| has no deviation to overflow, but g has.

    Row 100 lies outside the pieces that the scale is found on, which then is 2^60 for either operand.
    """
    a, d = torch.full((4, 128, 48), 1e-6), torch.full((4, 128, 48), 1e-6)
    a[:, 100] = 14
    d[:, 100] = torch.tensor([14.0, -14.0, 14.0, -14.0])[:, None]
    moments = gradient_moments(a, d, signed=True)
    assert moments.signed is not None
    assert moments.signed.mean_sigma == pytest.approx(196, rel=1e-6)
    assert moments.signed.mean_squared_mean < 1e-6


@pytest.mark.parametrize("convolution", [None, Convolution((3, 3)), Convolution((3, 3), groups=20)])
def test_signed_moments(convolution: Convolution | None) -> None:
    shapes = ((6, 11, 70), (6, 11, 30)) if convolution is None else ((6, 20, 9, 8), (6, 20, 7, 6))
    a, d = (normal(n, *shape) for n, shape in enumerate(shapes))
    d[:, 4] = 0
    gradients = linear_gradients([a], [d], 3) if convolution is None else convolution_gradients(a, d, convolution, 3)
    stacked = torch.stack(gradients.groups)
    moments = gradient_moments(a, d, 3, convolution=convolution, signed=True, maps=True)
    assert_holds(moments, gradients)
    signed, maps = moments.signed, moments.maps
    assert signed is not None
    assert maps is not None
    mean, sigma = stacked.mean(0), stacked.std(0, correction=0)
    torch.testing.assert_close(maps.signed_mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.signed_sigma, sigma, rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.sign_sum, stacked.sign().sum(0))
    live = sigma > reference.DEAD * mean.abs()
    assert signed.dead == int((~live).sum())
    assert signed.mean_signal_to_noise == pytest.approx((mean / sigma)[live].square().mean().item(), rel=1e-3)
    assert signed.mean_abs_mean == pytest.approx(mean.abs().mean().item(), rel=1e-6)
    assert signed.mean_squared_mean == pytest.approx(mean.square().mean().item(), rel=1e-6)
    assert signed.mean_sigma == pytest.approx(sigma.mean().item(), rel=1e-6)
    assert signed.sign_agreement == pytest.approx(stacked.sign().sum(0).abs().mean().item() / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "slice", "columns apart"])
@pytest.mark.parametrize(
    "convolution", [None, Convolution((3, 3)), Convolution((3, 3), groups=2), Convolution((3, 3), groups=20)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_signed_saliencies_of_a_weight(
    channels_last: bool, convolution: Convolution | None, layout: str, dtype: torch.dtype
) -> None:
    shapes = ((6, 11, 75), (6, 11, 30)) if convolution is None else ((6, 20, 9, 8), (6, 20, 7, 6))
    a, d = (normal(n, *shape) for n, shape in enumerate(shapes))
    if channels_last and convolution is not None:
        a, d = (t.contiguous(memory_format=torch.channels_last) for t in (a, d))
    gradients = linear_gradients([a], [d], 3) if convolution is None else convolution_gradients(a, d, convolution, 3)
    mean = torch.stack(gradients.groups).mean(0)
    weight = normal(2, *mean.shape).to(dtype)
    if layout == "slice":
        weight = torch.nn.functional.pad(weight, (1, 2), value=math.nan)[..., 1:-2]
    elif layout == "columns apart":
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
    bare = gradient_moments(a, d, 3, convolution=convolution, signed=True)
    moments = gradient_moments(a, d, 3, convolution=convolution, signed=True, weight=weight)
    products = mean * weight.double()
    assert moments.signed is not None
    assert bare.signed is not None
    scale = products.abs().sum().item()
    assert moments.signed.saliency == pytest.approx(products.sum().item(), abs=1e-6 * scale)
    assert moments.signed.absolute_saliency == pytest.approx(scale, rel=1e-6)
    assert (bare.signed.saliency, bare.signed.absolute_saliency) == (None, None)
    assert moments.log_sum_inverse_sigma == bare.log_sum_inverse_sigma
    assert moments.signed.mean_sigma == bare.signed.mean_sigma


@pytest.mark.parametrize("groups", [4, 16, 64])
def test_signed_deviations_hold_where_one_group_is_of_another_sign(groups: int) -> None:
    """There the variance of g is closest to what it takes from that of |g|."""
    a = torch.full((groups, 1, 40), 3.0) + 1e-3 * normal(0, groups, 1, 40)
    d = torch.ones(groups, 1, 8)
    d[groups // 2] = -torch.logspace(-7, 0, 8)
    expected = torch.stack(linear_gradients([a], [d], groups).groups).std(0, correction=0)
    maps = gradient_moments(a, d, signed=True, maps=True).maps
    assert maps is not None
    torch.testing.assert_close(maps.signed_sigma, expected, rtol=1e-6 * groups, atol=0)


def test_signed_deviations_are_those_of_magnitudes_where_all_signs_agree() -> None:
    a, d = uniform(0, 16, 1, 50) + 0.5, uniform(1, 16, 1, 30) + 0.5
    a[3:, :, 7], d[3:, :, 5] = a[:1, :, 7], d[:1, :, 5]
    moments = gradient_moments(a, -d, signed=True, maps=True)
    assert moments.maps is not None
    assert moments.signed is not None
    assert torch.equal(moments.maps.signed_sigma, moments.maps.sigma)
    assert moments.signed.dead == moments.dead


def test_a_weight_that_does_not_fit_is_refused() -> None:
    a, d = normal(0, 4, 3, 10), normal(1, 4, 3, 6)
    with pytest.raises(InputError, match=r"weight of shape \[6, 10\], got \[10, 6\]"):
        gradient_moments(a, d, signed=True, weight=ones(10, 6))
    with pytest.raises(InputError, match="pass signed=True"):
        gradient_moments(a, d, weight=ones(6, 10))
    with pytest.raises(InputError, match="weight in one of float32, bfloat16, float16, got float64"):
        gradient_moments(a, d, signed=True, weight=ones(6, 10).double())
    native = _C.GradientMoments([a], [d], 4, None, True, 1)
    workspace = torch.empty(native.workspace_bytes, dtype=torch.uint8)
    for bad in (ones(6, 11), ones(6, 10, 1), ones(10, 6).t()):
        with pytest.raises(ValueError, match="a weight of 6 rows of 10 adjacent columns"):
            native.run(workspace, [], bad)
