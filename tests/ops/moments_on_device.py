"""Operands on a CUDA device and what moments of them are held to, for the tests of every kernel that computes them."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from lswag_fast import reference
from lswag_fast.ops.gradient_moments import GradientMoments
from lswag_fast.ops.gradient_moments_grouped import MomentProblem

TOKENS = 197


def device() -> torch.device:
    return torch.device("cuda")


def fresh(*shape: int, dtype: torch.dtype, magnitude: float = 1.0) -> Tensor:
    # From the system's entropy, not a seed: every run sees other numbers.
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
    return (torch.randn(*shape, generator=generator) * magnitude).to(dtype)


def poison() -> None:
    """Fills the memory that the allocator hands out next with NaN."""
    blocks = [torch.full((size,), math.nan, device=device()) for size in (2**8, 2**12, 2**16, 2**20, 2**24)]
    del blocks


def linear(
    out: int, width: int, samples: int, dtype: torch.dtype, **options: object
) -> tuple[Tensor, Tensor, MomentProblem]:
    a, d = fresh(samples, TOKENS, width, dtype=dtype), fresh(samples, TOKENS, out, dtype=dtype, magnitude=1e-4)
    return a, d, MomentProblem(in_wider(a.to(device())), d.to(device()), **options)  # type: ignore[arg-type]


def in_wider(values: Tensor) -> Tensor:
    """Returns a copy as the engine has it: the first columns of a wider tensor, all others of which are NaN."""
    width = values.shape[-1]
    wide = torch.full((*values.shape[:-1], width + 64), math.nan, dtype=values.dtype, device=values.device)
    wide[..., :width] = values
    return wide[..., :width]


def assert_holds(moments: GradientMoments, expected: reference.Moments, tolerance: float) -> None:
    assert moments.numel == expected.numel
    assert moments.dead == int(expected.dead.sum())
    assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=tolerance)
    assert moments.log_sum_mean_over_sigma == pytest.approx(expected.log_sum_mean_over_sigma, abs=tolerance)
    assert moments.mean_sigma == pytest.approx(expected.sigma.mean().item(), rel=tolerance)
    assert moments.mean_abs_gradient == pytest.approx(expected.mean_abs.mean().item(), rel=tolerance)
    if moments.maps is not None:
        slack = tolerance * expected.mean_abs.max()
        assert torch.all((moments.maps.sigma.cpu() - expected.sigma).abs() <= slack)
        assert torch.all((moments.maps.mean_abs.cpu() - expected.mean_abs).abs() <= slack)
