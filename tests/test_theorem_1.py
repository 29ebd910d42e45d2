"""Theorem 1 of L-SWAG (ZiCo's theorem 3.1) over random regressions; what is proved, and where it ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from theorem_1 import Floats, Regression, bound, bound_by_absolute

VALUES = st.floats(-100, 100, allow_subnormal=False)
STEPS = st.floats(0, 4)  # M * eta
ROUNDING = 1e-9


@st.composite
def regressions(draw: st.DrawFn, *, one_sign: bool = False, features: int | None = None) -> Regression:
    """Unit inputs, any targets and weights; with `one_sign` no weight's gradient changes sign over the samples."""
    samples = draw(st.integers(1, 6))
    width = features or draw(st.integers(1, 5))
    inputs: Floats = draw(arrays(np.float64, (samples, width), elements=VALUES))
    targets: Floats = draw(arrays(np.float64, samples, elements=VALUES))
    weights: Floats = draw(arrays(np.float64, width, elements=VALUES))
    if one_sign:
        inputs, targets, weights = np.abs(inputs), np.abs(targets), np.zeros(width)
    norms = np.linalg.norm(inputs, axis=1, keepdims=True)
    assume(bool((norms > 1e-3).all()))
    return Regression(inputs / norms, targets, weights)


def scale(regression: Regression) -> float:
    """What rounding is relative to."""
    return 1 + regression.loss(regression.weights)


@settings(deadline=None, max_examples=300)
@given(regression=regressions(), step=STEPS)
def test_the_loss_after_a_step_is_within_the_bound(regression: Regression, step: float) -> None:
    eta = step / len(regression.targets)
    assert regression.loss_after_step(eta) <= bound(regression.gradients(), eta) + ROUNDING * scale(regression)


@settings(deadline=None, max_examples=200)
@given(regression=regressions(one_sign=True), step=STEPS)
def test_sigma_of_equation_4_bounds_the_loss_where_no_gradient_changes_sign(
    regression: Regression, step: float
) -> None:
    eta = step / len(regression.targets)
    limit = bound_by_absolute(regression.gradients(), eta)
    assert regression.loss_after_step(eta) <= limit + ROUNDING * scale(regression)
    assert limit == pytest.approx(bound(regression.gradients(), eta))


@settings(deadline=None, max_examples=200)
@given(regression=regressions(), step=STEPS)
def test_the_bound_in_moments_of_the_absolute_gradient(regression: Regression, step: float) -> None:
    gradients, samples = regression.gradients(), len(regression.targets)
    absolute = np.abs(gradients)
    change = step * (2 - step) * gradients.mean(axis=0) ** 2
    expected = samples / 2 * (absolute.var(axis=0) + absolute.mean(axis=0) ** 2 - change).sum()
    assert bound(gradients, step / samples) == pytest.approx(expected, abs=1e-6 * scale(regression))


@settings(deadline=None, max_examples=200)
@given(regression=regressions(features=1), step=STEPS)
def test_in_one_dimension_the_bound_is_the_loss(regression: Regression, step: float) -> None:
    eta = step / len(regression.targets)
    expected = bound(regression.gradients(), eta)
    assert regression.loss_after_step(eta) == pytest.approx(expected, abs=ROUNDING * scale(regression))


@settings(deadline=None)
@given(regression=regressions())
def test_at_one_over_the_samples_sigma_alone_bounds_the_loss(regression: Regression) -> None:
    gradients, samples = regression.gradients(), len(regression.targets)
    expected = samples / 2 * gradients.var(axis=0).sum()
    assert bound(gradients, 1 / samples) == pytest.approx(expected, abs=ROUNDING * scale(regression))


def test_gradients_are_those_of_the_loss() -> None:
    regression = Regression(np.array([[0.6, 0.8]]), np.array([2.0]), np.array([1.0, -1.0]))
    for weight, expected in enumerate(regression.gradients().sum(axis=0)):
        ahead, behind = (regression.weights + h * np.eye(2)[weight] for h in (1e-6, -1e-6))
        assert (regression.loss(ahead) - regression.loss(behind)) / 2e-6 == pytest.approx(expected, rel=1e-6)


def test_where_the_theorem_ends() -> None:
    opposite = Regression(np.ones((2, 1)), np.array([1.0, -1.0]), np.zeros(1))
    assert bound_by_absolute(opposite.gradients(), 0.5) == 0 < opposite.loss_after_step(0.5) == 1
    assert opposite.loss_after_pass(0.5) > bound(opposite.gradients(), 0.5)
    without_norm = Regression(np.zeros((1, 1)), np.array([2.0]), np.zeros(1))
    assert bound(without_norm.gradients(), 1.0) == 0 < without_norm.loss_after_step(1.0)
