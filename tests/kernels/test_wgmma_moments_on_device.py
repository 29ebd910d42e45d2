"""The CUDA C++ kernel of gradient moments on a Hopper GPU, against float64 on the CPU and against the Triton kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from moments_on_device import assert_holds, fresh, linear, poison

from lswag_fast import _C, backends, reference
from lswag_fast.ops.gradient_moments import GradientMoments
from lswag_fast.ops.gradient_moments_grouped import MomentProblem, gradient_moments_grouped, launch_gradient_moments

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not _C.cuda_has_grouped_moments(torch.cuda.current_device()),
    reason="torch finds no device of compute capability 9.0, or this build holds no code for sm_90a",
)

LAYERS = [(576, 192), (192, 192), (768, 216), (216, 864), (840, 240), (240, 960), (40, 24)]
"""[O, I]; 840 and 40 leave the second half of a last tile without rows."""


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """CUDA C++ is preferred; the list grows by the tiles of each of its launches."""
    found: list[int] = []
    launch = _C.cuda_grouped_moments

    def noted(*arguments: object) -> None:
        found.append(arguments[7] - arguments[6])  # type: ignore[operator]
        launch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_C, "cuda_grouped_moments", noted)
    with backends.preferring("cuda"):
        yield found


def assert_near(one: GradientMoments, other: GradientMoments) -> None:
    assert (one.numel, one.dead) == (other.numel, other.dead)
    for name in ("log_sum_inverse_sigma", "log_sum_mean_over_sigma"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5)
    assert one.mean_sigma == pytest.approx(other.mean_sigma, rel=1e-5)
    assert one.mean_abs_gradient == pytest.approx(other.mean_abs_gradient, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 197, 500])
def test_small_tiles_hold_to_float64(launches: list[int], tokens: int, dtype: torch.dtype) -> None:
    a, d = fresh(6, tokens, 136, dtype=dtype), fresh(6, tokens, 72, dtype=dtype, magnitude=1e-2)
    poison()
    moments = gradient_moments_grouped([MomentProblem(a.cuda(), d.cuda())])[0]
    assert launches == [4]
    assert_holds(moments, reference.gradient_moments(a, d, 6), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("samples", "groups"), [(16, 16), (16, 4)])
def test_the_layers_of_autoformer_hold_to_float64(
    launches: list[int], samples: int, groups: int, dtype: torch.dtype
) -> None:
    operands = [linear(out, width, samples, dtype, groups=groups) for out, width in LAYERS]
    poison()
    for (a, d, _), moments in zip(operands, gradient_moments_grouped([p for *_, p in operands]), strict=True):
        assert_holds(moments, reference.gradient_moments(a, d, groups), 1e-5)
    assert len(launches) == 1


def test_many_tiles_a_multiprocessor_agree_with_triton() -> None:
    problems = [linear(out, width, 64, torch.bfloat16)[2] for out, width in [(1536, 384), (384, 1536), (1024, 2048)]]
    problems *= 4
    found = gradient_moments_grouped(problems)
    with backends.preferring("triton"):
        expected = gradient_moments_grouped(problems)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


def test_weights_that_it_does_not_take_go_to_triton(launches: list[int]) -> None:
    taken = [linear(out, width, 16, torch.bfloat16) for out, width in LAYERS]
    left = [
        linear(756, 216, 16, torch.bfloat16),
        linear(192, 192, 16, torch.float32),
        linear(192, 192, 16, torch.bfloat16, signed=True),
        linear(240, 240, 16, torch.bfloat16, maps=True),
    ]
    mixed = [item for pair in zip(taken, left, strict=False) for item in pair] + taken[len(left) :]
    for (a, d, _), moments in zip(mixed, gradient_moments_grouped([p for *_, p in mixed]), strict=True):
        assert_holds(moments, reference.gradient_moments(a, d, 16), 1e-5)
    assert len(launches) == 1


def test_groups_of_samples_that_lie_apart_hold_to_float64() -> None:
    a, d = fresh(33, 12, 136, dtype=torch.bfloat16), fresh(33, 12, 72, dtype=torch.bfloat16)
    problem = MomentProblem(a.cuda().transpose(0, 1), d.cuda().transpose(0, 1), 4)
    moments = gradient_moments_grouped([problem])[0]
    assert_holds(moments, reference.gradient_moments(a.transpose(0, 1), d.transpose(0, 1), 4), 1e-5)


def test_equal_magnitudes_are_exactly_dead() -> None:
    a = fresh(1, 197, 192, dtype=torch.bfloat16).expand(8, -1, -1)
    d = fresh(1, 197, 200, dtype=torch.bfloat16) * torch.tensor([1, -1] * 4, dtype=torch.bfloat16).view(-1, 1, 1)
    moments = gradient_moments_grouped([MomentProblem(a.cuda(), d.cuda())])[0]
    assert moments.dead == moments.numel


def test_a_number_that_is_not_finite_is_seen() -> None:
    a, d = fresh(8, 50, 136, dtype=torch.bfloat16), fresh(8, 50, 72, dtype=torch.bfloat16)
    a[3, 7, 100] = math.inf
    assert math.isnan(gradient_moments_grouped([MomentProblem(a.cuda(), d.cuda())])[0].mean_sigma)


def test_bits_are_the_same_run_to_run_and_in_every_grouping() -> None:
    problems = [linear(out, width, 16, torch.bfloat16)[2] for out, width in LAYERS for _ in range(3)]
    together = gradient_moments_grouped(problems)
    for _ in range(20):
        poison()
        assert gradient_moments_grouped(problems) == together
    assert gradient_moments_grouped(problems[::-1]) == together[::-1]
    assert [gradient_moments_grouped([p])[0] for p in problems] == together


def test_a_launch_waits_for_nothing() -> None:
    problems = [linear(out, width, 16, torch.bfloat16)[2] for out, width in LAYERS]
    expected = gradient_moments_grouped(problems)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = launch_gradient_moments(problems)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.finish() == expected
