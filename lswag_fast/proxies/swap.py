"""SWAP: sample-wise activation patterns, and its regularised form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..ops.activation_patterns import count_distinct
from .evidence import Evidence
from .proxy import Need, Proxy, UnavailableError

_SOURCE = "Peng, Song, Fayek, Ciesielski, Chang, ICLR 2024"


@dataclass(frozen=True)
class Swap(Proxy):
    """Number of distinct patterns over all activations of the network, over the first `pattern_samples` samples.

    Defined there for ReLU; as in the L-SWAG paper, GELU, SiLU and Hardswish count by the sign of their value.
    """

    name: ClassVar[str] = "swap"
    source: ClassVar[str] = _SOURCE
    gradient_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return float(count_distinct(evidence.words, evidence.pattern_samples)) if evidence.words else 0.0


@dataclass(frozen=True)
class RegSwap(Proxy):
    """SWAP times exp(-(P - mu)^2 / sigma), where P is the number of parameters in thousands.

    mu and sigma set the size that is searched for; both are to be chosen for a space, and the source gives none that
    holds for all. Where they are None, mu is P of this network, so that the value is that of SWAP; that is the
    default, and no regularisation.
    """

    mu: float | None = None
    sigma: float = 1.0

    name: ClassVar[str] = "reg_swap"
    source: ClassVar[str] = _SOURCE
    gradient_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        if not self.sigma > 0:
            raise UnavailableError(f"sigma must be above 0, got {self.sigma}")
        thousands = evidence.parameters / 1000
        distance = 0.0 if self.mu is None else thousands - self.mu
        return Swap().value(evidence) * math.exp(-(distance**2) / self.sigma)
