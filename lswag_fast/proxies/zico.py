"""ZiCo: inverse coefficient of variation of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy


@dataclass(frozen=True)
class Zico(Proxy):
    """Sum over layers of log(sum over live weights of mean|g| / sigma), over the groups of the score.

    The paper takes two mini-batches, which is `groups=2`. Its code takes the deviation of g where its equation, and
    this project, take that of |g|; both agree where no gradient changes sign between groups.
    """

    name: ClassVar[str] = "zico"
    source: ClassVar[str] = "Li, Yang, Bhardwaj, Marculescu, ICLR 2023, section 3.3"
    gradient_based: ClassVar[bool] = True
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.MOMENTS,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        terms = [layer.moments.log_sum_mean_over_sigma for layer in evidence.layers if layer.moments]
        return math.fsum(term for term in terms if term is not None)
