"""Jacobian covariance: how differently a network's output depends on different images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .evidence import Evidence
from .proxy import Proxy, UnavailableError, finite

OFFSET = 1e-5


def correlation(rows: Tensor) -> Tensor:
    """Returns the Pearson correlations [n, n] float64 of rows [n, values].

    Raises UnavailableError where a row is not finite, or has one value throughout, which correlates with nothing.
    """
    rows = rows.double()
    if not bool(torch.isfinite(rows).all()):
        raise UnavailableError("the gradient of the logits at the images is not finite")
    if bool((rows.amax(1) == rows.amin(1)).any()):
        raise UnavailableError("the gradient of the logits is the same at every value of some image, as where it is 0")
    centred = rows - rows.mean(1, keepdim=True)
    unit: Tensor = centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return unit @ unit.T


@dataclass(frozen=True)
class Jacov(Proxy):
    """- sum over the eigenvalues v of the correlations of the Jacobian's rows, of log(v + 1e-5) + 1 / (v + 1e-5).

    Row n of the Jacobian is the gradient at image n of the sum of all logits, and the correlations are Pearson's
    between the rows, [S, S]. The first version of the paper has it (arXiv 2006.04647v1, section 3); the published one
    (ICML 2021) has NWOT in its place. Code and paper agree, and NASLib, zero-cost-nas and NAS-Bench-Suite-Zero take
    the code. That calls a general eigenvalue solver, which can return complex values by rounding; here it is the
    symmetric one, in float64, on a Jacobian in float32. Where batch normalisation couples the samples, a row holds what
    its image does to the logits of all, as in the code.
    """

    name: ClassVar[str] = "jacov"
    source: ClassVar[str] = "Mellor, Turner, Storkey, Crowley, arXiv 2006.04647v1 (2020), section 3"
    gradient_based: ClassVar[bool] = True

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network. Raises UnavailableError for a row without correlations."""
        shifted = self._eigenvalues(evidence) + OFFSET
        value = -float((shifted.log() + shifted.reciprocal()).sum())
        return finite(value, "the eigenvalues of the correlations are not finite")

    def details(self, evidence: Evidence) -> dict[str, float]:
        """Returns `conditioning`: the largest over the smallest eigenvalue of the correlations + 1e-5."""
        shifted = self._eigenvalues(evidence) + OFFSET
        return {"conditioning": float(shifted[-1] / shifted[0])}

    @staticmethod
    def _eigenvalues(evidence: Evidence) -> Tensor:
        eigenvalues: Tensor = torch.linalg.eigvalsh(correlation(evidence.network.input_jacobian))
        return eigenvalues
