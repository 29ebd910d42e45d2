"""Lambda: the trainability of L-SWAG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class Trainability(Proxy):
    """Lambda: the sum over the layers in the window of log(sum over live weights of 1 / sigma) (equation 6)."""

    name: ClassVar[str] = "lambda"
    source: ClassVar[str] = "Casarin, Escalera, Lanz, CVPR 2025, equation 6"
    gradient_based: ClassVar[bool] = True
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.MOMENTS,))
    whole: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return evidence.trainability
