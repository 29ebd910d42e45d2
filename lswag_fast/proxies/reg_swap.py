"""Regularised SWAP: patterns, fewer the farther a network is from the size that is searched for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError
from .evidence import Evidence
from .proxy import Need, Proxy, UnavailableError
from .swap import Swap


@dataclass(frozen=True)
class RegSwap(Proxy):
    """SWAP times exp(-(P - mu)^2 / sigma), where P is the number of parameters in thousands.

    mu and sigma set the size that is searched for; both are to be chosen for a space, and the source gives none that
    holds for all. Where they are None, mu is P of this network, so that the value is that of SWAP; that is the
    default, and no regularisation. Where the exponential is below float64, so that networks would tie at 0, there is no
    value.

    Attributes:
        mu: thousands of parameters.
        sigma: above 0, the square of thousands of parameters.
    """

    mu: float | None = None
    sigma: float = 1.0

    name: ClassVar[str] = "reg_swap"
    source: ClassVar[str] = "Peng, Song, Fayek, Ciesielski, Chang, ICLR 2024"
    gradient_based: ClassVar[bool] = False
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS, Need.DISTINCT))

    def __post_init__(self) -> None:
        if not _is_finite(self.sigma) or self.sigma <= 0:
            raise InputError(f"sigma must be a finite number above 0, got {self.sigma!r}")
        if self.mu is not None and not _is_finite(self.mu):
            raise InputError(f"mu must be a finite number of thousands of parameters, or None, got {self.mu!r}")

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network; raises UnavailableError where the exponential is 0 in float64."""
        thousands = evidence.parameters / 1000
        distance = 0.0 if self.mu is None else thousands - self.mu
        factor = math.exp(-distance * distance / self.sigma)
        if factor == 0:
            raise UnavailableError(
                f"exp(-(P - mu)^2 / sigma) is 0 in float64 for P = {thousands:g} thousand parameters, mu = {self.mu:g} "
                f"and sigma = {self.sigma:g}; take a mu among the sizes of the space, in thousands, or a larger sigma"
            )
        return Swap().value(evidence) * factor


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
