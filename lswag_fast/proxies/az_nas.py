"""AZ-NAS: expressivity, progressivity, trainability and complexity of a network's blocks, and their ranks together.

Lee, Ham, CVPR 2024 (arXiv 2403.19232). Where paper and public code (cvlab-yonsei/AZ-NAS) leave room:

- Features are the outputs of blocks. The code has them by hand for each space: the stem and every cell of
  NAS-Bench-201; in vision transformers the sums after attention and after the MLP of every block, without what goes
  into the first. Here they are found in any module (`block_names`), a transformer block is one step, and what goes
  into the first block is a feature, as the stem is there. `blocks` names others.
- The code feeds Gaussian images, draws the weights of convolutional networks anew (Kaiming normal) and has batch
  normalisation in training mode, and keeps transformers as they are; here the images, weights and modes are those of
  the score. `inputs="noise"` feeds Gaussian images.
- 1e-8 in the logarithm of the entropy and 1e-6 in the reciprocal of the spectral norm are the code's; so is -inf for
  features that do not vary, and for a block that hands gradients through unchanged (a cell of skips alone). The code
  for transformers leaves such a block out.
- Expressivity is summed over blocks (equation 4); the code for transformers has no progressivity, and the paper says
  so: leave it out of `ensembles.aggregation.az_nas` there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InputError
from .block_features import Feature, block_features, block_names
from .evidence import Evidence
from .network import Network
from .proxy import Proxy, UnavailableError

_SOURCE = "Lee, Ham, CVPR 2024"
_CONSTANT = 2.0**-80
"""What rounding in float64 leaves, at most, of the variance of values that are all the same, by their mean square."""

Inputs = Literal["batch", "noise"]


@dataclass(frozen=True)
class _OfBlocks(Proxy):
    """What the parts have in common.

    Args:
        inputs: "batch": the images of the score; "noise": as many Gaussian ones.
        blocks: names of the modules whose outputs are the features, instead of those that `block_names` finds.
    """

    inputs: Inputs = "batch"
    blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.inputs not in ("batch", "noise"):
            raise InputError(f"inputs must be 'batch' or 'noise', got {self.inputs!r}")
        if isinstance(self.blocks, str):
            raise InputError(f"blocks is a sequence of names of modules, got {self.blocks!r}; write ({self.blocks!r},)")
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))

    def details(self, evidence: Evidence) -> dict[str, float]:
        """Returns the entropy of each feature (`entropy 0 input`), and the spectral norm of each step to the next."""
        parts = self._parts(evidence)
        labels = [f"{number} {name}" for number, name in enumerate(parts.names)]
        entropies = {f"entropy {label}": e for label, e in zip(labels, parts.entropies, strict=True)}
        return entropies | {f"norm {label}": s for label, s in zip(labels[1:], parts.norms, strict=False)}

    def _parts(self, evidence: Evidence) -> _Parts:
        key = ("parts of AZ-NAS", self.inputs, self.blocks)
        parts: _Parts = evidence.network.once(key, lambda: _parts(evidence.network, self.inputs, self.blocks))
        return parts


@dataclass(frozen=True)
class Expressivity(_OfBlocks):
    """Sum over features of the entropy of their principal components (equations 1 to 4).

    Of a feature's covariance over all positions of all samples [C, C], with eigenvalues e: -sum of p log(p + 1e-8),
    p = e / sum of e. In float64. A feature that does not vary makes it -inf.
    """

    name: ClassVar[str] = "az_nas_expressivity"
    source: ClassVar[str] = f"{_SOURCE}, equation 4"
    gradient_based: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network. Raises UnavailableError where no two features are found."""
        return float(sum(self._parts(evidence).entropies))


@dataclass(frozen=True)
class Progressivity(_OfBlocks):
    """The least gain in entropy from one feature to the next (equation 5); -inf where a feature does not vary."""

    name: ClassVar[str] = "az_nas_progressivity"
    source: ClassVar[str] = f"{_SOURCE}, equation 5"
    gradient_based: ClassVar[bool] = False

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network. Raises UnavailableError where no two features are found."""
        entropies = self._parts(evidence).entropies
        if any(math.isinf(e) for e in entropies):
            return -math.inf
        return min(after - before for before, after in pairwise(entropies))


@dataclass(frozen=True)
class Trainability(_OfBlocks):
    """Mean over blocks of 2 - s - 1 / (s + 1e-6), s the spectral norm of the block's Jacobian (equations 6 to 11).

    The Jacobian, channels in by channels out, is estimated as the mean over positions of the product of v and J^T v,
    for one v of random signs at the block's output. Where a block divides the positions along an axis by a whole
    number, the positions in that make one position out are channels. Signs are drawn from the seed, on the CPU, for
    the last block first.

    One v leaves noise in the estimate: of a block that is the identity, the mean over N positions (of all samples) of
    v v^T with C channels has the spectral norm (1 + sqrt(C / N))^2 and not 1. Blocks of a transformer of small initial
    weights are nearly that, so that the value falls with the width there, and rises with the samples.
    """

    name: ClassVar[str] = "az_nas_trainability"
    source: ClassVar[str] = f"{_SOURCE}, equation 11"
    gradient_based: ClassVar[bool] = True

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network.

        Raises UnavailableError where no two features are found, or a block changes positions in any other way.
        """
        parts = self._parts(evidence)
        if parts.obstacle is not None:
            raise UnavailableError(parts.obstacle)
        scores = [-math.inf if math.isinf(s) else 2 - s - 1 / (s + 1e-6) for s in parts.norms]
        return sum(scores) / len(scores)


