"""What the moments of a weight's gradients are, and how a kernel's sums become them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

DEAD = 2.0**-22
"""A weight is dead where its sigma is at most this times its mean |g|."""


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution as PyTorch means its arguments; a one-dimensional one has height 1.

    `padding` is what lies before the first row and column: reads past the end of the plane are zero whatever the
    padding there, so asymmetric padding ("same" with even kernels) needs no more than this.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class SignedMoments:
    """Statistics of the signed g, which proxies other than L-SWAG and ZiCo are made of.

    Live weights are here those with a standard deviation of g above 2^-22 * |mean of g|.
    """

    dead: int
    mean_signal_to_noise: float | None
    """mean over live weights of (mean g)^2 / var g: GSNR (Liu et al., ICLR 2020, arXiv 2001.07384); None: no live."""
    mean_abs_mean: float
    """mean over weights of |mean g|."""
    mean_squared_mean: float
    """mean over weights of (mean g)^2: the squared norm of the whole batch's gradient is numel times this."""
    mean_sigma: float
    """mean over weights of the standard deviation of g."""
    sign_agreement: float
    """mean over weights of |sum_k sign g_k| / G: 1 where all groups agree, 0 where half of them do."""
    saliency: float | None = None
    """sum over weights of mean g * w, where the weight was given."""
    absolute_saliency: float | None = None
    """sum over weights of |mean g * w|, likewise (SNIP, Lee et al., ICLR 2019)."""


@dataclass(frozen=True)
class MomentMaps:
    """The statistics of every weight, float64 in the shape of the weight; the signed ones only where asked."""

    sigma: Tensor
    mean_abs: Tensor
    signed_sigma: Tensor | None = None
    signed_mean: Tensor | None = None
    sign_sum: Tensor | None = None


@dataclass(frozen=True)
class GradientMoments:
    """Moments of |g| over G groups, population form, summed over one weight (L-SWAG equations 1 and 6, ZiCo)."""

    numel: int
    dead: int
    """Weights whose g are all 0, or whose sigma <= 2^-22 * mean|g|: rounding alone made it."""
    log_sum_inverse_sigma: float | None
    """log of the sum over live weights of 1 / sigma; None where all are dead, NaN where a gradient is not finite."""
    log_sum_mean_over_sigma: float | None
    """log of the sum over live weights of mean|g| / sigma: ZiCo's term (Li et al., ICLR 2023, arXiv 2301.11300)."""
    mean_sigma: float
    """mean over all weights, dead ones included, of sigma."""
    mean_abs_gradient: float
    """mean over all weights of mean_k |g_k|."""
    signed: SignedMoments | None = None
    maps: MomentMaps | None = None


def reduced(
    sums: tuple[float, ...],
    exponent: int,
    group_size: int,
    numel: int,
    groups: int,
    signed: bool,
    maps: list[Tensor],
    *,
    with_weight: bool = False,
) -> GradientMoments:
    """Returns the moments from sums over the weights of gradients in units of 2^-exponent / group_size.

    Where a gradient is not finite, the padding of a tile may count as live.
    """
    live, inverse, ratio, sigma, mean, *rest = sums
    log_unit = -exponent * math.log(2) - math.log(group_size)
    unit = math.ldexp(1.0, -exponent) / group_size
    return GradientMoments(
        numel=numel,
        dead=max(0, numel - round(live)),
        log_sum_inverse_sigma=_log(inverse) - log_unit if live or math.isnan(inverse) else None,
        log_sum_mean_over_sigma=_log(ratio) if live or math.isnan(ratio) else None,
        mean_sigma=sigma / numel * unit,
        mean_abs_gradient=mean / numel * unit,
        signed=_reduced_signed(rest, unit, numel, groups, with_weight) if signed else None,
        maps=MomentMaps(*maps) if maps else None,
    )


def _reduced_signed(sums: list[float], unit: float, numel: int, groups: int, with_weight: bool) -> SignedMoments:
    live, ratio, mean, square, sigma, signs, *saliencies = sums
    return SignedMoments(
        dead=max(0, numel - round(live)),
        mean_signal_to_noise=ratio / live if live else None,
        mean_abs_mean=mean / numel * unit,
        mean_squared_mean=square / numel * unit * unit,
        mean_sigma=sigma / numel * unit,
        sign_agreement=signs / numel / groups,
        saliency=saliencies[0] * unit if with_weight else None,
        absolute_saliency=saliencies[1] * unit if with_weight else None,
    )


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan
