"""Moments of a weight's gradients over groups of samples, without storing one gradient a group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..errors import InputError
from .arrays import refusals
from .gradient_moments_checks import DTYPES, accepted_tensor, listed
from .gradient_moments_cpu import empty_maps
from .gradient_moments_grouped import MomentProblem, gradient_moments_grouped
from .moments import DEAD, Convolution, GradientMoments, MomentMaps, SignedMoments, reduced

__all__ = [
    "Convolution",
    "GradientMoments",
    "MomentMaps",
    "MomentsAccumulator",
    "SignedMoments",
    "gradient_moments",
]


def gradient_moments(
    inputs: Tensor | Sequence[Tensor],
    output_grads: Tensor | Sequence[Tensor],
    groups: int | None = None,
    *,
    convolution: Convolution | None = None,
    signed: bool = False,
    maps: bool = False,
    weight: Tensor | None = None,
) -> GradientMoments:
    """Returns the moments of a weight's gradients g_k = (1/|k|) * sum over n in group k of d_n^T a_n.

    The S samples are cut into `groups` runs of S / groups neighbours (None: one sample each). Means and deviations are
    Welford's, deviations and all sums over weights in float64; output gradients and inputs are scaled by exact powers
    of two on the way, so that gradients of 1e-30 neither underflow nor cost precision. Gradients are summed in float32;
    in two or three groups, where one weight whose gradients nearly cancel can carry the sum of 1/sigma, those of
    float32 and float16 are summed in float64, at half the rate. The result has the same bits whatever the number of
    threads.

    Floor: 2 * S * T * O * I operations, those of the plain weight gradient, and one pass over the operands; nothing of
    size S * O * I is stored. A Zen 5 core reaches 155 to 190 GFLOP/s in float32 and 285 to 345 in bfloat16 on the
    layers of AutoFormer-Tiny, 0.7 to 0.8 of what the inner product alone does (`bench/bench_gradient_moments.py`).

    On a CUDA device a Triton kernel computes it, or with LSWAG_BACKEND=cuda on a Hopper GPU one in CUDA C++
    (`gradient_moments_grouped` for many weights in one launch, and which weights that takes). There,
    deviations are float32, but gradients, means and deviations float64 for two or three groups that are not bfloat16;
    gradients themselves, not operands, are scaled, so that products below 1e-38 are lost, and saliencies are NaN for
    weights of 1e29 and more.

    Args:
        inputs: a [S, T, I] (or [S, ..., I], or [S, I]) float32, bfloat16 or float16, any strides, read in place; with
            `convolution` [S, C, H, W]. Several for a weight that is used several times: contributions are summed
            before the absolute value. Any DLPack producer will do.
        output_grads: d [S, T, O], the gradients of each sample's own loss; with `convolution` [S, O, OH, OW]; as many.
        groups: G, from 2 to S and a divisor of S.
        convolution: how the weight [O, C / groups, KH, KW] was applied, where it is a kernel.
        signed: also the moments of the signed gradients.
        maps: also every weight's own statistics, [O, I] or [O, C / groups, KH, KW].
        weight: w in that shape, float32, bfloat16 or float16: the signed moments, which it needs, have its saliencies
            too.

    Raises:
        InputError: shapes that do not fit one another, G that does not divide S or is below 2, another dtype or device.
    """
    operands = listed("inputs", inputs), listed("output_grads", output_grads)
    if weight is not None:
        weight = accepted_tensor("weight", weight, DTYPES)
    problem = MomentProblem(*operands, groups, convolution, signed=signed, maps=maps, weight=weight)
    return gradient_moments_grouped([problem])[0]


class MomentsAccumulator:
    """The same statistics from group gradients that come one after the other, each already its group's mean.

    For weights whose per-sample gradients need a backward pass a group. State and arithmetic are float64. On another
    device than the CPU torch's operations do it there.
    """

    def __init__(self, shape: Sequence[int], *, signed: bool = False) -> None:
        """Starts without gradients of a weight of this shape."""
        self._shape = tuple(shape)
        self._numel = math.prod(self._shape)
        self._signed = signed
        self._groups = 0
        self._state: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient of the next group: of the weight's shape, float32, float64, bfloat16 or float16.

        Raises InputError for another shape or dtype, or another device than that of the first.
        """
        gradient = accepted_tensor("gradient", gradient, (*DTYPES, torch.float64))
        if tuple(gradient.shape) != self._shape:
            raise InputError(f"expected a gradient of shape {list(self._shape)}, got {list(gradient.shape)}")
        if self._state is None:
            self._state = self._fresh(gradient.device)
        if gradient.device != self._state.device:
            raise InputError(f"expected gradient on {self._state.device} as the first was, got {gradient.device}")
        if gradient.device.type != "cpu":
            return self._add_on_device(gradient.double(), self._state)
        if gradient.dtype not in (torch.float32, torch.float64):
            gradient = gradient.float()
        gradient, threads = gradient.contiguous(), torch.get_num_threads()
        with refusals():
            _C.accumulate_moments(gradient, self._groups, self._signed, threads, self._state)
        self._groups += 1

    def sums(self) -> Tensor | None:
        """Returns what `finish` waits for, float64 [5 or (signed) 11] on the gradients' device; None on the CPU.

        Raises InputError as `finish` does.
        """
        state = self._checked_state()
        return None if state.device.type == "cpu" else self._sums_on_device(state)[0]

    def finish(self, *, maps: bool = False, sums: Sequence[float] | None = None) -> GradientMoments:
        """Returns the moments of the gradients so far; raises InputError for fewer than 2 of them.

        A caller that has copied what `sums` returns to the host gives it here, and nothing waits for the device.
        """
        state = self._checked_state()
        if state.device.type != "cpu":
            return self._finish_on_device(state, maps=maps, sums=sums)
        return self._finish_on_cpu(state, maps=maps)

    def _checked_state(self) -> Tensor:
        if self._groups < 2 or self._state is None:
            raise InputError(f"moments need the gradients of 2 groups or more, got {self._groups}")
        return self._state

    def _finish_on_cpu(self, state: Tensor, *, maps: bool) -> GradientMoments:
        flat = empty_maps(self._numel, self._signed, maps)
        sums, exponent = _C.finish_moments(state, self._numel, self._groups, self._signed, flat)
        shaped = [m.view(self._shape) for m in flat]
        return reduced(sums, exponent, 1, self._numel, self._groups, self._signed, shaped)

    def _fresh(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return torch.empty(_C.moments_state_size(self._numel, self._signed), dtype=torch.float64)
        return torch.zeros(5 if self._signed else 2, *self._shape, dtype=torch.float64, device=device)

    def _add_on_device(self, gradient: Tensor, state: Tensor) -> None:
        """Welford's update of means and sums of squared deviations: of |g| in state[:2], of g in state[2:4]."""
        self._groups += 1
        for first, value in ((0, gradient.abs()), (2, gradient)):
            if first == 0 or self._signed:
                difference = value - state[first]
                state[first] += difference / self._groups
                state[first + 1] += difference.square() * ((self._groups - 1) / self._groups)
        if self._signed:
            state[4] += gradient.sign()

    def _finish_on_device(self, state: Tensor, *, maps: bool, sums: Sequence[float] | None = None) -> GradientMoments:
        if sums is None or maps:
            found, kept = self._sums_on_device(state)
            sums = found.tolist() if sums is None else sums
        given = [m.clone() for m in kept] if maps else []
        return reduced(tuple(sums), 0, 1, self._numel, self._groups, self._signed, given)

    def _sums_on_device(self, state: Tensor) -> tuple[Tensor, list[Tensor]]:
        mean, sigma, live = self._mean_sigma_live(state[:2])
        inverse = torch.where(live, 1 / sigma, 0.0)
        sums = [live.double().sum(), inverse.sum(), (mean * inverse).sum(), sigma.sum(), mean.sum()]
        kept = [sigma, mean]
        if self._signed:
            mean, sigma, live = self._mean_sigma_live(state[2:4])
            ratio = torch.where(live, (mean / sigma).square(), 0.0)
            sums += [live.double().sum(), ratio.sum(), mean.abs().sum(), mean.square().sum(), sigma.sum()]
            sums.append(state[4].abs().sum())
            kept += [sigma, mean, state[4]]
        return torch.stack(sums), kept

    def _mean_sigma_live(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean and sigma, both NaN where a gradient is not finite, and which weights are not dead."""
        sigma = (state[1] / self._groups).sqrt()
        finite = (sigma - sigma) + (state[0] - state[0])
        mean, sigma = state[0] + finite, sigma + finite
        return mean, sigma, ~(sigma <= DEAD * mean.abs())
