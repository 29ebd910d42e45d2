"""SynFlow: synaptic saliency of a network without data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .evidence import Evidence
from .proxy import Proxy, UnavailableError, finite
from .synaptic_flow import synaptic_flow


@dataclass(frozen=True)
class Synflow(Proxy):
    """log of the sum over all weights w of |w * dR/dw|, R the sum of the outputs for an image of ones (equation 2).

    R is taken with every parameter replaced by its absolute value, biases too, in float64, without batch normalisation;
    `synaptic_flow` says what that is in networks with layer normalisation. Summing the score of Tanaka et al. over the
    weights is Abdelfattah et al., ICLR 2021. The sum is of the order of 1e18 to 1e60 and more; NAS-Bench-Suite-Zero
    publishes its natural logarithm, and that is taken, as it ranks alike.
    """

    name: ClassVar[str] = "synflow"
    source: ClassVar[str] = "Tanaka, Kunin, Yamins, Ganguli, NeurIPS 2020, equation 2"
    gradient_based: ClassVar[bool] = True

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network.

        Raises UnavailableError where the sum is 0 or not finite, and where the model does not run in float64.
        """
        names = [layer.name for layer in evidence.layers]
        flow = synaptic_flow(evidence.network, names)
        total = float(torch.stack([flow.saliency(name) for name in names]).sum())
        if total == 0:
            raise UnavailableError("no flow reaches the output: the sum that its logarithm is taken of is 0")
        return math.log(finite(total, "a parameter is not finite, or the flow overflows float64"))
