"""Zen-score: how far the features before global pooling move when a Gaussian image is disturbed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..capture.functions import KINDS, Kind, tensors_in
from ..errors import InputError
from .evidence import Evidence
from .network import Network
from .proxy import Proxy, UnavailableError, finite

_POOLINGS = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d", "mean")
_PRODUCTS = (Kind.LINEAR, Kind.MATMUL, Kind.CONVOLUTION, Kind.PRODUCT, Kind.ATTENTION, Kind.COMPOSITE)


@dataclass(frozen=True)
class Zen(Proxy):
    """log(mean over samples of sum |f(x) - f(x + gamma * e)|) + sum over batch normalisations of log(sigma).

    f are the features before global average pooling; x and e are Gaussian, of the shape of the batch. As in the public
    code, the weights of all layers are drawn anew from N(0, 1), their biases are 0, and batch and group normalisation
    scale by 1 and shift by 0, so that neither the images nor the initialisation of these matter.

    Paper (algorithm 1) and code (ZenNAS, NASLib) differ. The paper has a Frobenius norm, the code a sum of absolute
    values. The paper's sigma^2 is the variance of the batch, averaged over the channels; the code reads the running
    variances, which two passes with momentum 0.1 have moved from 1 to 0.81 + 0.09 v + 0.1 v', with v and v' the
    unbiased variances of the pass on x and of that on x + gamma * e. The code is taken: NAS-Bench-Suite-Zero publishes
    its values (one repeat), this gives them to within the noise of the draw, and cells that are 0 have -inf in the
    paper's form. Batch normalisation uses the statistics of the batch whatever its mode, as the code runs networks in
    training mode, and those on [S, C, H, W] count. Other activations than ReLU are left as they are, and residuals too.

    The features are the input of the last average over all positions (of [S, C, H, W], or over the tokens of [S, T, C])
    that no product over several positions follows. Transformers that average their tokens so have a value, an extension
    of ours: layer normalisation fixes the scale of their features, and no sigma makes up for it.

    Drawn on the CPU in float32 from the seed of the score: for each repeat the weights in the order of the layers,
    x, then e. Computed in float32.

    Attributes:
        repeats: draws, over which the value is averaged; NAS-Bench-Suite-Zero has 1, ZenNAS 32.
        gamma: the share of the disturbance.
    """

    name: ClassVar[str] = "zen"
    source: ClassVar[str] = "Lin, Wang, Sun, Chen, Sun, Qian, Li, Jin, ICCV 2021, algorithm 1"
    gradient_based: ClassVar[bool] = False
    repeats: int = 1
    gamma: float = 0.01

    def __post_init__(self) -> None:
        if self.repeats < 1 or not 0 < self.gamma < math.inf:
            raise InputError(f"zen takes repeats >= 1 and gamma > 0, got repeats={self.repeats}, gamma={self.gamma}")

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network.

        Raises UnavailableError where there is no global average pooling, or the features do not move or are not finite.
        """
        network, names = evidence.network, [layer.name for layer in evidence.layers]
        generator = torch.Generator().manual_seed(network.seed)
        with torch.no_grad():
            values = [self._draw(network, names, generator) for _ in range(self.repeats)]
        return math.fsum(values) / self.repeats

    def _draw(self, network: Network, names: Sequence[str], generator: torch.Generator) -> float:
        parameters = _drawn(network, names, generator)
        device, shape = network.images.device, network.images.shape
        x, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        features, variances = _features(network, parameters, x)
        disturbed, again = _features(network, parameters, x + self.gamma * noise)
        moved = (features - disturbed).abs().flatten(1).double().sum(1).mean()
        if moved == 0:
            raise UnavailableError("the features before global pooling do not depend on the image")
        running = [0.81 + 0.09 * v + 0.1 * w for v, w in zip(variances, again, strict=True)]
        log_sigmas = 0.5 * torch.tensor(running, dtype=torch.float64).log().sum()
        return finite(float(moved.log() + log_sigmas), "the features of the redrawn network are not finite")


class _BeforePooling(TorchFunctionMode):
    """Normalises by the batch, and keeps its variances and the input of the last global pooling."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.features: Tensor | None = None
        self.variances: list[Tensor] = []
        self._samples = samples

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        out = func(*args, **kwargs)
        operands = tensors_in((args, kwargs))
        if KINDS.get(func) in _PRODUCTS and any(_positions(t) > 1 for t in operands[:1]):
            self.features = None
        elif getattr(func, "__name__", "") in _POOLINGS and self._pools(func.__name__, operands[0], out):
            self.features = operands[0]
        return out

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if input.dim() == 4:
            self.variances.append(input.var((0, 2, 3)).mean())
        return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)

    def _pools(self, name: str, x: Tensor, out: Any) -> bool:
        """Whether a call averages x over all positions; a mean that keeps the last axis of tokens is over channels."""
        by_sample = isinstance(out, Tensor) and out.dim() > 1 and out.shape[0] == x.shape[0] == self._samples
        if not by_sample or x.dim() not in (3, 4):
            return False
        of_channels = name == "mean" and out.dim() == 3 and out.shape[2] == 1 < out.shape[1]
        return _positions(x) > 1 == _positions(out) and not of_channels


def _positions(x: Tensor) -> int:
    """Returns the product of all axes but the samples and the largest of the others."""
    return 1 if x.dim() < 3 else math.prod(x.shape[1:]) // max(*x.shape[1:], 1)


def _features(network: Network, parameters: dict[str, Tensor], images: Tensor) -> tuple[Tensor, list[float]]:
    """Returns the features before global pooling, and the variance of each batch normalisation."""
    with _BeforePooling(len(images)) as watch:
        network.run(images, parameters, dtype=torch.float32)
    if watch.features is None:
        raise UnavailableError("it is defined on the features before global average pooling, and none was found")
    return watch.features, [float(v) for v in watch.variances]


def _drawn(network: Network, names: Sequence[str], generator: torch.Generator) -> dict[str, Tensor]:
    """Returns weights from N(0, 1), and what belongs to them and to normalisation reset."""
    parameters = network.parameters(torch.float32)
    drawn = {}
    for name in names:
        drawn[name] = torch.randn(parameters[name].shape, generator=generator).to(parameters[name].device)
    for prefix, module in network.model.named_modules():
        own = [f"{prefix}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
        resets = isinstance(module, _BatchNorm | nn.GroupNorm)
        if not resets and not any(name in drawn for name in own):
            continue
        for name in own:
            if name.endswith("bias") and name in parameters:
                drawn.setdefault(name, torch.zeros_like(parameters[name], dtype=torch.float32))
            elif resets and name in parameters:
                drawn.setdefault(name, torch.ones_like(parameters[name], dtype=torch.float32))
    return drawn
