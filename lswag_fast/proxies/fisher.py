"""Fisher: the saliency of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence
from .proxy import Need, Proxy, UnavailableError


@dataclass(frozen=True)
class Fisher(Proxy):
    """Sum over layers and their output channels of 0.5 * mean over samples of (sum over positions of y * d)^2.

    y is the output of a layer, d the gradient of the batch's mean loss there. As in the code of the source, y is taken
    before the activation. Its code knows images [S, C, H, W] and vectors [S, C]; here any position counts, tokens too.
    A weight that is used several times adds a term a use.

    Both papers add up channels, and so does this. The code (zero-cost-nas, NASLib) lends the value of a channel to each
    of its weights, as masks for pruning need, and adds up weights: a channel counts as often as its kernel has entries.
    NAS-Bench-Suite-Zero publishes that sum: on 40 of its cells, 32 photographs and one batch, it has a rank correlation
    of 0.96 with the published values, the sum over channels 0.89.
    """

    name: ClassVar[str] = "fisher"
    source: ClassVar[str] = (
        "Turner, Crowley, O'Boyle, Storkey, Gray, ICLR 2020, as a score: "
        "Abdelfattah, Mehrotra, Dudziak, Lane, ICLR 2021, equation 2"
    )
    gradient_based: ClassVar[bool] = True
    from_pass: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset((Need.OUTPUTS,))

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        unseen = [layer.name for layer in evidence.layers if layer.moments and layer.channel_saliency is None]
        if unseen:
            raise UnavailableError(f"the outputs of {', '.join(unseen)} are not seen sample by sample")
        return math.fsum(layer.channel_saliency or 0.0 for layer in evidence.layers)
