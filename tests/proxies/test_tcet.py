from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from networks import Batched, NoSampleAxis, Repeated, SequenceFirst, Tied
from theory_networks import CLASSES, MODELS, batch, evidence_of, value_of, vit
from torch import Tensor, nn

from lswag_fast import reference_proxies
from lswag_fast import reference_theory as reference
from lswag_fast.errors import InputError
from lswag_fast.proxies.proxy import UnavailableError
from lswag_fast.proxies.tcet import Tcet


@pytest.mark.parametrize("name", [*MODELS, "repeated"])
def test_tcet(name: str) -> None:
    torch.manual_seed(5)
    model = {**MODELS, "repeated": Repeated}[name]()
    images, labels = batch()
    with evidence_of(model, images, labels) as evidence:
        assert Tcet().value(evidence) == pytest.approx(reference.tcet(model, images, labels), rel=1e-4)
        details = Tcet().details(evidence)
        assert details["layers"] == len(evidence.network.plan.layers)
        assert details["singular"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_tcet_with_the_saliency_of_synflow(name: str) -> None:
    model = MODELS[name]()
    images, labels = batch()
    with evidence_of(model, images, labels) as evidence:
        names = [layer.name for layer in evidence.network.plan.layers]
        weights, gradients = reference_proxies.synaptic_flow(model, images.shape[1:], names)
        saliency = {n: (weights[n] * gradients[n]).abs() for n in names}
        expected = reference.tcet(model, images, labels, saliency)
        assert Tcet(saliency="synflow").value(evidence) == pytest.approx(expected, rel=1e-6)


def test_tcet_refuses_other_saliencies() -> None:
    with pytest.raises(InputError, match="saliency must be"):
        Tcet(saliency="grasp")  # type: ignore[arg-type]


def test_tcet_of_layers_that_tell_no_samples_apart() -> None:
    images, labels = batch()
    images[4] = images[2]
    with evidence_of(vit(), images, labels) as evidence:
        assert Tcet().value(evidence) == 0
        details = Tcet().details(evidence)
        assert details["singular"] == details["layers"]


@pytest.mark.parametrize("model", [SequenceFirst, Tied, Batched, NoSampleAxis])
def test_tcet_of_weights_used_in_other_ways(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    images, labels = batch()
    one = value_of(Tcet(), model().eval(), images, labels)
    assert math.isfinite(one)


def test_tcet_of_a_layer_off_the_fused_path_is_that_of_a_linear_layer() -> None:
    class Layer(nn.Module):
        def __init__(self, einsum: bool) -> None:
            super().__init__()
            self.first = nn.Linear(192, 20, bias=False)
            self.last = nn.Linear(20, CLASSES, bias=False)
            self.einsum = einsum

        def forward(self, images: Tensor) -> Tensor:
            x = images.flatten(1)
            hidden = torch.einsum("si,oi->so", x, self.first.weight) if self.einsum else self.first(x)
            return self.last(hidden.relu())

    images, labels = batch()
    values = []
    for einsum in (False, True):
        torch.manual_seed(0)
        values.append(value_of(Tcet(), Layer(einsum), images, labels))
    assert values[1] == pytest.approx(values[0], rel=1e-5)


class Mixed(nn.Module):
    """Two layers on tokens of either order, behind a batch normalisation or none."""

    def __init__(self, sequence_first: bool, coupled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3) if coupled else nn.Identity()
        self.patch = nn.Conv2d(3, 12, 2, 2)
        self.wide, self.narrow, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, CLASSES)
        self.order = (2, 0, 1) if sequence_first else (0, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(self.norm(images)).flatten(2).permute(self.order)
        x = self.narrow(self.wide(x).relu())
        return self.head(x.mean(self.order.index(2)))


@pytest.mark.parametrize("coupled", [False, True])
def test_tcet_of_samples_on_the_second_axis_is_that_of_samples_on_the_first(coupled: bool) -> None:
    images, labels = batch()
    expected = value_of(Tcet(), Mixed(False, coupled), images, labels)
    assert value_of(Tcet(), Mixed(True, coupled), images, labels) == pytest.approx(expected, rel=1e-5)


def test_tcet_names_the_layer_whose_samples_are_on_no_known_axis() -> None:
    images, labels = batch()
    with evidence_of(Mixed(True, True), images, labels) as evidence:
        plan = evidence.network.plan
        plan.observed = {c: use for c, use in plan.observed.items() if plan.layers[use.layer].name == "patch.weight"}
        with pytest.raises(UnavailableError, match=r"the output of wide\.weight is \[16, 6, 20\], and which axis"):
            Tcet().value(evidence)
