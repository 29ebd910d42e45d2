"""L-SWAG and its two factors (Casarin, Escalera, Lanz, CVPR 2025, equations 1, 6, 7, 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy

_SOURCE = "Casarin, Escalera, Lanz, CVPR 2025"


@dataclass(frozen=True)
class Lswag(Proxy):
    """Lambda times Psi, with the window, numerator and pooling of the score (equation 8)."""

    name: ClassVar[str] = "lswag"
    source: ClassVar[str] = f"{_SOURCE}, equation 8"
    gradient_based: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.MOMENTS, Need.PATTERNS))
    whole: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return evidence.trainability * evidence.expressivity


@dataclass(frozen=True)
class Trainability(Proxy):
    """Lambda: the sum over the layers in the window of log(sum over live weights of 1 / sigma) (equation 6)."""

    name: ClassVar[str] = "lambda"
    source: ClassVar[str] = f"{_SOURCE}, equation 6"
    gradient_based: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.MOMENTS,))
    whole: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return evidence.trainability


@dataclass(frozen=True)
class Expressivity(Proxy):
    """Psi: the number of distinct sample-wise activation patterns up to the end of the window (equation 7).

    ReLU, ReLU6, GELU, SiLU and Hardswish count alike, by the sign of their value.
    """

    name: ClassVar[str] = "psi"
    source: ClassVar[str] = f"{_SOURCE}, equation 7"
    gradient_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS,))
    whole: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return float(evidence.expressivity)
