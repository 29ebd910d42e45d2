"""Moments of gradients that come one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gradients import (
    DTYPES,
    NOT_FINITE,
    assert_nan,
    linear_gradients,
    normal,
    ones,
)

from lswag_fast import reference
from lswag_fast.errors import InputError
from lswag_fast.ops.gradient_moments import MomentsAccumulator, gradient_moments


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("first", [0, 2])
def test_an_accumulator_gives_nan_for_gradients_that_are_not_finite(first: int, value: float) -> None:
    accumulator = MomentsAccumulator((512,))
    for n in range(4):
        gradient = normal(n, 512)
        gradient[3] = value if n >= first else 1.0
        accumulator.add(gradient)
    assert_nan(accumulator.finish())


@pytest.mark.parametrize("value", [1.0, *NOT_FINITE])
def test_an_accumulator_of_another_device_follows_the_same_rules(value: float) -> None:
    here, elsewhere = MomentsAccumulator((7,)), MomentsAccumulator((7,))
    state = torch.zeros(2, 7, dtype=torch.float64)
    for n in range(4):
        gradient = normal(n, 7)
        gradient[3] = value
        here.add(gradient)
        elsewhere._add_on_device(gradient.double().abs(), state)
    moments = elsewhere._finish_on_device(state, maps=False)
    if value != 1.0:
        return assert_nan(moments)
    expected = here.finish()
    assert moments.dead == expected.dead == 1
    assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=1e-12)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("shape", "magnitude"), [((3,), 1.0), ((40, 30), 1e-30), ((70, 3, 3, 3), 1e-19)])
def test_gradients_that_come_one_by_one_give_the_same(
    dtype: torch.dtype, shape: tuple[int, ...], magnitude: float
) -> None:
    scale = magnitude if dtype != torch.float16 else 1.0
    gradients = [(normal(n, *shape) * scale).to(dtype) for n in range(5)]
    for gradient in gradients:
        gradient.view(-1)[1] = -0.5 * scale if gradient is gradients[2] else 0.5 * scale
    accumulator = MomentsAccumulator(shape, signed=True)
    for gradient in gradients:
        accumulator.add(gradient)
    moments = accumulator.finish(maps=True)
    doubles = [g.double() for g in gradients]
    expected = reference.moments_of(doubles)
    assert moments.maps is not None
    close = {"rtol": 1e-12, "atol": 1e-14 * scale}
    torch.testing.assert_close(moments.maps.sigma, expected.sigma, **close)
    torch.testing.assert_close(moments.maps.mean_abs, expected.mean_abs, **close)
    torch.testing.assert_close(moments.maps.signed_mean, torch.stack(doubles).mean(0), **close)
    assert moments.dead == int(expected.dead.sum()) == 1
    assert moments.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=1e-12)
    assert moments.log_sum_mean_over_sigma == pytest.approx(expected.log_sum_mean_over_sigma, abs=1e-12)


def test_an_accumulator_on_a_device_gives_the_same() -> None:
    gradients = [normal(n, 20, 30) for n in range(5)]
    for gradient in gradients:
        gradient[3, 4] = 0.5
    on_cpu, on_device = MomentsAccumulator((20, 30)), MomentsAccumulator((20, 30))
    state = torch.zeros(2, 20, 30, dtype=torch.float64)
    for gradient in gradients:
        on_cpu.add(gradient)
        on_device._add_on_device(gradient.double().abs(), state)
    expected, found = on_cpu.finish(maps=True), on_device._finish_on_device(state, maps=True)
    assert found.dead == expected.dead == 1
    assert found.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, abs=1e-12)
    assert found.log_sum_mean_over_sigma == pytest.approx(expected.log_sum_mean_over_sigma, abs=1e-12)
    assert found.mean_abs_gradient == pytest.approx(expected.mean_abs_gradient, rel=1e-12)
    assert found.maps is not None
    assert expected.maps is not None
    torch.testing.assert_close(found.maps.sigma, expected.maps.sigma, rtol=1e-12, atol=0)
    sums = on_device._sums_on_device(state)[0]
    assert on_device._finish_on_device(state, maps=False, sums=sums.tolist()) == replace(found, maps=None)
    assert on_cpu.sums() is None


def test_an_accumulator_agrees_with_the_fused_form() -> None:
    a, d = normal(0, 6, 9, 30), normal(1, 6, 9, 20)
    accumulator = MomentsAccumulator((20, 30))
    for gradient in linear_gradients([a], [d], 6).groups:
        accumulator.add(gradient.float())
    streamed, fused = accumulator.finish(), gradient_moments(a, d)
    assert streamed.log_sum_inverse_sigma == pytest.approx(fused.log_sum_inverse_sigma, abs=1e-5)
    assert streamed.mean_abs_gradient == pytest.approx(fused.mean_abs_gradient, rel=1e-6)


def test_an_accumulator_refuses_bad_gradients() -> None:
    accumulator = MomentsAccumulator((3, 2))
    with pytest.raises(InputError, match=r"shape \[3, 2\], got \[2, 3\]"):
        accumulator.add(ones(2, 3))
    with pytest.raises(InputError, match="got int64"):
        accumulator.add(ones(3, 2).long())
    accumulator.add(ones(3, 2))
    with pytest.raises(InputError, match="2 groups or more, got 1"):
        accumulator.finish()
