"""SWAP: sample-wise activation patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class Swap(Proxy):
    """Number of distinct patterns over all activations of the network, over the first `pattern_samples` samples.

    Defined there for ReLU; as in the L-SWAG paper, GELU, SiLU and Hardswish count by the sign of their value.
    """

    name: ClassVar[str] = "swap"
    source: ClassVar[str] = "Peng, Song, Fayek, Ciesielski, Chang, ICLR 2024"
    gradient_based: ClassVar[bool] = False
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS, Need.DISTINCT))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return float(evidence.distinct_patterns) if evidence.words else 0.0
