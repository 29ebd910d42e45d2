"""What the key of a score in a store depends on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from number_space import IMAGES, NumberSpace, scorer
from torch import Tensor, nn

from lswag_fast import spaces
from lswag_fast.engine.identity import Context, describe_loss
from lswag_fast.engine.scorer import Scorer
from lswag_fast.errors import InputError


def test_key_holds_everything_that_the_score_depends_on() -> None:
    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return output

    labels = torch.tensor([0, 1, 2, 3])
    other = IMAGES.clone()
    other[0, 0, 0, 0] += 1
    arch = {"n": 1}
    variants: list[Scorer] = [
        scorer(),
        Scorer(NumberSpace(), other, device="cpu", dtype="float32"),
        Scorer(NumberSpace(), IMAGES.double(), device="cpu", dtype="float32"),
        scorer(labels=labels),
        scorer(labels=labels.flip(0)),
        scorer(seed=1),
        scorer(groups=2),
        scorer(dtype="bfloat16"),
        scorer(window=(0, 50)),
        scorer(pooling="sum"),
        scorer(pattern_samples=2),
        scorer(numerator="mean"),
        scorer(patterns_inside_window=True),
        scorer(extra_parameters=("bias",)),
        scorer(loss=loss),
        scorer(loss=nn.CrossEntropyLoss(reduction="none")),
        scorer(loss=nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)),
    ]
    keys = [v.context.key(v.space.encode(arch)) for v in variants]
    assert len(set(keys)) == len(keys)
    assert scorer(groups=4).context.id == scorer().context.id  # None is resolved before it is hashed


def test_weights_and_space_are_part_of_the_key() -> None:
    images, tiny = torch.randn(2, 3, 32, 32), spaces.get("autoformer-tiny", image_size=32, num_classes=10)
    eleven = spaces.get("autoformer-tiny", image_size=32, num_classes=11)
    options = {"device": "cpu", "dtype": "float32"}
    given = [tiny.supernet(seed) for seed in (0, 1)]
    contexts = {Scorer(tiny, images, supernet=weights, **options).context.id for weights in (None, *given)}
    assert len(contexts | {Scorer(eleven, images, **options).context.id}) == 4
    assert Scorer(tiny, images, supernet=tiny.supernet(1), **options).context.id in contexts


def test_devices_of_one_kind_share_keys() -> None:
    options = scorer().options
    first, second = (
        Context.of({}, IMAGES, None, type(options)(**{**vars(options), "device": device}), "seed:0", "cross_entropy")
        for device in ("cuda:0", "cuda:1")
    )
    assert first == second


def test_nameless_loss_needs_an_identity_to_be_stored(tmp_path: Path) -> None:
    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return output

    with pytest.raises(InputError, match="set its `identity` attribute"):
        scorer(tmp_path / "s.db", loss=loss)
    assert not (tmp_path / "s.db").exists()
    loss.identity = "output, version 1"  # type: ignore[attr-defined]
    with scorer(tmp_path / "s.db", loss=loss) as scoring:
        assert scoring.context.loss == "output, version 1"


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return output[:, 0] * self.weight


def test_losses_that_differ_in_weights_or_objects_are_told_apart() -> None:
    names = [
        describe_loss(nn.CrossEntropyLoss(weight=torch.full((4,), weight), reduction="none"), lasting=True)
        for weight in (1.0, 2.0, 2.0)
    ]
    assert names[0] != names[1] == names[2]
    with pytest.raises(InputError, match="identity"):
        describe_loss(Weighted(2.0).loss, lasting=True)
    with pytest.raises(InputError, match="distance_function of Triplet"):
        describe_loss(nn.TripletMarginWithDistanceLoss(distance_function=lambda a, b: a), lasting=True)
