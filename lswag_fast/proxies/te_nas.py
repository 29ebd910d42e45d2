"""TE-NAS: the number of linear regions, and the condition number of the neural tangent kernel.

Chen, Gong, Wang, ICLR 2021 (arXiv 2102.11535). Where paper and public code (VITA-Group/TENAS) leave room:

- Both draw weights anew (Kaiming normal) and average; here the weights are those of the network, one draw.
- The paper's kernel is that of a vector output; the code takes the sum of a sample's logits, and so is it here. The
  code takes every parameter called "weight", which holds the scales of normalisation layers; here layers alone.
- The code counts regions over 3000 random crops of 3 x 3 pixels, of one channel, in a network of one channel and one
  cell a stage. No network can be thinned in general, so that the crops alone are offered (`inputs="crops"`). Whole
  images nearly always lie in regions of their own: the count is then their number, and ranks nothing.
- Search ranks changes that an operator makes; ports that score networks add regions and -kappa, or their ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..capture import Activation
from ..capture.run import CaptureMode
from ..errors import InputError
from .evidence import Evidence
from .network import Network
from .proxy import Need, Proxy, UnavailableError
from .spectator import Spectator
from .tangent_kernel import tangent_kernel

_SOURCE = "Chen, Gong, Wang, ICLR 2021"
_ROUNDING = 2.0**-23
"""What rounding leaves of an eigenvalue of a kernel of float32 gradients, in terms of the largest."""

Inputs = Literal["batch", "noise", "crops"]


@dataclass(frozen=True)
class TeNasRegions(Proxy):
    """R: the number of distinct activation patterns of the network among its inputs (equations 4, 5; higher is better).

    A pattern of an input has a bit an activation position, 1 where the value is above 0; inputs of the same pattern lie
    in the same linear region. Defined there for ReLU; as in the L-SWAG paper, GELU, SiLU and Hardswish count by the
    sign of their value. One input is one region.

    Args:
        inputs: "batch": the images of the score, up to its `pattern_samples`. "noise": `repeats` times as many
            Gaussian images. "crops": `repeats` crops of each image, `size` by `size` pixels, as the public code; the
            network must run on such.
        repeats: passes over noise or crops.
        size: of the crops.
    """

    inputs: Inputs = "batch"
    repeats: int = 1
    size: int = 3

    name: ClassVar[str] = "te_nas_regions"
    source: ClassVar[str] = f"{_SOURCE}, equation 5"
    gradient_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset((Need.PATTERNS, Need.AGREEMENTS))

    def __post_init__(self) -> None:
        if self.inputs not in ("batch", "noise", "crops") or self.repeats < 1 or self.size < 1:
            raise InputError(
                "inputs must be 'batch', 'noise' or 'crops', and repeats and size above 0, "
                f"got inputs={self.inputs!r}, repeats={self.repeats}, size={self.size}"
            )

    def value(self, evidence: Evidence) -> float:
        """Returns the number of regions of one network. Raises UnavailableError where it has no activation."""
        return self.details(evidence)["regions"]

    def details(self, evidence: Evidence) -> dict[str, float]:
        """Returns `regions` and `inputs`, their bound: where both are equal, the count says nothing."""
        if not evidence.words:
            raise UnavailableError("the network has no activation whose patterns are seen")
        if self.inputs == "batch":
            agree = evidence.agreements
            same = agree == agree.diagonal()  # every sample has all positions
            first = same.long().argmax(dim=1)  # the first sample with its pattern, which may be itself
            return {"regions": float(len(set(first.tolist()))), "inputs": float(len(first))}
        patterns = [p for batch in self._drawn(evidence.network) for p in _patterns(evidence.network, batch)]
        return {"regions": float(len(set(patterns))), "inputs": float(len(patterns))}

    def _drawn(self, network: Network) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(network.seed)
        images = network.images
        if self.inputs == "noise":
            for _ in range(self.repeats):
                yield torch.randn(images.shape, generator=generator).to(images)
            return
        if images.dim() != 4 or min(images.shape[2:]) < self.size:
            raise UnavailableError(f"crops of {self.size} x {self.size} cannot be taken of images {list(images.shape)}")
        rooms = torch.tensor([side - self.size + 1 for side in images.shape[2:]])
        for _ in range(self.repeats):
            corners = (torch.rand(len(images), 2, generator=generator) * rooms).long().tolist()
            yield torch.stack(
                [x[:, i : i + self.size, j : j + self.size] for x, (i, j) in zip(images, corners, strict=True)]
            )


@dataclass(frozen=True)
class TeNasNtk(Proxy):
    """kappa: largest over smallest eigenvalue of the neural tangent kernel of the batch (equation 3); lower is better.

    The kernel is that of `tangent_kernel`; its eigenvalues are in float64. The smallest is taken as no less than 2^-23
    of the largest, as gradients in float32 tell no more: kappa of a singular kernel, and of one that is 0, is its
    bound, 2^23. Of one sample, kappa is 1. The code returns what rounding leaves of a singular kernel, of either sign.
    """

    name: ClassVar[str] = "te_nas_ntk"
    source: ClassVar[str] = f"{_SOURCE}, equation 3"
    gradient_based: ClassVar[bool] = True
    lower_is_better: ClassVar[bool] = True

    def value(self, evidence: Evidence) -> float:
        """Returns kappa of one network.

        Raises UnavailableError where the model returns no logits, or the kernel is not finite.
        """
        return self.details(evidence)["condition_number"]

    def details(self, evidence: Evidence) -> dict[str, float]:
        """Returns `condition_number`, both eigenvalues, and `relative_rounding`.

        The latter is the share of the condition number that gradients rounded to float32 leave open: 2^-23 times it.
        """
        kernel = tangent_kernel(evidence.network)
        if not bool(torch.isfinite(kernel).all()):
            raise UnavailableError("the gradients of the logits are not finite")
        eigenvalues = torch.linalg.eigvalsh(kernel)
        largest, smallest = float(eigenvalues[-1]), float(eigenvalues[0])
        condition = largest / max(smallest, _ROUNDING * largest) if largest > 0 else 1 / _ROUNDING
        return {
            "condition_number": condition,
            "largest_eigenvalue": largest,
            "smallest_eigenvalue": smallest,
            "relative_rounding": _ROUNDING * condition,
        }


@dataclass(frozen=True)
class TeNas(Proxy):
    """R - kappa: linear regions less the condition number, as ports of TE-NAS that score one network have it.

    The paper defines no value of a network alone, but ranks over a pool: use `te_nas_regions`, `te_nas_ntk` and
    `ensembles.aggregation.te_nas` for that. kappa, the larger by far on most networks, decides over this value.

    Args:
        regions: how regions are counted.
    """

    regions: TeNasRegions = TeNasRegions()

    name: ClassVar[str] = "te_nas"
    source: ClassVar[str] = f"{_SOURCE}; as the value of one network: the port in idstcv/ZenNAS"
    gradient_based: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = TeNasRegions.needs

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network. Raises UnavailableError where one of the parts has none."""
        return self.regions.value(evidence) - TeNasNtk().value(evidence)

    def details(self, evidence: Evidence) -> dict[str, float]:
        """Returns the details of both parts."""
        return self.regions.details(evidence) | TeNasNtk().details(evidence)


class _SampleCodes(Spectator):
    """Gathers, of every activation of a forward pass, whether it is above 0, a row a sample."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def wants(self, activation: Activation) -> bool:
        """Whether an activation is to be handed over: all are."""
        return True

    def activated(self, activation: Activation, post: Tensor, first_sample: int) -> None:
        """Keeps the signs of a post-activation [S, ...]."""
        self.parts.append((post > 0).flatten(1).cpu())


def _patterns(network: Network, images: Tensor) -> list[bytes]:
    """Returns the pattern of each of some images over all activations of the network."""
    codes = _SampleCodes()
    try:
        with torch.no_grad(), CaptureMode(network.plan, codes, len(images), fused=False):
            network.run(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shape = list(images.shape[1:])
        raise UnavailableError(f"the network does not run on images {shape}: {error}") from error
    bits = np.packbits(torch.cat(codes.parts, dim=1).numpy(), axis=1)
    return [row.tobytes() for row in bits]
