"""The candidate network of NAS-Bench-201: three stages of cells, with residual blocks that halve the image between.

Dong, Yang: NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search, ICLR 2020. Parameters have
the names, shapes and order of the published network, so that its trained weights load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError

SKIP, ZERO, CONV_3X3, CONV_1X1, AVG_POOL_3X3 = range(5)
EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""(from, to) of the six operations of a candidate, in their order."""

FORWARD_ORDER = (0, 1, 3, 2, 4, 5)
"""Places in `EDGES`, by the node they lead to: the order in which the published network computes them."""

CELLS_A_STAGE = 5
CHANNELS = (16, 32, 64)
IMAGE_CHANNELS = 3


class NASBench201(nn.Module):
    """A candidate: images [S, 3, image_size, image_size] to logits [S, classes]; its weights are yet to be drawn."""

    def __init__(self, operations: Sequence[int], *, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.image_size = image_size
        first, *_, last = CHANNELS
        self.stem = nn.Sequential(_convolution(IMAGE_CHANNELS, first, 3), nn.BatchNorm2d(first))
        self.cells = nn.ModuleList()
        for stage, channels in enumerate(CHANNELS):
            if stage:
                self.cells.append(_ResidualBlock(CHANNELS[stage - 1], channels))
            self.cells.extend(_Cell(operations, channels) for _ in range(CELLS_A_STAGE))
        self.lastact = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU())
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes, device="meta").to_empty(device="cpu")

    def draw_parameters(self, seed: int) -> None:
        """Draws PyTorch's default weights on the CPU, without touching torch's global generator.

        They are those that the published code draws after `torch.manual_seed(seed)`.
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
        bound = self.classifier.in_features**-0.5
        nn.init.uniform_(self.classifier.bias, -bound, bound, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits, [S, classes]."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (IMAGE_CHANNELS, self.image_size, self.image_size):
            raise InputError(
                f"expected images [S, {IMAGE_CHANNELS}, {self.image_size}, {self.image_size}], "
                f"got {list(images.shape)}; resize them, or get the space with another image_size"
            )
        features = self.stem(images)
        for cell in self.cells:
            features = cell(features)
        logits: Tensor = self.classifier(self.global_pooling(self.lastact(features)).flatten(1))
        return logits


class _Cell(nn.Module):
    """Four nodes, each the sum of the operations that lead to it; the first is the input, the last the output."""

    def __init__(self, operations: Sequence[int], channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_operation(operations[edge], channels) for edge in FORWARD_ORDER)

    def forward(self, features: Tensor) -> Tensor:
        nodes = [features]
        sums: dict[int, Tensor] = {}
        for edge, layer in zip(FORWARD_ORDER, self.layers, strict=True):
            start, end = EDGES[edge]
            term = layer(nodes[start])
            sums[end] = sums[end] + term if end in sums else term
            if start == end - 1:
                nodes.append(sums[end])
        return nodes[-1]


class _ResidualBlock(nn.Module):
    """Twice the channels, half the height and width."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv_a = _ReLUConvBN(channels_in, channels, 3, stride=2)
        self.conv_b = _ReLUConvBN(channels, channels, 3)
        self.downsample = nn.Sequential(nn.AvgPool2d(2), _convolution(channels_in, channels, 1))

    def forward(self, features: Tensor) -> Tensor:
        halved: Tensor = self.downsample(features) + self.conv_b(self.conv_a(features))
        return halved


class _ReLUConvBN(nn.Module):
    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        convolution = _convolution(channels_in, channels, kernel, stride)
        self.op = nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(channels))

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = self.op(features)
        return changed


class _Zero(nn.Module):
    """The published form of no connection: what comes before has gradients, and they are 0."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mul(0.0)


def _operation(operation: int, channels: int) -> nn.Module:
    if operation == CONV_3X3:
        return _ReLUConvBN(channels, channels, 3)
    if operation == CONV_1X1:
        return _ReLUConvBN(channels, channels, 1)
    if operation == AVG_POOL_3X3:
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return _Zero() if operation == ZERO else nn.Identity()


def _convolution(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    # On the meta device nothing is drawn from torch's global generator.
    convolution = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False, device="meta")
    return convolution.to_empty(device="cpu")
