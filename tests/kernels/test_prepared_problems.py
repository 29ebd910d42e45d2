"""Problems of gradient moments that are launched again and again on other values of the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lswag_fast.ops.gradient_moments import GradientMoments
from lswag_fast.ops.gradient_moments_grouped import MomentProblem, PreparedProblem, gradient_moments_grouped

KINDS: dict[str, tuple[Callable[[Tensor, Tensor], MomentProblem], bool]] = {
    "plain": (lambda a, d: MomentProblem(a, d, 4), True),
    "a slice": (lambda a, d: MomentProblem(a[..., :24], d[..., :8], 2), True),
    "tied": (lambda a, d: MomentProblem([a, a], [d, d], 4), True),
    "signed": (lambda a, d: MomentProblem(a, d, 4, signed=True), True),
    "signed, with a weight": (
        lambda a, d: MomentProblem(
            a, d, 4, signed=True, weight=torch.linspace(-1, 1, 512, device=a.device).view(16, 32)
        ),
        True,
    ),
    "signed, with a weight that is copied": (
        lambda a, d: MomentProblem(a, d, 4, signed=True, weight=torch._neg_view(torch.ones(16, 32, device=a.device))),
        False,
    ),
    "maps": (lambda a, d: MomentProblem(a, d, 4, maps=True), False),
    "tokens that only a copy merges": (
        lambda a, d: MomentProblem(a.unflatten(1, (2, 3)).transpose(1, 2), d.unflatten(1, (3, 2)), 4),
        False,
    ),
    "negated lazily": (lambda a, d: MomentProblem(a, torch._neg_view(d), 4), False),
    "with a graph": (lambda a, d: MomentProblem(a, d.detach().requires_grad_(), 4), False),
}
"""Of operands [4, 6, 32] and [4, 6, 16]: a problem, and whether it is worked out but once."""


def drawn(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, d = torch.randn(4, 6, 32, generator=generator), torch.randn(4, 6, 16, generator=generator)
    return a.to(device), d.to(device)


def without_maps(moments: GradientMoments) -> GradientMoments:
    return replace(moments, maps=None)


@pytest.mark.parametrize("kind", KINDS)
def test_each_launch_takes_the_values_of_its_time(device: torch.device, kind: str) -> None:
    make, once = KINDS[kind]
    a, d = drawn(0, device)
    prepared = PreparedProblem(make(a, d))
    before = None
    for seed in (0, 1, 2):
        for tensor, values in zip((a, d), drawn(seed, device), strict=True):
            tensor.copy_(values)
        found, expected = gradient_moments_grouped([prepared, prepared.problem])
        assert without_maps(found) == without_maps(expected)
        if found.maps is not None:
            assert expected.maps is not None
            assert torch.equal(found.maps.sigma, expected.maps.sigma)
        assert found.mean_sigma != before
        before = found.mean_sigma
    assert (prepared.launchable(False) is prepared.launchable(False)) == once


def test_a_prepared_problem_is_launched_by_the_backend_of_its_time(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type != "cpu":
        pytest.skip("C++ takes no tensors of a device")
    prepared = PreparedProblem(MomentProblem(*drawn(0, device)))
    (interpreted,) = gradient_moments_grouped([prepared])
    monkeypatch.setenv("LSWAG_BACKEND", "cpp")
    (native,) = gradient_moments_grouped([prepared])
    assert interpreted != native
    assert interpreted.mean_sigma == pytest.approx(native.mean_sigma, rel=1e-6)
