"""NWOT: neural architecture search without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .evidence import Evidence
from .proxy import Need, Proxy, UnavailableError


@dataclass(frozen=True)
class Nwot(Proxy):
    """log |det K| with K[m, n] the number of positions at which samples m and n agree in the sign of an activation.

    All activations of the network are taken, over the first `pattern_samples` samples; the determinant is in float64.
    Two samples that agree everywhere make K singular, and the value -inf is then given as NaN, with the reason.
    """

    name: ClassVar[str] = "nwot"
    source: ClassVar[str] = "Mellor, Turner, Storkey, Crowley, ICML 2021, equation 2"
    gradient_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        if not evidence.words:
            raise UnavailableError("the network has no activation whose patterns are seen")
        sign, value = torch.linalg.slogdet(evidence.agreements.double().cpu())
        if not bool(torch.isfinite(value)) or float(sign) == 0:
            raise UnavailableError("the kernel is singular: two samples agree in the sign of every activation")
        return float(value)
