"""Values that are judged with the results of a pass, as on a CUDA device, shown on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import networks
import pytest
import torch
from torch import Tensor

import lswag_fast
from lswag_fast import InputError, value_checks
from lswag_fast.proxies import statistics

SAMPLES = 8


def images(value: float | None = None) -> Tensor:
    """Returns [S, ...] normal values, with `value` in image 3."""
    batch = torch.randn(SAMPLES, *networks.IMAGE, generator=torch.Generator().manual_seed(0))
    if value is not None:
        batch[3, 0, 0, 0] = value
    return batch


def labels(value: int = 0) -> Tensor:
    found = torch.arange(SAMPLES) % networks.CLASSES
    found[2] = value
    return found


BAD_VALUES = {
    "NaN": (images(float("nan")), labels()),
    "Inf": (images(float("inf")), labels()),
    "-Inf": (images(float("-inf")), labels()),
    "label too large": (images(), labels(networks.CLASSES)),
    "negative label": (images(), labels(-1)),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The losses of every pass that came to its end."""
    losses_of: list[Tensor] = []
    launch = statistics.PassStatistics.launch

    def noted(self: statistics.PassStatistics, losses: Tensor, *others: Any) -> None:
        losses_of.append(losses)
        launch(self, losses, *others)

    monkeypatch.setattr(statistics.PassStatistics, "launch", noted)
    return losses_of


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU pass for a device that computes apart from the host."""
    compute_apart(monkeypatch)


def compute_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_checks, "computes_apart", lambda tensor: True)


def score(
    batch: Tensor, classes: Tensor, model: torch.nn.Module | None = None, proxies: Sequence[str] = ("lswag",)
) -> lswag_fast.LswagResult:
    return lswag_fast.score(model or networks.Attention(), batch, classes, dtype="float32", proxies=proxies)


@pytest.mark.parametrize("what", BAD_VALUES)
def test_the_error_is_that_of_a_check_at_once(
    what: str, launched: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError) as at_once:
        score(*BAD_VALUES[what])
    assert not launched
    compute_apart(monkeypatch)
    with pytest.raises(InputError) as late:
        score(*BAD_VALUES[what])
    assert str(late.value) == str(at_once.value)
    assert len(launched) == 1
    assert launched[0].isfinite().all()


def test_images_are_judged_before_labels(late: None) -> None:
    with pytest.raises(InputError, match="image 3"):
        score(images(float("nan")), labels(-1))


@pytest.mark.parametrize(
    ("network", "passes"),
    [
        (networks.Attention, 1),
        (networks.SequenceFirst, 1),
        (partial(networks.Folded, True), 1),
        (partial(networks.Folded, False), 1),
        (networks.Between, 2),
        (networks.BetweenActivation, 2),
    ],
    ids=["attention", "sequence first", "samples outermost", "samples innermost", "neither", "neither, activation too"],
)
def test_good_values_give_the_same_result(
    network: Callable[[], torch.nn.Module], passes: int, launched: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, proxies = network(), ("lswag", "snip", "dss", "te_nas", "tcet")
    at_once = score(images(), labels(), model, proxies)
    launched.clear()
    compute_apart(monkeypatch)
    late = score(images(), labels(), model, proxies)
    assert len(launched) == passes
    assert_same(late, at_once)
    assert late.proxies == at_once.proxies


class Drawing(networks.Between):
    def forward(self, batch: Tensor) -> Any:
        return super().forward(batch + 0.1 * random.random() * torch.rand_like(batch))


def test_a_pass_that_is_run_again_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Drawing()

    def drawn() -> lswag_fast.LswagResult:
        torch.manual_seed(1)
        random.seed(1)
        return score(images(), labels(), model)

    at_once = drawn()
    compute_apart(monkeypatch)
    assert_same(drawn(), at_once)


def assert_same(one: lswag_fast.LswagResult, other: lswag_fast.LswagResult) -> None:
    assert (one.lswag, one.layers, one.warnings) == (other.lswag, other.layers, other.warnings)


class Unlucky(networks.Attention):
    def forward(self, batch: Tensor) -> Any:
        output = super().forward(batch)
        if not batch.is_meta:
            raise ArithmeticError("unlucky")
        return output


class UnluckyAfterProbe(networks.Between):
    def forward(self, batch: Tensor) -> Any:
        output = super().forward(batch)
        if not batch.is_meta and len(batch) == SAMPLES:
            raise ArithmeticError("unlucky")
        return output


@pytest.mark.parametrize("network", [Unlucky, UnluckyAfterProbe])
@pytest.mark.parametrize("what", ["NaN", "negative label"])
def test_bad_values_are_told_of_rather_than_what_they_may_have_caused(
    what: str, network: type[torch.nn.Module], late: None
) -> None:
    with pytest.raises(ArithmeticError, match="unlucky"):
        score(images(), labels(), network())
    with pytest.raises(InputError):
        score(*BAD_VALUES[what], network())


@pytest.mark.parametrize("what", ["NaN", "negative label"])
def test_bad_values_are_told_of_before_a_loss_that_is_not_finite(what: str, late: None) -> None:
    model = networks.Attention()
    torch.nn.init.constant_(model.head.bias, float("inf"))
    with pytest.raises(InputError) as refused:
        score(*BAD_VALUES[what], model)
    assert refused.value.__context__ is None


def failing(times: int, error: Exception) -> Callable[..., Any]:
    """Returns `gradient_moments_grouped`, which fails so many times before."""
    failures = iter([error] * times)
    op = statistics.gradient_moments_grouped

    def moments(*given: Any, **options: Any) -> Any:
        for failure in failures:
            raise failure
        return op(*given, **options)

    return moments


@pytest.mark.parametrize("what", ["NaN", "negative label"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), statistics.OperandsChangedError("changed")])
@pytest.mark.parametrize("times", [1, 2])
def test_a_second_attempt_is_judged_too(
    what: str, error: Exception, times: int, late: None, launched: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "gradient_moments_grouped", failing(times, error))
    with pytest.raises(InputError):
        score(*BAD_VALUES[what])
    assert len(launched) == 2 - times


@pytest.mark.parametrize(("network", "times"), [(partial(networks.Folded, False), 1), (networks.Between, 2)])
def test_a_second_attempt_has_the_orders_too(
    network: Callable[[], torch.nn.Module], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    at_once = score(images(), labels(), model)
    compute_apart(monkeypatch)
    monkeypatch.setattr(statistics, "gradient_moments_grouped", failing(times, torch.OutOfMemoryError("out of memory")))
    assert_same(score(images(), labels(), model), at_once)
