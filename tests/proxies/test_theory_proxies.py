from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Batched, Convolutions, Dilations, NoSampleAxis, Repeated, SequenceFirst, Tied, TokenMixing
from torch import Tensor, nn

from lswag_fast import reference_theory as reference
from lswag_fast.capture import Activation, Sandbox, trace
from lswag_fast.capture.probe import probe
from lswag_fast.capture.run import CaptureMode
from lswag_fast.capture.sandbox import preserved
from lswag_fast.capture.trace import take
from lswag_fast.errors import InputError
from lswag_fast.losses import CrossEntropy
from lswag_fast.ops.activation_patterns import hamming_kernel, pack_signs
from lswag_fast.proxies import az_nas, registry, te_nas
from lswag_fast.proxies.az_nas import AzNas, Complexity, Expressivity, Progressivity, Trainability
from lswag_fast.proxies.block_features import block_features, block_names
from lswag_fast.proxies.network import Network
from lswag_fast.proxies.proxy import UnavailableError
from lswag_fast.proxies.spectator import Spectator
from lswag_fast.proxies.tangent_kernel import tangent_kernel
from lswag_fast.proxies.tcet import Tcet
from lswag_fast.proxies.te_nas import TeNas, TeNasNtk, TeNasRegions

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


def test_te_nas_of_one_network_and_of_a_pool() -> None:
    model = vit()
    images, labels = batch()
    with evidence_of(model, images, labels) as evidence:
        assert TeNas().value(evidence) == TeNasRegions().value(evidence) - TeNasNtk().value(evidence)
        assert set(TeNas().details(evidence)) >= {"regions", "inputs", "condition_number", "relative_rounding"}
    assert TeNas().to_dict()["regions"] == {"inputs": "batch", "repeats": 1, "size": 3}
    # Ranks of regions 1 2.5 2.5 4, of -kappa 3 4 1.5 1.5.
    assert te_nas.aggregate([1, 3, 3, 7], [20, 10, 90, 90]).tolist() == [4, 6.5, 4, 5.5]
    with pytest.raises(InputError, match="same length"):
        te_nas.aggregate([1, 2], [1, 2, 3])


