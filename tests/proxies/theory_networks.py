"""Networks with blocks, and what proxies with passes of their own read of the evidence of a score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lswag_fast.capture import Activation, Sandbox, trace
from lswag_fast.capture.probe import probe
from lswag_fast.capture.run import CaptureMode
from lswag_fast.capture.sandbox import preserved
from lswag_fast.capture.trace import take
from lswag_fast.losses import CrossEntropy
from lswag_fast.ops.activation_patterns import hamming_kernel, pack_signs
from lswag_fast.proxies.network import Network
from lswag_fast.proxies.spectator import Spectator

SAMPLES = 6
CLASSES = 5


class Residual(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(width, out, 1, stride, bias=False) if stride > 1 or width != out else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(y + self.skip(x))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stage1 = nn.Sequential(Residual(4, 4, 1), Residual(4, 4, 1))
        self.stage2 = nn.Sequential(Residual(4, 8, 2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(images))).mean((2, 3)))


class TransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (6, -1)).transpose(1, 2).chunk(3, 1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.ModuleList(TransformerBlock(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Cells(nn.Module):
    """A chain of cells after a stem."""

    def __init__(self, *cells: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.cells = nn.ModuleList(Wrapped(cell) for cell in cells)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for cell in self.cells:
            x = cell(x)
        return self.head(x.flatten(2).mean(2))


class Wrapped(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)


class Zero(nn.Module):
    def __init__(self, value: float = 0.1) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0.0) + self.value


def cnn(training: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Cnn().train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 8, 8))
    return model.train(training)


def vit() -> nn.Module:
    torch.manual_seed(1)
    return Vit().eval()


MODELS = {"cnn": cnn, "cnn-train": lambda: cnn(True), "vit": vit}


def batch(samples: int = SAMPLES, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(samples, 3, side, side, generator=generator)
    return images, torch.randint(CLASSES, (samples,), generator=generator)


class Words(Spectator):
    def __init__(self) -> None:
        self.packed: list[Tensor] = []

    def wants(self, activation: Activation) -> bool:
        return True

    def activated(self, activation: Activation, post: Tensor, first_sample: int) -> None:
        self.packed.append(pack_signs(post))


@contextmanager
def evidence_of(
    model: nn.Module, images: Tensor, labels: Tensor, *, loss: Any = None, seed: int = 3, dtype: Any = torch.float32
) -> Iterator[Any]:
    """What these proxies read of the evidence of a score."""
    loss = loss or CrossEntropy()
    with preserved(model):
        sandbox = Sandbox(model, dtype)
        plan = trace(sandbox, images, labels, loss)
        probe(plan, sandbox, take(images, 2))
        words = Words()
        with torch.no_grad(), CaptureMode(plan, words, len(images), fused=False):
            sandbox.run(sandbox.parameters, {n: b.clone() for n, b in sandbox.buffers.items()}, images.to(dtype))
        yield SimpleNamespace(
            words=tuple(words.packed),
            agreements=hamming_kernel(words.packed, len(images)) if words.packed else None,
            multiply_adds=plan.multiply_adds,
            network=Network(sandbox, plan, images, labels, loss, seed),
        )


def value_of(proxy: Any, model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> float:
    with evidence_of(model, images, labels, **options) as evidence:
        return proxy.value(evidence)
