"""Gradients in float64 by their definition, and what moments of them are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lswag_fast import reference
from lswag_fast.ops.gradient_moments import Convolution, GradientMoments

ROUNDING = 2.0**-24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Gradients:
    """Group gradients in float64, and for each the same sum over |d| |a|, which bounds what float32 sums can lose."""

    groups: list[Tensor]
    absolute: list[Tensor]
    terms: int
    all_bfloat16: bool

    @property
    def rounding(self) -> Tensor:
        """What products and sums of `terms` terms in a row may put on g, a standard deviation or two of it.

        They are float32, but float64 from float32 in two or three groups.
        """
        unit = 2.0**-53 if len(self.groups) <= 3 and not self.all_bfloat16 else ROUNDING
        return (4 + 2 * math.sqrt(self.terms)) * unit * torch.stack(self.absolute).amax(0)


def linear_gradients(inputs: Sequence[Tensor], output_grads: Sequence[Tensor], groups: int) -> Gradients:
    def weight_gradient(n: int, *, absolute: bool) -> Tensor:
        total = torch.zeros(output_grads[0].shape[-1], inputs[0].shape[-1], dtype=torch.float64)
        for a, d in zip(inputs, output_grads, strict=True):
            rows_a, rows_d = a[n].double().reshape(-1, a.shape[-1]), d[n].double().reshape(-1, d.shape[-1])
            total += rows_d.abs().T @ rows_a.abs() if absolute else rows_d.T @ rows_a
        return total

    samples = len(inputs[0])
    terms = sum(a[0].numel() // a.shape[-1] for a in inputs) * (samples // groups)
    grouped = torch.arange(samples).view(groups, -1).tolist()
    return Gradients(
        [sum(weight_gradient(n, absolute=False) for n in group) / len(group) for group in grouped],
        [sum(weight_gradient(n, absolute=True) for n in group) / len(group) for group in grouped],
        terms,
        all(t.dtype == torch.bfloat16 for t in (*inputs, *output_grads)),
    )


def convolution_gradients(inputs: Tensor, output_grads: Tensor, convolution: Convolution, groups: int) -> Gradients:
    c = convolution
    weight = torch.zeros(
        output_grads.shape[1], inputs.shape[1] // c.groups, *c.kernel_size, dtype=torch.float64, requires_grad=True
    )

    def weight_gradient(rows: Tensor, grads: Tensor) -> Tensor:
        # Zeros enough for every read beyond the plane: the padding at its end follows from the output's size.
        ends = [
            (out - 1) * stride + (kernel - 1) * dilation + 1 - pad - size
            for out, stride, kernel, dilation, pad, size in zip(
                grads.shape[2:], c.stride, c.kernel_size, c.dilation, c.padding, rows.shape[2:], strict=True
            )
        ]
        padded = F.pad(rows, (c.padding[1], max(ends[1], 0), c.padding[0], max(ends[0], 0)))
        out = F.conv2d(padded, weight, None, c.stride, 0, c.dilation, c.groups)
        return torch.autograd.grad(out[:, :, : grads.shape[2], : grads.shape[3]], weight, grads)[0]

    a, d = inputs.double(), output_grads.double()
    size = len(a) // groups
    parts = [slice(k * size, (k + 1) * size) for k in range(groups)]
    return Gradients(
        [weight_gradient(a[p], d[p]) / size for p in parts],
        [weight_gradient(a[p].abs(), d[p].abs()) / size for p in parts],
        size * d.shape[2] * d.shape[3],
        inputs.dtype == output_grads.dtype == torch.bfloat16,
    )


def assert_holds(moments: GradientMoments, gradients: Gradients) -> None:
    """Holds the maps to the rounding of the sums, and for G >= 4 the log terms to 1e-5."""
    expected = reference.moments_of(gradients.groups)
    assert moments.maps is not None
    slack = gradients.rounding + 8 * ROUNDING * expected.mean_abs
    for got, wanted in ((moments.maps.sigma, expected.sigma), (moments.maps.mean_abs, expected.mean_abs)):
        assert got.shape == wanted.shape
        assert torch.all((got - wanted).abs() <= slack)
    assert moments.numel == expected.numel
    certain = (expected.sigma - reference.DEAD * expected.mean_abs).abs() > slack
    dead = moments.maps.sigma <= reference.DEAD * moments.maps.mean_abs
    assert torch.equal(dead[certain], expected.dead[certain])
    assert moments.dead == int(dead.sum())
    count = expected.numel
    assert moments.mean_sigma == pytest.approx(moments.maps.sigma.mean().item(), rel=1e-12)
    assert moments.mean_abs_gradient == pytest.approx(moments.maps.mean_abs.mean().item(), rel=1e-12)
    if moments.dead == count:
        assert moments.log_sum_inverse_sigma is None
        assert moments.log_sum_mean_over_sigma is None
        return
    alive = ~dead
    sigma, mean = moments.maps.sigma[alive], moments.maps.mean_abs[alive]
    assert moments.log_sum_inverse_sigma == pytest.approx((1 / sigma).sum().log().item(), abs=1e-12)
    assert moments.log_sum_mean_over_sigma == pytest.approx((mean / sigma).sum().log().item(), abs=1e-12)
    if len(gradients.groups) >= 4 and torch.all(certain):
        assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=1e-5)
        assert moments.log_sum_mean_over_sigma == pytest.approx(expected.log_sum_mean_over_sigma, abs=1e-5)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_few_groups_hold(moments: GradientMoments, gradients: Gradients, tolerance: float) -> None:
    """Holds every weight's sigma, of |g| and of g, to `tolerance` of its largest |g|, and finds the same dead."""
    stacked = torch.stack(gradients.groups)
    expected = reference.moments_of(gradients.groups)
    maps, bound = moments.maps, tolerance * stacked.abs().amax(0)
    assert maps is not None
    assert maps.signed_sigma is not None
    assert torch.all((maps.sigma - expected.sigma).abs() <= bound)
    assert torch.all((maps.signed_sigma - stacked.std(0, correction=0)).abs() <= bound)
    assert torch.equal(maps.sigma <= reference.DEAD * maps.mean_abs, expected.dead)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


