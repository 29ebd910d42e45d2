"""Theorem 1 of L-SWAG as far as it can be proved: what one training step leaves of the loss of a linear regression.

L-SWAG (Casarin et al., CVPR 2025) takes the theorem from ZiCo (Li et al., ICLR 2023, theorem 3.1). The setting: M
samples (x_i, y_i) with x_i of unit norm, f(x) = a.x, the loss L_i = (a.x_i - y_i)^2 / 2 of a sample, its gradient
g_i = r_i x_i with r_i = a.x_i - y_i, and one step over the whole batch, a' = a - eta * sum_i g_i. With mu_j and sigma_j
the mean and the population standard deviation of weight j's gradient over the samples,

    sum_i L_i(a')  <=  M / 2 * sum_j [ sigma_j^2 + ((M eta - 1) mu_j)^2 ].

Proof. After the step r_i' = r_i - eta x_i.G with G = sum_k g_k = M mu. As |x_i| = 1, x_i.g_i = r_i, so that
r_i' = x_i.(g_i - eta G), and by Cauchy and Schwarz r_i'^2 <= |g_i - eta G|^2. Summed over i and halved, weight j gives
1/2 sum_i (g_ij - M eta mu_j)^2, which is M/2 times the variance of g_ij plus the square of the distance of its mean,
mu_j - M eta mu_j. Equality holds where every g_i - eta G is a multiple of x_i, as in one dimension.

At eta = 1 / M the mean drops out and the bound is M/2 sum_j sigma_j^2: the smaller sigma, the smaller the bound on what
is left, which is L-SWAG's reason to keep 1 / sigma and to leave mu out. Three conditions that are easily lost:

- Equation 4 takes sigma of |g|. With s_j and m_j the deviation and the mean of |g_ij|, s^2 + m^2 = sigma^2 + mu^2, so
  the bound reads M/2 sum_j [ s_j^2 + m_j^2 - M eta (2 - M eta) mu_j^2 ]. It has the theorem's form in s and m alone
  only where no weight's gradient changes sign over the samples (then m = |mu|); otherwise that form can fail: two
  samples x = 1 with y = 1 and -1 have s = 0 and keep a loss of 1.
- Unit norms are needed, not just bounded ones: x = 0 has no gradient, and keeps its loss.
- One pass of M steps, a sample each, can exceed the bound: the step is one over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Regression:
    """M samples of d features, of unit norm, and the weights before the step."""

    inputs: Floats  # [M, d]
    targets: Floats  # [M]
    weights: Floats  # [d]

    def gradients(self) -> Floats:
        """Returns the gradient of each sample's loss, [M, d]."""
        return (self.inputs @ self.weights - self.targets)[:, None] * self.inputs

    def loss(self, weights: Floats) -> float:
        """Returns the sum over the samples of half the squared residual."""
        return float(((self.inputs @ weights - self.targets) ** 2).sum() / 2)

    def loss_after_step(self, eta: float) -> float:
        """Returns the loss after one step over the whole batch."""
        return self.loss(self.weights - eta * self.gradients().sum(axis=0))

    def loss_after_pass(self, eta: float) -> float:
        """Returns the loss after M steps, a sample each."""
        weights = self.weights
        for x, y in zip(self.inputs, self.targets, strict=True):
            weights = weights - eta * (x @ weights - y) * x
        return self.loss(weights)


def bound(gradients: Floats, eta: float) -> float:
    """Returns the bound that is proved above: sigma and mu of the gradients themselves, [M, d]."""
    return _form(gradients, eta)


def bound_by_absolute(gradients: Floats, eta: float) -> float:
    """Returns the theorem's form with sigma as in equation 4, of |g|; a bound where no gradient changes sign."""
    return _form(np.abs(gradients), eta)


def _form(values: Floats, eta: float) -> float:
    samples = len(values)
    return float(samples / 2 * (values.var(axis=0) + ((samples * eta - 1) * values.mean(axis=0)) ** 2).sum())


def random_regression(samples: int, features: int, seed: int, *, one_sign: bool = False) -> Regression:
    """Draws a regression; with `one_sign` every weight's gradient has the same sign at all samples."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(samples, features))
    targets = inputs @ generator.normal(size=features) + generator.normal(size=samples)
    weights = generator.normal(size=features)
    if one_sign:
        inputs, targets, weights = np.abs(inputs), np.abs(targets), np.zeros(features)
    return Regression(inputs / np.linalg.norm(inputs, axis=1, keepdims=True), targets, weights)
