"""GSNR: the signal-to-noise ratio of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class Gsnr(Proxy):
    """Sum over live weights of (mean of g)^2 / variance of g, over the groups of the score.

    The proxy of the source adds a constant xi to the variance so that no ratio is endless; here weights whose deviation
    is rounding alone (2^-22 of |mean g| or less) are left out instead, as everywhere in this project.
    """

    name: ClassVar[str] = "gsnr"
    source: ClassVar[str] = "Sun, Sun, Tan, Liu, Wu, ICCV 2023; Liu, Bai, Jiang, Chen, Wang, ICLR 2020"
    gradient_based: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.SIGNED,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        found = [(m.numel, m.signed) for m in (layer.moments for layer in evidence.layers) if m and m.signed]
        return math.fsum((numel - s.dead) * (s.mean_signal_to_noise or 0.0) for numel, s in found)
