"""L-SWAG: trainability times expressivity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class Lswag(Proxy):
    """Lambda times Psi, with the window, numerator and pooling of the score (equation 8)."""

    name: ClassVar[str] = "lswag"
    source: ClassVar[str] = "Casarin, Escalera, Lanz, CVPR 2025, equation 8"
    gradient_based: ClassVar[bool] = True
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.MOMENTS, Need.PATTERNS))
    whole: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return evidence.trainability * evidence.expressivity
