"""The determinant of a kernel of agreements, told apart from that of a singular one."""

from __future__ import annotations

import torch
from torch import Tensor


def log_determinant(kernel: Tensor) -> float | None:
    """Returns log |det K| of a symmetric positive semidefinite kernel [S, S], in float64, or None where K is singular.

    Singular means an eigenvalue of at most S * 2^-52 of the largest: what is below is rounding, as is its logarithm.
    """
    kernel = kernel.double().cpu()
    eigenvalues = torch.linalg.eigvalsh(kernel)
    if float(eigenvalues[0]) <= len(kernel) * 2.0**-52 * float(eigenvalues[-1]):
        return None
    return float(torch.linalg.slogdet(kernel)[1])
