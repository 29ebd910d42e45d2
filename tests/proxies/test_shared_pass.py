"""Proxies that share L-SWAG's pass, held to their float64 definitions."""

from __future__ import annotations

import math

import proxy_networks
import pytest
import torch
from networks import CLASSES
from shared_networks import BUILDERS, SHARED, batch, build
from torch import Tensor, nn

import lswag_fast
from lswag_fast import reference, spaces
from lswag_fast import reference_saliency as definitions
from lswag_fast.errors import InputError
from lswag_fast.proxies.reg_swap import RegSwap

OF_GROUPS = {name: getattr(definitions, name) for name in ("zico", "gsnr", "grad_norm", "plain", "snip")}


ONLY_MODULES = (
    "in place",
    "convolutions",
    "batch norm",
    "batch norm in eval mode",
    "used twice",
    "residuals",
    "residuals in training",
    "vision transformer",
)
"""Those whose layers are all called as modules."""


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("many_groups", [False, True])
def test_every_proxy_as_defined(name: str, many_groups: bool) -> None:
    model, (images, labels) = build(name), batch(classes=proxy_networks.CLASSES)
    # Where samples are coupled, one alone has no gradient.
    groups = (6 if reference.samples_are_coupled(model) else 12) if many_groups else 4
    result = as_defined(model, images, labels, groups)
    assert result.proxies["flops"] == definitions.multiply_adds(model, images[0])


def test_every_proxy_of_an_autoformer_as_defined() -> None:
    model, (images, labels) = proxy_networks.autoformer(), batch(5, classes=proxy_networks.CLASSES, size=32)
    found = as_defined(model, images, labels, 5).proxies
    fisher = lswag_fast.score(model, images, labels, dtype="float32", proxies=("fisher",)).proxies["fisher"]
    assert fisher == pytest.approx(definitions.fisher(model, images, labels, 5), rel=1e-4)
    space = spaces.get("autoformer-tiny", image_size=32, num_classes=proxy_networks.CLASSES)
    (arch,) = space.sample(1, seed=0)
    assert (found["params"], found["flops"]) == (space.params(arch), space.macs(arch))


def as_defined(model: nn.Module, images: Tensor, labels: Tensor, groups: int) -> lswag_fast.LswagResult:
    """Holds the proxies of the shared pass, but Fisher and flops, to their definitions; returns the result."""
    thousands = sum(p.numel() for p in model.parameters()) / 1000
    chosen = ("lswag", *(name for name in SHARED if name != "reg_swap"), RegSwap(mu=thousands + 0.2, sigma=0.3))
    result = lswag_fast.score(model, images, labels, groups=groups, dtype="float32", proxies=chosen)
    layers = [row.name for row in result.layers]
    for proxy, definition in OF_GROUPS.items():
        expected = definition(model, images, labels, groups, layers)
        assert result.proxies[proxy] == pytest.approx(expected, rel=1e-4), proxy
    expected = definitions.gradsign(model, images, labels, groups, layers)
    gradients = reference.group_gradients(model, images, labels, groups, layers).values()
    undecided = sum(int((abs(g) <= 1e-6 * g.abs().mean()).sum() - (g == 0).sum()) for of in gradients for g in of)
    assert result.proxies["gradsign"] == pytest.approx(expected, rel=1e-12, abs=2 * undecided)
    score = reference.lswag(model, images, labels, parameters=layers, groups=groups)
    signs = reference.activation_signs(model, images, labels, groups)
    assert result.proxies["nwot"] == pytest.approx(definitions.nwot(signs), rel=1e-10)
    assert result.proxies["swap"] == result.proxies["psi"] == score.expressivity
    expected = definitions.regularised_swap(signs, round(1000 * thousands), thousands + 0.2, 0.3)
    assert result.proxies["reg_swap"] == pytest.approx(expected, rel=1e-12)
    assert result.proxies["lambda"] == pytest.approx(score.trainability, rel=1e-4)
    assert result.proxies["lswag"] == pytest.approx(score.lswag, rel=1e-4)
    assert result.proxies["l2_norm"] == pytest.approx(definitions.l2_norm(model, layers), rel=1e-6)
    assert result.proxies["params"] == round(1000 * thousands)
    assert not any("has no value" in text or "failed" in text for text in result.warnings)
    return result


@pytest.mark.parametrize("name", ONLY_MODULES)
def test_fisher_as_defined(name: str) -> None:
    model, (images, labels) = build(name), batch()
    result = lswag_fast.score(model, images, labels, groups=4, dtype="float32", proxies=("fisher",))
    assert result.proxies["fisher"] == pytest.approx(definitions.fisher(model, images, labels, 4), rel=1e-4)


