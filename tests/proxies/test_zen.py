"""The Zen-score, against lswag_fast/reference_proxies.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import proxy_networks as networks
import pytest
import theory_networks
import torch
import torch.nn.functional as F
from proxy_networks import CLASSES, evidence_of, unavailable
from torch import Tensor, nn

from lswag_fast import reference_proxies as reference
from lswag_fast.errors import InputError
from lswag_fast.proxies.evidence import Evidence
from lswag_fast.proxies.zen import Zen


def drawn(evidence: Evidence, images: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights, x and e in the order that Zen says it draws."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {layer.name: evidence.network.parameters()[layer.name].shape for layer in evidence.layers}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights, *(torch.randn(images.shape, generator=generator) for _ in range(2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_zen(training: bool, gamma: float):
    model = networks.convnet(training=training)
    images, labels = networks.batch()
    with evidence_of(model, images, labels, seed=11) as evidence:
        value = Zen(gamma=gamma).value(evidence)
        weights, x, noise = drawn(evidence, images, 11)
    expected = reference.zen(model, lambda m, i: m.features(i), weights, x, noise, gamma)
    assert value == pytest.approx(expected, rel=1e-4)


def test_zen_averages_repeats_and_depends_on_the_seed_alone():
    images, labels = networks.batch()
    values = []
    for model, seed in ((networks.convnet(), 1), (networks.ConvNet(), 1), (networks.convnet(), 2)):
        with evidence_of(model, images if seed == 1 else -images, labels, seed=seed) as evidence:
            values.append(Zen().value(evidence))
            assert Zen(repeats=8).value(evidence) == pytest.approx(values[-1], abs=1)
    assert values[0] == values[1] != values[2]


class Pooling(nn.Module):
    """A network with a squeeze and excitation, and one way of global pooling."""

    def __init__(self, pool: Callable[[Tensor], Tensor], width: int = 5) -> None:
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(3, 6, 3)
        self.squeeze = nn.Conv2d(6, 6, 1)
        self.last = nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(width, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        x = self.conv(images).relu()
        x = x * self.squeeze(F.adaptive_avg_pool2d(x, 1)).sigmoid()
        return self.last(x).relu()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.features(images)).flatten(1))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d(1),
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=(-2, -1), keepdim=True),
        lambda x: F.avg_pool2d(x, 4),
        lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
        lambda x: x.flatten(2).mean(-1),
        lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1),
    ],
)
def test_zen_finds_the_features_before_pooling(pool: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    model = Pooling(pool)
    images, labels = networks.batch()
    with evidence_of(model, images, labels) as evidence:
        value = Zen().value(evidence)
        weights, x, noise = drawn(evidence, images, 7)
    expected = reference.zen(model, lambda m, i: m.features(i), weights, x, noise, 0.01)
    assert value == pytest.approx(expected, rel=1e-4)


def output_of(path: str, first_token: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """Returns what gives the tokens, from one on, that a module of this path puts out."""

    def features(model: nn.Module, images: Tensor) -> Tensor:
        found: list[Tensor] = []
        hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: found.append(output))
        model(images)
        hook.remove()
        return found[0][:, first_token:]

    return features


@pytest.mark.parametrize(
    ("make", "size", "path", "first_token"),
    [
        (networks.transformer, networks.SIZE, "norms.4", 0),
        (theory_networks.vit, networks.SIZE, "norm", 0),
        (networks.autoformer, 32, "norm", 1),
    ],
)
def test_zen_of_a_transformer_takes_the_tokens_before_their_mean(
    make: Callable[[], nn.Module], size: int, path: str, first_token: int
):
    model, (images, labels) = make(), networks.batch(size=size)
    with evidence_of(model, images, labels, seed=5) as evidence:
        value = Zen(gamma=0.1).value(evidence)
        weights, x, noise = drawn(evidence, images, 5)
    expected = reference.zen(model, output_of(path, first_token), weights, x, noise, 0.1)
    assert value == pytest.approx(expected, rel=1e-4)


class ClassToken(nn.Module):
    """Tokens normalised by hand, by means over the channels; the first is scored."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 2, 2)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2).relu()
        centred = x - x.mean(-1, keepdim=True)
        return self.head((centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())[:, 0])


@pytest.mark.parametrize("make", [networks.plain, lambda: Pooling(nn.Identity(), 80), ClassToken])
def test_zen_needs_pooling(make: Callable[[], nn.Module]):
    images, labels = networks.batch()
    with evidence_of(make(), images, labels) as evidence, unavailable("global average pooling"):
        Zen().value(evidence)


@pytest.mark.parametrize("options", [{"repeats": 0}, {"gamma": 0.0}, {"gamma": math.nan}])
def test_zen_refuses_options(options: dict[str, float]):
    with pytest.raises(InputError, match="zen takes"):
        Zen(**options)
