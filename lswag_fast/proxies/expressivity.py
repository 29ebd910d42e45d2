"""Psi: the expressivity of L-SWAG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class Expressivity(Proxy):
    """Psi: the number of distinct sample-wise activation patterns up to the end of the window (equation 7).

    ReLU, ReLU6, GELU, SiLU and Hardswish count alike, by the sign of their value.
    """

    name: ClassVar[str] = "psi"
    source: ClassVar[str] = "Casarin, Escalera, Lanz, CVPR 2025, equation 7"
    gradient_based: ClassVar[bool] = False
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS,))
    whole: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return float(evidence.expressivity)
