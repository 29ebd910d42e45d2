"""GSNR: the signal-to-noise ratio of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class Gsnr(Proxy):
    """Sum over live weights of (mean of g)^2 / variance of g, over the groups of the score; the variance divides by G.

    Liu et al. define the ratio of one weight, Sun et al. sum it over all as a score, over eight mini-batches, and add a
    constant xi = 1e-8 to the variance so that no ratio is endless. Variances of cells of NAS-Bench-201 are far above
    that, a tenth of those of AutoFormer-Tiny are below, and there the scale of the gradients would count; here weights
    whose deviation is rounding alone (2^-22 of |mean g| or less) are left out instead, as everywhere in this project.
    """

    name: ClassVar[str] = "gsnr"
    source: ClassVar[str] = (
        "Liu, Jiang, Bai, Chen, Wang, ICLR 2020, section 2.1, as a score: Sun, Sun, Yang, Lu, Mei, Zhao, Hu, ICCV 2023"
    )
    gradient_based: ClassVar[bool] = True
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.SIGNED,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        found = [(m.numel, m.signed) for m in (layer.moments for layer in evidence.layers) if m and m.signed]
        return math.fsum((numel - s.dead) * (s.mean_signal_to_noise or 0.0) for numel, s in found)
