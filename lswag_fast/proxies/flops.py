"""The multiply-adds of a network, a baseline that every proxy is read beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Proxy


@dataclass(frozen=True)
class Flops(Proxy):
    """Multiply-adds of one image: products of linear maps, convolutions and attention (FLOP would be twice as many)."""

    name: ClassVar[str] = "flops"
    source: ClassVar[str] = "a baseline of Ning et al., NeurIPS 2021, and Krishnakumar et al., NeurIPS 2022"
    gradient_based: ClassVar[bool] = False
    from_pass: ClassVar[bool] = True

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return float(evidence.multiply_adds)