BLOCKS = {
    "cnn": ("stage1.0", "stage1.1", "stage2.0"),
    "cnn-train": ("stage1.0", "stage1.1", "stage2.0"),
    "vit": ("blocks.0", "blocks.1", "blocks.2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_az_nas_parts(name: str) -> None:
    model = MODELS[name]()
    images, labels = batch()
    assert block_names(model) == BLOCKS[name]
    features = reference.block_features(model, images, BLOCKS[name])
    expected = {
        Expressivity: reference.expressivity(features),
        Progressivity: reference.progressivity(features),
        Trainability: reference.trainability(features, seed=3),
    }
    with evidence_of(model, images, labels) as evidence:
        for part, value in expected.items():
            assert part().value(evidence) == pytest.approx(value, rel=1e-4), part
        assert Complexity().value(evidence) == evidence.multiply_adds
        total = sum(expected.values()) + math.log(evidence.multiply_adds)
        assert AzNas().value(evidence) == pytest.approx(total, rel=1e-4)
        assert Expressivity(blocks=BLOCKS[name]).value(evidence) == Expressivity().value(evidence)
        details = AzNas().details(evidence)
        assert sum(v for k, v in details.items() if k.startswith("entropy")) == Expressivity().value(evidence)
        assert [k for k in details if k.startswith("norm")] == [f"norm {i} {b}" for i, b in enumerate(BLOCKS[name], 1)]


def test_az_nas_of_noise() -> None:
    model = cnn()
    images, labels = batch()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    expected = reference.expressivity(reference.block_features(model, noise, BLOCKS["cnn"]))
    assert value_of(Expressivity(inputs="noise"), model, images, labels) == pytest.approx(expected, rel=1e-4)


class Plain(nn.Module):
    """Stages without blocks of their own, the last one in tokens of another number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 2, 2), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


def test_blocks_of_a_plain_stack_are_its_layers_before_what_is_done_in_place() -> None:
    torch.manual_seed(0)
    model = Plain()
    images, labels = batch()
    assert block_names(model) == ("layers.0", "layers.2")
    first = model.double().layers[0](images.double())
    expected = reference.expressivity([first, model.layers[2](first.relu())])
    assert value_of(Expressivity(), model.float(), images, labels) == pytest.approx(expected, rel=1e-4)


class ChannelsLast(nn.Module):
    """Blocks in other layouts than those of a product: [S, H, W, C], and [S, C, H, W] out of a linear layer."""

    class Mix(nn.Module):
        def __init__(self, width: int, first: bool) -> None:
            super().__init__()
            self.mix = nn.Linear(width, width)
            self.first = first

        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(self.mix(x.movedim(1, -1) if self.first else x))
            return x + (y.movedim(-1, 1) if self.first else y)

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.first = first
        self.blocks = nn.ModuleList(self.Mix(6, first) for _ in range(2))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x if self.first else x.movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3) if self.first else (1, 2)))


def test_channels_are_found_in_any_layout() -> None:
    images, labels = batch()
    values = []
    for first in (True, False):
        torch.manual_seed(0)
        model = ChannelsLast(first)
        with evidence_of(model, images, labels) as evidence:
            found = block_features(evidence.network, images, block_names(model))
            assert [f.channel_axis for f in found[1:]] == [1 if first else 3] * 2
            values.append(Expressivity().value(evidence))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


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


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return F.silu(2 * x), "beside it"


class Unpacked(Cells):
    """One cell called twice, which returns a tuple."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for _ in range(2):
            x = self.cells[0](x)[0]
        return self.head(x.flatten(2).mean(2))


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :5]


def test_az_nas_of_cells_that_do_nothing() -> None:
    images, labels = batch()
    skips = Cells(nn.Identity(), nn.Conv2d(4, 4, 1))
    assert value_of(Trainability(), skips, images, labels) == -math.inf
    assert value_of(Progressivity(), skips, images, labels) <= 0
    assert math.isfinite(value_of(Expressivity(), skips, images, labels))
    zeros = Cells(nn.Conv2d(4, 4, 1), Zero())
    for part in (Expressivity, Progressivity, AzNas):
        assert value_of(part(), zeros, images, labels) == -math.inf
    assert value_of(Trainability(), zeros, images, labels) < -1e5


def test_every_call_of_a_block_and_the_first_of_its_outputs_is_a_feature() -> None:
    images, labels = batch()
    model = Unpacked(Twice(), Twice())
    first = model.stem(images).double()
    expected = reference.expressivity([first, F.silu(2 * first), F.silu(2 * F.silu(2 * first))])
    assert value_of(Expressivity(), model, images, labels) == pytest.approx(expected, rel=1e-5)


def test_az_nas_that_cannot_be_had() -> None:
    images, labels = batch()
    cut = Cells(nn.Conv2d(4, 4, 1), Cut())
    with evidence_of(cut, images, labels) as evidence:
        with pytest.raises(UnavailableError, match=r"block cells\.1 does not divide positions"):
            Trainability().value(evidence)
        assert Expressivity().value(evidence) > 0
    bare = nn.Conv2d(3, CLASSES, 8)
    with (
        evidence_of(bare, images, labels, loss=lambda output, labels: output.square().mean((1, 2, 3))) as evidence,
        pytest.raises(UnavailableError, match="0 block outputs were found"),
    ):
        AzNas().value(evidence)
    with evidence_of(cnn(), images, labels) as evidence, pytest.raises(UnavailableError, match="stage9"):
        Expressivity(blocks=("stage1", "stage9")).value(evidence)
    with pytest.raises(InputError, match="inputs must be"):
        AzNas(inputs="photos")  # type: ignore[arg-type]


def test_az_nas_of_a_pool() -> None:
    found = az_nas.aggregate([1.0, 2.0, -math.inf, math.nan], [5.0, 5.0, 1.0, 9.0])
    assert found[:3] == pytest.approx([math.log(2 / 3) + math.log(2.5 / 3), math.log(2.5 / 3), 2 * math.log(1 / 3)])
    assert np.isnan(found[3])
    assert np.isnan(te_nas.aggregate([1.0, 2.0, 3.0], [5.0, math.nan, 4.0])).tolist() == [False, True, False]
    assert te_nas.aggregate([1.0, 2.0, 3.0], [5.0, math.nan, 4.0])[[0, 2]].tolist() == [2.0, 4.0]
    assert az_nas.aggregate([4.0]).tolist() == [0.0]
    with pytest.raises(InputError, match="same length"):
        az_nas.aggregate([1.0], [1.0, 2.0])


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


def test_the_model_is_left_as_it_was() -> None:
    model = cnn(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = batch()
    given = images.clone()
    with evidence_of(model, images, labels) as evidence:
        for proxy in (TeNas(), AzNas(), Tcet()):
            proxy.value(evidence)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(images, given)


def test_all_are_registered_with_a_source() -> None:
    for name in registry.names():
        if name.startswith(("te_nas", "az_nas", "tcet")):
            proxy = registry.get(name)
            assert proxy.name == name
            assert proxy.source
            assert proxy().to_dict()["name"] == name
