"""grad_norm: the size of the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class GradNorm(Proxy):
    """Sum over layers of the Euclidean norm of the gradient of the batch's mean loss.

    Where samples are coupled, each group is a batch of its own, and the gradient is the mean of theirs.
    """

    name: ClassVar[str] = "grad_norm"
    source: ClassVar[str] = "Abdelfattah, Mehrotra, Dudziak, Lane, ICLR 2021, section 3.2"
    gradient_based: ClassVar[bool] = True
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.GRADIENT,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return math.fsum(layer.gradient.norm for layer in evidence.layers if layer.gradient)
