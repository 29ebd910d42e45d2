"""plain: the signed saliency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class Plain(Proxy):
    """Sum over weights of g * w, with g the gradient of the batch's mean loss.

    Its terms cancel, so that its rounding error is that of `snip`, relative to a smaller value. Where samples are
    coupled, each group is a batch of its own, and the gradient is the mean of theirs.
    """

    name: ClassVar[str] = "plain"
    source: ClassVar[str] = "Abdelfattah, Mehrotra, Dudziak, Lane, ICLR 2021 (the baseline of its code)"
    gradient_based: ClassVar[bool] = True
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.GRADIENT,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return math.fsum(layer.gradient.saliency for layer in evidence.layers if layer.gradient)
