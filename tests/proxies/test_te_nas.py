from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import Batched, Convolutions, Dilations, NoSampleAxis, Repeated, SequenceFirst, Tied, TokenMixing
from theory_networks import CLASSES, MODELS, SAMPLES, Cells, Zero, batch, cnn, evidence_of, value_of, vit
from torch import nn

from lswag_fast import reference_theory as reference
from lswag_fast.errors import InputError
from lswag_fast.proxies.proxy import UnavailableError
from lswag_fast.proxies.tangent_kernel import tangent_kernel
from lswag_fast.proxies.te_nas import TeNas, TeNasNtk, TeNasRegions


@pytest.mark.parametrize("name", MODELS)
def test_regions_are_the_distinct_patterns_of_samples(name: str) -> None:
    model = MODELS[name]()
    images, labels = batch()
    images[3] = images[1]
    images[5] = images[1]
    assert value_of(TeNasRegions(), model, images, labels) == reference.linear_regions(model, images) == SAMPLES - 2


def test_regions_of_few_positions_are_told_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.ReLU(), nn.Linear(3, CLASSES))
    images, labels = batch(40)
    found = value_of(TeNasRegions(), model, images, labels)
    assert found == reference.linear_regions(model, images)
    assert 4 <= found <= 8


def test_regions_of_noise_and_crops() -> None:
    model = cnn()
    images, labels = batch()
    with evidence_of(model, images, labels) as evidence:
        generator = torch.Generator().manual_seed(3)
        noise = torch.cat([torch.randn(images.shape, generator=generator) for _ in range(2)])
        noisy = TeNasRegions(inputs="noise", repeats=2).details(evidence)
        assert noisy == {"regions": reference.linear_regions(model, noise), "inputs": 12}
        whole = TeNasRegions(inputs="crops", size=8, repeats=2).details(evidence)
        assert whole == {"regions": reference.linear_regions(model, images), "inputs": 12}
        corners = [images[:, :, i : i + 7, j : j + 7] for i in (0, 1) for j in (0, 1)]
        some = TeNasRegions(inputs="crops", size=7, repeats=60).details(evidence)
        assert some["regions"] == reference.linear_regions(model, torch.cat(corners)) == 4 * SAMPLES
        # Of crops of one pixel nearly all that there are come up.
        small = TeNasRegions(inputs="crops", size=1, repeats=300).details(evidence)
        every = images.movedim(1, -1).reshape(-1, 3, 1, 1)
        assert small["inputs"] == 1800
        distinct = reference.linear_regions(model, every)
        assert 0.9 * distinct < small["regions"] <= distinct < 0.5 * len(every)
        assert TeNasRegions(inputs="crops", size=1, repeats=300).details(evidence) == small


def test_regions_that_cannot_be_had() -> None:
    images, labels = batch()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    with evidence_of(linear, images, labels) as evidence, pytest.raises(UnavailableError, match="no activation"):
        TeNasRegions().value(evidence)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    with evidence_of(flat, images, labels) as evidence:
        with pytest.raises(UnavailableError, match=r"does not run on images \[3, 3, 3\]"):
            TeNasRegions(inputs="crops").value(evidence)
        with pytest.raises(UnavailableError, match="crops of 9 x 9"):
            TeNasRegions(inputs="crops", size=9).value(evidence)
    with pytest.raises(InputError, match="inputs must be"):
        TeNasRegions(inputs="photos")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_condition_number_is_that_of_the_same_float32_gradients(name: str) -> None:
    model = MODELS[name]()
    images, labels = batch()
    gradients = reference.logit_gradients(model, images, torch.float32)
    expected = reference.condition_number(reference.tangent_kernel(gradients))
    with evidence_of(model, images, labels) as evidence:
        details = TeNasNtk().details(evidence)
        assert TeNasNtk().value(evidence) == details["condition_number"]
    assert details["condition_number"] == pytest.approx(expected, rel=1e-4)
    assert details["largest_eigenvalue"] / details["smallest_eigenvalue"] == details["condition_number"]
    assert details["relative_rounding"] == 2.0**-23 * details["condition_number"]


KERNELS: dict[str, Callable[[], nn.Module]] = {
    **MODELS,
    "dilations": Dilations,
    "convolutions": Convolutions,
    "sequence-first": SequenceFirst,
    "tied": Tied,
    "repeated": Repeated,
    "token-mixing": TokenMixing,
    "no-sample-axis": NoSampleAxis,
    "batched": Batched,
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_that_of_per_sample_gradients(name: str) -> None:
    torch.manual_seed(4)
    model = KERNELS[name]()
    images, labels = batch()
    with evidence_of(model, images, labels) as evidence:
        network = evidence.network
        found = tangent_kernel(network)
        leaves = {layer.name: model.get_parameter(layer.name) for layer in network.plan.layers}
        gradients = []
        for n in range(SAMPLES):
            total = model(images)[n].sum()
            parts = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in parts if g is not None]))
    expected = reference.tangent_kernel(gradients)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("held", [1, 100, 2**25])
def test_kernel_is_the_same_in_small_parts(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr("lswag_fast.proxies.tangent_kernel._HELD", held)
    images, labels = batch()
    for model in (cnn(), cnn(True), vit()):
        expected = reference.tangent_kernel(reference.logit_gradients(model, images))
        with evidence_of(model, images, labels) as evidence:
            torch.testing.assert_close(
                tangent_kernel(evidence.network), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
            )


def test_kernel_in_bfloat16_scores_is_of_float32_passes() -> None:
    images, labels = batch()
    images = images.bfloat16().float()
    single = value_of(TeNasNtk(), vit(), images, labels)
    assert value_of(TeNasNtk(), vit(), images, labels, dtype=torch.bfloat16) == pytest.approx(single, rel=1e-6)


def test_singular_and_absent_kernels() -> None:
    model = vit()
    images, labels = batch()
    images[4] = images[2]
    assert value_of(TeNasNtk(), model, images, labels) == 2.0**23
    assert value_of(TeNasNtk(), model, images[:1], labels[:1]) == 1
    dead = Cells(Zero(0.0), nn.ReLU())
    assert value_of(TeNasNtk(), dead, images, labels) == 2.0**23
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with (
        evidence_of(features, images, labels, loss=lambda output, labels: output.square().mean((1, 2, 3))) as evidence,
        pytest.raises(UnavailableError, match="logits"),
    ):
        TeNasNtk().value(evidence)
    images[0] = 1e30
    huge = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    with evidence_of(huge, images * 1e30, labels) as evidence, pytest.raises(UnavailableError, match="not finite"):
        TeNasNtk().value(evidence)


def test_te_nas_of_one_network() -> None:
    model = vit()
    images, labels = batch()
    with evidence_of(model, images, labels) as evidence:
        assert TeNas().value(evidence) == TeNasRegions().value(evidence) - TeNasNtk().value(evidence)
        assert set(TeNas().details(evidence)) >= {"regions", "inputs", "condition_number", "relative_rounding"}
    assert TeNas().to_dict()["regions"] == {"inputs": "batch", "repeats": 1, "size": 3}
