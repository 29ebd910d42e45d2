"""Small networks that proxies are tested on, and their evidence as a score gathers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lswag_fast.capture import Sandbox, trace
from lswag_fast.capture.sandbox import preserved
from lswag_fast.losses import CrossEntropy
from lswag_fast.proxies.evidence import Evidence, LayerEvidence
from lswag_fast.proxies.network import Network
from lswag_fast.proxies.proxy import UnavailableError
from lswag_fast.spaces import get

CLASSES = 4
SAMPLES = 8
SIZE = 8


class ConvNet(nn.Module):
    """Convolutions with batch normalisation, a residual, and global average pooling."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.BatchNorm2d(10), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(10, classes)

    def features(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return self.last(x + self.body(x))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.features(images)).flatten(1))


class Plain(nn.Module):
    """Convolutions without normalisation, and no pooling before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 4, 3, stride=2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.silu(self.second(F.relu(self.first(images)))).flatten(1))


class Transformer(nn.Module):
    """A transformer of two blocks, attention written out in one and by torch in the other; the mean token is scored."""

    attention = ("qkv.weight", "out.weight", "torch_attention.in_proj_weight", "torch_attention.out_proj.weight")
    other_matrices = ("mlp.0.weight", "mlp.2.weight", "second_mlp.0.weight", "second_mlp.2.weight", "head.weight")

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, width) / 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.torch_attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.second_mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        p = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out(p @ v)
        x = x + self.mlp(self.norms[1](x))
        y = self.norms[2](x)
        x = x + self.torch_attention(y, y, y, need_weights=False)[0]
        x = x + self.second_mlp(self.norms[3](x))
        return self.head(self.norms[4](x).mean(1))


class Named(nn.Module):
    """A network whose output is a tuple, the logits first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.inner(images)
        return logits, logits.softmax(-1)


def convnet(*, training: bool = False) -> ConvNet:
    torch.manual_seed(1)
    model = ConvNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.train(training)


def plain() -> Plain:
    torch.manual_seed(2)
    return Plain()


def transformer() -> Transformer:
    torch.manual_seed(3)
    return Transformer()


def autoformer() -> nn.Module:
    space = get("autoformer-tiny", image_size=32, num_classes=CLASSES)
    (arch,) = space.sample(1, seed=0)
    return space.supernet(seed=1).subnet(arch)


def batch(samples: int = SAMPLES, size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(samples, 3, size, size, generator=generator)
    return images, torch.arange(samples) % CLASSES


@contextmanager
def evidence_of(
    model: nn.Module,
    images: Tensor,
    labels: Any,
    *,
    dtype: torch.dtype = torch.float32,
    loss: Any = None,
    seed: int = 7,
) -> Iterator[Evidence]:
    """The evidence that proxies with passes of their own read, while the model is set up for scoring."""
    loss = CrossEntropy() if loss is None else loss
    with preserved(model):
        sandbox = Sandbox(model, dtype)
        plan = trace(sandbox, images, labels, loss)
        layers = tuple(LayerEvidence(a.name, a.numel, None, None, None) for a in plan.layers)
        network = Network(sandbox, plan, images, labels, loss, seed)
        yield Evidence(layers, 0.0, 0, plan.parameters, plan.multiply_adds, 2, (), 0, lambda _: network)


def unavailable(text: str) -> pytest.RaisesExc[UnavailableError]:
    return pytest.raises(UnavailableError, match=text)
