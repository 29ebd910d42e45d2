"""NWOT: neural architecture search without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .determinant import log_determinant
from .evidence import Evidence
from .proxy import Need, Proxy, UnavailableError


@dataclass(frozen=True)
class Nwot(Proxy):
    """log |det K| with K[m, n] the number of positions at which samples m and n agree in the sign of an activation.

    All activations of the network are taken, over the first `pattern_samples` samples; the determinant is in float64.
    Defined there for ReLU; as in the L-SWAG paper, GELU, SiLU and Hardswish count by the sign of their value.
    K is singular (`log_determinant`) where two samples agree everywhere or fewer patterns than samples are independent;
    the value would be -inf, or rounding, and is NaN with the reason.
    """

    name: ClassVar[str] = "nwot"
    source: ClassVar[str] = "Mellor, Turner, Storkey, Crowley, ICML 2021, equation 2"
    gradient_based: ClassVar[bool] = False
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS, Need.AGREEMENTS))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        if not evidence.words:
            raise UnavailableError("the network has no activation whose patterns are seen")
        value = log_determinant(evidence.agreements)
        if value is None:
            raise UnavailableError(
                f"the kernel is singular: the {evidence.pattern_samples} samples have fewer independent patterns than "
                f"that, or two of them agree in the sign of every activation; fewer pattern_samples may have a value"
            )
        return value