@dataclass(frozen=True)
class Complexity(Proxy):
    """Multiply-adds of one image; the paper's is FLOPs, which rank alike."""

    name: ClassVar[str] = "az_nas_complexity"
    source: ClassVar[str] = f"{_SOURCE}, section 3.1"
    gradient_based: ClassVar[bool] = False
    from_pass: ClassVar[bool] = True

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network."""
        return float(evidence.multiply_adds)


@dataclass(frozen=True)
class AzNas(_OfBlocks):
    """Expressivity + progressivity + trainability + log(complexity): ours, for a network alone.

    The paper defines no value of one network, but ranks over a pool: use the four parts and
    `ensembles.aggregation.az_nas` for that.
    """

    name: ClassVar[str] = "az_nas"
    source: ClassVar[str] = f"{_SOURCE}; the value of one network is ours"
    gradient_based: ClassVar[bool] = True

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network. Raises UnavailableError where one of the parts has none."""
        parts = (Expressivity, Progressivity, Trainability)
        total = sum(part(self.inputs, self.blocks).value(evidence) for part in parts)
        return total + math.log(Complexity().value(evidence))


@dataclass(frozen=True)
class _Parts:
    """Of one pass: the names and entropies of all features, and the spectral norms of the steps between them."""

    names: tuple[str, ...]
    entropies: tuple[float, ...]
    norms: tuple[float, ...]  # inf: gradients pass unchanged
    obstacle: str | None  # why there are no norms


def _parts(network: Network, inputs: Inputs, blocks: tuple[str, ...] | None) -> _Parts:
    generator = torch.Generator().manual_seed(network.seed)
    images = network.images
    if inputs == "noise":
        images = torch.randn(images.shape, generator=generator).to(images)
    names = block_names(network.model) if blocks is None else blocks
    features = block_features(network, images, names)
    if len(features) < 2:
        raise UnavailableError(
            f"{len(features)} block outputs were found where two are needed; name modules that follow each other, "
            "blocks=('layer1', 'layer2', ...)"
        )
    entropies = tuple(_entropy(f) for f in features)
    norms, obstacle = _norms(features, generator)
    return _Parts(tuple(f.name for f in features), entropies, norms, obstacle)


def _entropy(feature: Feature) -> float:
    """Returns the entropy of the principal components of a feature; -inf where it does not vary."""
    values = feature.output.detach().movedim(feature.channel_axis, -1).flatten(0, -2).double()
    if not bool(torch.isfinite(values).all()):
        raise UnavailableError(f"the output of block {feature.name} is not finite")
    rows = values - values.mean(0)
    total = float(rows.square().sum())
    if total <= _CONSTANT * float(values.square().sum()):
        return -math.inf
    p = torch.linalg.eigvalsh(rows.t() @ rows).clamp(min=0) / total
    return -float((p * (p + 1e-8).log()).sum())


def _norms(features: Sequence[Feature], generator: torch.Generator) -> tuple[tuple[float, ...], str | None]:
    """Returns the spectral norm of each step from one feature to the next, or why one cannot be had."""
    norms = []
    for before, after in reversed(list(pairwise(features))):
        bits = torch.randint(2, after.output.shape, generator=generator, dtype=torch.int8)
        signs = (2 * bits - 1).to(after.output)
        gradient = _pulled_back(after.output, before.output, signs)
        if gradient.shape == signs.shape and bool((gradient == signs).all()):
            norms.append(math.inf)
            continue
        d_in, d_out = gradient.movedim(before.channel_axis, -1), signs.movedim(after.channel_axis, -1)
        folded = _fold(d_in, d_out.shape)
        if folded is None:
            shapes = f"{list(before.output.shape)} to {list(after.output.shape)}"
            return (), f"block {after.name} does not divide positions by a whole number: from {shapes}"
        jacobian = folded.flatten(0, -2).double().t() @ d_out.flatten(0, -2).double() / d_out[..., 0].numel()
        norms.append(float(torch.linalg.matrix_norm(jacobian, 2)))
    return tuple(reversed(norms)), None


def _pulled_back(after: Tensor, before: Tensor, signs: Tensor) -> Tensor:
    """Returns J^T v of the step from `before` to `after`; 0 where no gradient passes."""
    found = None
    if after.requires_grad:
        (found,) = torch.autograd.grad(after, before, signs, retain_graph=True, allow_unused=True)
    gradient = torch.zeros_like(before) if found is None else found
    if not bool(torch.isfinite(gradient).all()):
        raise UnavailableError("the gradients of blocks are not finite")
    return gradient


def _fold(values: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Returns values [..., C] with the positions of `shape`, those between them in the channels; None: not so."""
    if values.dim() != len(shape) or any(a % b for a, b in zip(values.shape[:-1], shape[:-1], strict=True)):
        return None
    sizes: list[int] = []
    for size, fewer in zip(values.shape[:-1], shape[:-1], strict=True):
        sizes += [fewer, size // fewer]
    split = values.reshape(*sizes, values.shape[-1])
    kept, offsets = range(0, len(sizes), 2), range(1, len(sizes), 2)
    return split.permute(*kept, *offsets, len(sizes)).flatten(len(sizes) // 2)