class Coupled(nn.Module):
    """A token mixer behind batch normalisation; one network in three layouts."""

    def __init__(self, layout: str, tokens: int) -> None:
        super().__init__()
        self.layout, self.tokens = layout, tokens
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Linear(192 // tokens, 10)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(images).reshape(len(images), self.tokens, -1)
        if self.layout == "tokens first":
            return self.head(self.first(x.transpose(0, 1)).relu().mean(0))
        if self.layout == "weight on the left":
            y = (self.first.weight @ x.transpose(1, 2)).transpose(1, 2) + self.first.bias
            return self.head(y.relu().mean(1))
        return self.head(self.first(x).relu().mean(1))


@pytest.mark.parametrize("tokens", [2, 12, 16])
def test_fisher_of_coupled_samples_knows_where_they_are(tokens: int) -> None:
    images, labels = batch()
    found = {}
    for layout in ("samples first", "tokens first", "weight on the left"):
        torch.manual_seed(0)
        model = Coupled(layout, tokens)
        found[layout] = lswag_fast.score(model, images, labels, groups=2, dtype="float32", proxies=("fisher",))
    expected = found["samples first"].proxies["fisher"]
    torch.manual_seed(0)
    assert expected == pytest.approx(definitions.fisher(Coupled("samples first", tokens), images, labels, 2), rel=1e-4)
    assert found["tokens first"].proxies["fisher"] == pytest.approx(expected, rel=1e-5)
    # The bias is added behind the product there, and so is no part of the output.
    assert found["weight on the left"].proxies["fisher"] == pytest.approx(_without_bias(tokens), rel=1e-4)


class Shift(nn.Module):
    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def _without_bias(tokens: int) -> float:
    images, labels = batch()
    torch.manual_seed(0)
    model = Coupled("samples first", tokens)
    bias = nn.Parameter(model.first.bias.detach().clone())
    model.first.bias = None
    plain = model.first
    model.first = nn.Sequential(plain, Shift(bias))  # type: ignore[assignment]
    return definitions.fisher(model, images, labels, 2)


def test_patterns_are_taken_over_the_first_samples() -> None:
    model, (images, labels) = build("convolutions"), batch()
    result = lswag_fast.score(model, images, labels, dtype="float32", pattern_samples=6, proxies=("swap", "nwot"))
    signs = reference.activation_signs(model, images, labels, 12)
    assert result.proxies["nwot"] == pytest.approx(definitions.nwot([s[:6] for s in signs]), rel=1e-10)
    assert result.proxies["swap"] == result.expressivity


def test_regularised_swap() -> None:
    model, (images, labels) = build("convolutions"), batch()
    thousands = sum(p.numel() for p in model.parameters()) / 1000
    chosen = ("swap", RegSwap(mu=thousands - 0.5, sigma=2.0))
    result = lswag_fast.score(model, images, labels, dtype="float32", proxies=chosen)
    assert result.proxies["reg_swap"] == pytest.approx(result.proxies["swap"] * math.exp(-0.125), rel=1e-9)
    assert {"name": "reg_swap", "mu": thousands - 0.5, "sigma": 2.0} in result.options["proxies"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -1}, "sigma must be a finite number above 0, got -1"),
        ({"sigma": 0.0}, "sigma must be"),
        ({"sigma": math.inf}, "sigma must be"),
        ({"sigma": math.nan}, "sigma must be"),
        ({"sigma": "2"}, "sigma must be"),
        ({"mu": math.nan}, "mu must be a finite number of thousands of parameters, or None, got nan"),
        ({"mu": -math.inf}, "mu must be"),
    ],
)
def test_regularised_swap_refuses_what_regularises_nothing(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RegSwap(**options)


@pytest.mark.parametrize("mu", [1e3, 1e200])
def test_a_regularisation_that_leaves_nothing_has_no_value(mu: float) -> None:
    model, (images, labels) = build("convolutions"), batch()
    result = lswag_fast.score(model, images, labels, dtype="float32", proxies=(RegSwap(mu=mu, sigma=0.5),))
    assert math.isnan(result.proxies["reg_swap"])
    (text,) = (text for text in result.warnings if "reg_swap has no value" in text)
    assert f"mu = {mu:g} and sigma = 0.5" in text
    assert f"P = {sum(p.numel() for p in model.parameters()) / 1000:g} thousand" in text


def test_images_that_agree_everywhere_have_no_nwot() -> None:
    model, (images, labels) = build("convolutions"), batch()
    result = lswag_fast.score(model, images[:1].repeat(12, 1, 1, 1), labels, dtype="float32", proxies=("nwot",))
    assert math.isnan(result.proxies["nwot"])
    assert any("nwot has no value: the kernel is singular" in text for text in result.warnings)


@pytest.mark.parametrize("seed", range(8))
def test_fewer_independent_patterns_than_samples_have_no_nwot(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    images, labels = batch(14)
    result = lswag_fast.score(model, images, labels, dtype="float32", proxies=("nwot",))
    assert math.isnan(result.proxies["nwot"])
    assert any("the 14 samples have fewer independent patterns" in text for text in result.warnings)
