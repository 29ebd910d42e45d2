from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from theory_networks import CLASSES, MODELS, Cells, Zero, batch, cnn, evidence_of, value_of
from torch import Tensor, nn

from lswag_fast import reference_theory as reference
from lswag_fast.errors import InputError
from lswag_fast.proxies.az_nas import AzNas, Complexity, Expressivity, Progressivity, Trainability
from lswag_fast.proxies.block_features import block_features, block_names
from lswag_fast.proxies.proxy import UnavailableError

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
    with pytest.raises(InputError, match="sequence of names"):
        AzNas(blocks="blocks.0")  # type: ignore[arg-type]
