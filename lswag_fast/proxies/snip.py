"""SNIP: connection sensitivity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class Snip(Proxy):
    """Sum over weights of |g * w|, with g the gradient of the batch's mean loss.

    Where samples are coupled, each group is a batch of its own, and the gradient is the mean of theirs.
    """

    name: ClassVar[str] = "snip"
    source: ClassVar[str] = (
        "Lee, Ajanthan, Torr, ICLR 2019, as a score: Abdelfattah, Mehrotra, Dudziak, Lane, ICLR 2021, equation 1"
    )
    gradient_based: ClassVar[bool] = True
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.GRADIENT,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return math.fsum(layer.gradient.absolute_saliency for layer in evidence.layers if layer.gradient)
