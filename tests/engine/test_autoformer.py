"""Candidates scored from their supernet, against the same candidates scored as any other module."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import lswag_fast
from lswag_fast import Scorer, spaces
from lswag_fast.capture import Sandbox, trace
from lswag_fast.engine.autoformer import AutoFormerEngine, engine_for
from lswag_fast.errors import InputError, ScoreError
from lswag_fast.losses import CrossEntropy
from lswag_fast.options import ScoreOptions

pytestmark = pytest.mark.filterwarnings("ignore:Psi is at:UserWarning")

SPACE = spaces.get("autoformer-tiny", image_size=48, num_classes=7)
SAMPLES = 6
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(SAMPLES, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def supernet() -> spaces.AutoFormerSupernet:
    return SPACE.supernet(seed=3)


def engine(supernet: spaces.AutoFormerSupernet, images: Tensor, **options: Any) -> AutoFormerEngine:
    loss = options.pop("loss", None)
    labels = options.pop("labels", torch.arange(SAMPLES))
    resolved = ScoreOptions(device="cpu", **options).resolved(SAMPLES)
    return AutoFormerEngine(supernet, images, labels, loss, resolved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": (30, 70)},
        {"window": (100, 100)},
        {"window": (0, 20)},
        {"window": (50, 60), "patterns_inside_window": True},
        {"pooling": "sum", "pattern_samples": 4},
        {"groups": 3, "numerator": "mean", "dtype": "float32"},
    ],
)
def test_scores_are_those_of_the_module(
    supernet: spaces.AutoFormerSupernet, images: Tensor, dtype: str, options: dict[str, Any]
) -> None:
    options = {"dtype": dtype, **options}
    labels = torch.arange(SAMPLES)
    scored = engine(supernet, images, **options)
    for arch in SPACE.sample(2, seed=1):
        found = scored.score(arch)
        expected = lswag_fast.score(supernet.subnet(arch), images, labels, device="cpu", **options)
        tolerance = 1e-3 if "groups" in options else TOLERANCE[options["dtype"]]  # few groups hang on rounding
        for row, wanted in zip(found.layers, expected.layers, strict=True):
            assert (row.name, row.index, row.percentile, row.numel, row.in_window, row.dead) == (
                *(wanted.name, wanted.index, wanted.percentile, wanted.numel, wanted.in_window, wanted.dead),
            )
            if not row.in_window:
                assert row.log_sum_inverse_sigma is None
                continue
            assert row.log_sum_inverse_sigma == pytest.approx(wanted.log_sum_inverse_sigma, abs=tolerance)
            assert row.log_sum_mean_over_sigma == pytest.approx(wanted.log_sum_mean_over_sigma, abs=tolerance)
        assert asdict(found.counts) == asdict(expected.counts)
        assert found.options == expected.options
        assert found.warnings == expected.warnings
        if options["dtype"] == "float32":
            assert found.expressivity == expected.expressivity
            assert found.patterns_by_activation == expected.patterns_by_activation


def test_its_plan_is_what_a_trace_finds(supernet: spaces.AutoFormerSupernet, images: Tensor) -> None:
    for arch in SPACE.sample(3, seed=2):
        sandbox = Sandbox(supernet.subnet(arch), torch.float32)
        traced = trace(sandbox, images, torch.zeros(SAMPLES, dtype=torch.long), CrossEntropy(), ())
        plan = engine(supernet, images)._plan(arch)
        assert [(a.name, a.numel) for a in plan.layers] == [(b.name, b.numel) for b in traced.layers]
        assert [(a.kind, a.last_layer, a.positions, a.axis) for a in plan.activations] == [
            (b.kind, b.last_layer, b.positions, b.axis) for b in traced.activations
        ]
        assert (plan.multiply_adds, plan.parameters) == (traced.multiply_adds, traced.parameters)


def test_any_loss_may_be_given(supernet: spaces.AutoFormerSupernet, images: Tensor) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1)

    target = torch.randn(SAMPLES, 7)
    arch = next(SPACE.sample(1, seed=5))
    found = engine(supernet, images, loss=loss, labels=target, dtype="float32").score(arch)
    expected = lswag_fast.score(supernet.subnet(arch), images, target, loss=loss, dtype="float32", device="cpu")
    assert found.trainability == pytest.approx(expected.trainability, rel=1e-6)


def test_a_loss_that_is_not_finite_is_told(supernet: spaces.AutoFormerSupernet, images: Tensor) -> None:
    def loss(output: Tensor, _labels: Tensor) -> Tensor:
        return output.sum(1) / torch.tensor([1.0, 1, 0, 1, 1, 1])

    with pytest.raises(ScoreError, match="the loss of sample 2 is"):
        engine(supernet, images, loss=loss, dtype="float32").score(next(SPACE.sample(1)))


def test_the_scorer_takes_it_for_supernets(supernet: spaces.AutoFormerSupernet, images: Tensor) -> None:
    archs = list(SPACE.sample(3, seed=4))
    labels = torch.arange(SAMPLES)
    direct = engine(supernet, images, dtype="float32")
    with Scorer(SPACE, images, labels, supernet=supernet, device="cpu", dtype="float32") as scorer:
        assert [r.lswag for r in scorer.score(archs)] == [direct.score(arch).lswag for arch in archs]


def test_extra_parameters_take_the_way_of_any_module(supernet: spaces.AutoFormerSupernet, images: Tensor) -> None:
    options = ScoreOptions(device="cpu", extra_parameters=["head.bias"]).resolved(SAMPLES)
    assert engine_for(supernet, images, None, None, options) is None
    assert engine_for(object(), images, None, None, ScoreOptions(device="cpu").resolved(SAMPLES)) is None


def test_out_of_memory_is_met_with_less_at_a_time(
    supernet: spaces.AutoFormerSupernet, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[bool] = []
    launch = AutoFormerEngine.launch

    def short_of_memory(self: AutoFormerEngine, arch: Any, *, at_once: bool = False) -> Any:
        attempts.append(at_once)
        if not at_once:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(self, arch, at_once=at_once)

    arch = next(SPACE.sample(1, seed=6))
    expected = engine(supernet, images, dtype="float32").score(arch)
    monkeypatch.setattr(AutoFormerEngine, "launch", short_of_memory)
    assert engine(supernet, images, dtype="float32").score(arch).lswag == expected.lswag
    assert attempts == [False, True]


def test_a_candidate_that_never_fits_is_recorded(
    supernet: spaces.AutoFormerSupernet, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    archs = list(SPACE.sample(2, seed=4))
    with Scorer(SPACE, images, torch.arange(SAMPLES), supernet=supernet, device="cpu", dtype="float32") as scorer:
        with monkeypatch.context() as broken:
            broken.setattr(AutoFormerEngine, "launch", out_of_memory)
            (failed,) = scorer.score(archs[:1])
        (scored,) = scorer.score(archs[1:])
    assert (failed.status, scored.status) == ("error", "ok")
    assert "out of memory" in str(failed.error)


def test_a_space_of_one_class_is_refused_as_its_networks_are(images: Tensor) -> None:
    space = spaces.get("autoformer-tiny", image_size=48, num_classes=1)
    net = space.supernet(seed=0)
    arch = next(space.sample(1, seed=0))
    zeros = torch.zeros(SAMPLES, dtype=torch.long)
    for scored in (
        lambda: engine(net, images, labels=zeros).score(arch),
        lambda: lswag_fast.score(net.subnet(arch), images, zeros),
    ):
        with pytest.raises(InputError, match="two or more classes"):
            scored()


def drawing(logits: Tensor, labels: Tensor) -> Tensor:
    random.random()
    return logits.float().square().sum(1) * torch.rand(len(logits))


@pytest.mark.parametrize(
    "options", [{"loss": drawing}, {"proxies": ("lswag", "zen")}, {}], ids=["loss", "proxy", "plain"]
)
def test_a_score_leaves_states_and_settings_as_they_were(
    supernet: spaces.AutoFormerSupernet, images: Tensor, options: dict[str, Any]
) -> None:
    scored = engine(supernet, images, dtype="float32", **options)
    arch = next(SPACE.sample(1, seed=4))
    plain = scored.score(arch)
    before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled()
    # Whatever the caller has set meanwhile.
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = scored.launch(arch).finish()
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    after = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert found.proxies.keys() == plain.proxies.keys()
    if options.get("loss") is None:
        assert found.proxies == plain.proxies
