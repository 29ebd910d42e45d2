"""l2_norm: the size of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class L2Norm(Proxy):
    """Sum over layers of the Euclidean norm of the weight."""

    name: ClassVar[str] = "l2_norm"
    source: ClassVar[str] = "Abdelfattah, Mehrotra, Dudziak, Lane, ICLR 2021 (the baseline of its code)"
    gradient_based: ClassVar[bool] = False
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.NORMS,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return math.fsum(layer.norm for layer in evidence.layers)
