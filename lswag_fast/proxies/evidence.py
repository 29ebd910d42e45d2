"""What the shared pass collected of one network, as proxies read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import InputError
from ..ops.activation_patterns import count_distinct, hamming_kernel
from ..ops.gradient_moments import GradientMoments
from .network import Network
from .proxy import Proxy
from .shared_work import SharedWork

DISTINCT, AGREEMENTS = "patterns", "agreements"
"""Keys of work that readers of these share, whether the pass has done it or the first of them does."""


@dataclass(frozen=True)
class GradientSums:
    """The gradient g of the batch's mean loss at one weight w, reduced over its entries."""

    norm: float  # sqrt(sum of g^2)
    saliency: float  # sum of g * w
    absolute_saliency: float  # sum of |g * w|


@dataclass(frozen=True)
class LayerEvidence:
    """One weight; what no proxy asked for is None.

    Attributes:
        name: of the parameter.
        numel: its elements.
        moments: of its gradients; None, too, where the loss does not reach it. Logarithms in it are None where all its
            elements are dead.
        gradient: of the batch's mean loss at it, reduced.
        channel_saliency: 0.5 * sum over output channels c of mean over samples n of (sum over positions of y * d)^2,
            where y is the output of the layer and d the gradient of the batch's mean loss there.
        norm: its Euclidean norm; NaN where no proxy asked for it.
    """

    name: str
    numel: int
    moments: GradientMoments | None
    gradient: GradientSums | None
    channel_saliency: float | None
    norm: float = math.nan


@dataclass
class Evidence:
    """One network's evidence.

    Attributes:
        layers: all of them, in order of first use.
        trainability: Lambda, as the options of the score have it.
        expressivity: Psi, likewise.
        parameters: of the network.
        multiply_adds: of one image.
        groups: G.
        words: the signs of every activation that was looked at, packed as `ops.activation_patterns.pack_signs` does.
        pattern_samples: how many samples they are of.
        make_network: makes `network`.
        counted: `distinct_patterns`, where the pass has counted them.
        agreed: `agreements`, where the pass has counted them.
        shared: work that proxies share.
        reader: the proxy that is evaluated.
    """

    layers: tuple[LayerEvidence, ...]
    trainability: float
    expressivity: int
    parameters: int
    multiply_adds: int
    groups: int
    words: tuple[Tensor, ...]
    pattern_samples: int
    make_network: Callable[[SharedWork], Network]
    counted: int | None = None
    agreed: Tensor | None = None
    shared: SharedWork = field(default_factory=SharedWork)
    reader: Proxy | None = None

    @property
    def network(self) -> Network:
        """The network and its batch, for passes of a proxy's own; InputError for one that said to need none."""
        if self.reader is not None and self.reader.from_pass:
            raise InputError(
                f"{type(self.reader).__qualname__} has from_pass = True, and asks for the network when a device may be "
                f"at the next one; leave from_pass out"
            )
        network: Network = self.shared.once("network", lambda: self.make_network(self.shared))
        return network

    @property
    def distinct_patterns(self) -> int:
        """The number of distinct patterns of all activations together."""
        if self.counted is not None:
            self.shared.note(DISTINCT)
            return self.counted
        count: int = self.shared.once(DISTINCT, lambda: count_distinct(self.words, self.pattern_samples))
        return count

    @property
    def agreements(self) -> Tensor:
        """The positions at which each two samples agree: int64 [pattern_samples, pattern_samples], on the host."""
        if self.agreed is not None:
            self.shared.note(AGREEMENTS)
            return self.agreed
        kernel: Tensor = self.shared.once(AGREEMENTS, lambda: hamming_kernel(self.words, self.pattern_samples).cpu())
        return kernel
