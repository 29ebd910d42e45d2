"""Networks that tests of the shared pass score, and their batch."""

from __future__ import annotations

from collections.abc import Callable

import networks
import proxy_networks
import theory_networks
import torch
from networks import CLASSES, IMAGE
from torch import Tensor, nn

SHARED = ("lambda", "psi", "zico", "swap", "reg_swap", "nwot", "grad_norm", "snip", "plain", "fisher", "gradsign")


SHARED = (*SHARED, "gsnr", "l2_norm", "params", "flops")


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, groups=3),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(54, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, CLASSES),
    )


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


class Overwritten(nn.Module):
    """Works in place on the outputs of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(192, 16)
        self.second = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1)).mul_(3.0).add_(1.0)
        out: Tensor = self.second(torch.relu(hidden)).mul_(0.5)
        return out


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": convolutions,
    "batch norm": normalised,
    "batch norm in eval mode": lambda: normalised().eval(),
    "in place": Overwritten,
    "attention": networks.Attention,
    "sequence first": networks.SequenceFirst,
    "used twice": networks.Repeated,
    "tied and transposed": networks.Tied,
    "residuals": theory_networks.cnn,
    "residuals in training": lambda: theory_networks.cnn(training=True),
    "vision transformer": theory_networks.vit,
    "attention written out": proxy_networks.transformer,
}


def batch(samples: int = 12, classes: int = CLASSES, size: int = IMAGE[-1]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 3, size, size, generator=generator)
    return images, torch.randint(classes, (samples,), generator=generator)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[name]()