NOT_FINITE = (math.inf, -math.inf, math.nan)


def assert_nan(moments: GradientMoments) -> None:
    terms = (moments.log_sum_inverse_sigma, moments.log_sum_mean_over_sigma)
    assert all(math.isnan(0.0 if term is None else term) for term in terms)
    assert math.isnan(moments.mean_sigma)
    assert math.isnan(moments.mean_abs_gradient)
    assert 0 <= moments.dead <= moments.numel


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def output_sides(convolution: Convolution, size: int) -> list[int]:
    """Returns height and width of what a convolution makes of a plane of size x size."""
    c = convolution
    settings = zip(c.kernel_size, c.stride, c.padding, c.dilation, strict=True)
    return [(size + 2 * p - (k - 1) * r - 1) // s + 1 for k, s, p, r in settings]


def assert_signed_holds(moments: GradientMoments, gradients: list[Tensor], *, bound: float = 1e-6) -> None:
    """Holds the statistics to those of the definition in float64, the maps to `bound` times the largest g."""
    stacked = torch.stack(gradients)
    mean, sigma = stacked.mean(0), stacked.std(0, correction=0)
    still = sigma <= reference.DEAD * mean.abs()
    slack = bound * stacked.abs().max()
    signed, maps = moments.signed, moments.maps
    assert signed is not None
    assert maps is not None
    assert torch.all((maps.signed_mean.cpu() - mean).abs() <= slack)
    assert torch.all((maps.signed_sigma.cpu() - sigma).abs() <= slack)
    assert maps.sign_sum.shape == mean.shape
    # A gradient within rounding of 0 may have either sign.
    certain = (stacked.abs() > slack).logical_or(stacked == 0).all(0)
    assert torch.equal(maps.sign_sum.cpu()[certain], stacked.sign().sum(0)[certain])
    assert signed.dead == int(still.sum())
    assert signed.mean_abs_mean == pytest.approx(mean.abs().mean().item(), rel=1e-5)
    assert signed.mean_squared_mean == pytest.approx(mean.square().mean().item(), rel=1e-5)
    assert signed.mean_sigma == pytest.approx(sigma.mean().item(), rel=1e-5)
    agreement = maps.sign_sum.abs().mean().item() / len(gradients)
    assert signed.sign_agreement == pytest.approx(agreement, rel=1e-6)
    if len(gradients) >= 4:
        ratio = (mean / sigma)[~still].square().mean().item()
        assert signed.mean_signal_to_noise == pytest.approx(ratio, rel=1e-4)
    # The statistics of |g| are those of a launch without signed moments.
    expected = reference.moments_of(gradients)
    assert moments.dead == int(expected.dead.sum())
    assert torch.all((maps.sigma.cpu() - expected.sigma).abs() <= slack)
    if len(gradients) >= 4:
        assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=1e-5)
