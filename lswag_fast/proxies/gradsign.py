"""GradSign: agreement of the signs of per-sample gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class GradSign(Proxy):
    """Sum over weights of |sum over groups of sign(g_k)|, with the groups of the score (one a sample by default).

    An integer: exact for the same gradients. A gradient that is 0 but for rounding has the sign of its rounding.
    """

    name: ClassVar[str] = "gradsign"
    source: ClassVar[str] = "Zhang, Jia, ICLR 2022, algorithm 1"
    gradient_based: ClassVar[bool] = True
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.SIGNED,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        found = [layer.moments for layer in evidence.layers if layer.moments and layer.moments.signed]
        return math.fsum(m.numel * evidence.groups * m.signed.sign_agreement for m in found if m.signed)
