from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn

import lswag_fast
from lswag_fast import InputError, scoring, value_checks
from lswag_fast.capture import Layer, Plan
from lswag_fast.clock import Clock
from lswag_fast.errors import ScoreError
from lswag_fast.ops.gradient_moments_grouped import PendingMoments
from lswag_fast.options import ScoreOptions
from lswag_fast.proxies import statistics


class Watched(nn.Module):
    """Calls `note` in every forward pass on real numbers: no bad input may get that far."""

    def __init__(self, inner: nn.Module, note: Callable[[], None]) -> None:
        super().__init__()
        self.inner = inner
        self.note = note

    def forward(self, images: torch.Tensor) -> Any:
        if not images.is_meta:
            self.note()
        return self.inner(images)


class Pair(nn.Module):
    """Returns something that cross-entropy cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = networks.Attention()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"boxes": self.inner(images)}


def images(samples: int = 8) -> torch.Tensor:
    return torch.randn(samples, *networks.IMAGE, generator=torch.Generator().manual_seed(0))


def with_value(value: float) -> torch.Tensor:
    batch = images()
    batch[3, 0, 0, 0] = value
    return batch


def mean_of_all(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return output.mean()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"images": images(0)}, "holds no image"),
    "one image": ({"images": images(1)}, "S = 1"),
    "too many images": ({"images": torch.zeros(1025, 1)}, "2 to 1024 images"),
    "integers": ({"images": images().to(torch.uint8)}, "floating-point"),
    "an array": ({"images": [[1.0]]}, "floating-point tensor"),
    "NaN": ({"images": with_value(float("nan"))}, "image 3"),
    "Inf": ({"images": with_value(float("inf"))}, "image 3"),
    "G does not divide S": ({"groups": 3}, r"divide S = 8 \(2, 4, 8\), got 3"),
    "G of one": ({"groups": 1}, "groups must be 2 or more"),
    "labels too long": ({"labels": torch.zeros(9, dtype=torch.long)}, r"labels \[S\].*\(8\), got \[9\]"),
    "labels of two dimensions": ({"labels": torch.zeros(8, 5, dtype=torch.long)}, r"labels \[S\]"),
    "labels out of range": ({"labels": torch.full((8,), 5)}, "0 to 4, the model's classes, got 5 to 5"),
    "negative labels": ({"labels": torch.full((8,), -1)}, "got -1 to -1"),
    "float labels": ({"labels": torch.zeros(8)}, "integer labels"),
    "G of no integer": ({"groups": 2.0}, "groups must be an integer, got 2.0"),
    "window of one": ({"window": 50}, r"window is \(first, last\)"),
    "a name for names": ({"extra_parameters": "position"}, "a sequence of names, got the text 'position'"),
    "window": ({"window": (60, 40)}, "first <= last"),
    "pooling": ({"pooling": "mean"}, "union, sum, got 'mean'"),
    "pattern samples": ({"pattern_samples": 9}, "from 2 to S = 8, got 9"),
    "dtype": ({"dtype": "tf32"}, "dtype must be one of"),
    "device": ({"device": "tpu"}, "device must be auto or one of"),
    "no such CPU": ({"device": "cpu:x"}, "device must be auto or one of"),
    "no CUDA": ({"device": "cuda"}, "device='cpu'"),
    "a scalar loss": ({"loss": mean_of_all}, "one value a sample"),
    "a loss that fails": ({"loss": lambda output, labels: output["x"]}, "cannot take the model's output"),
    "a loss without gradient": ({"loss": lambda output, labels: output.detach().sum(1)}, "does not depend"),
    "a loss that returns a number": ({"loss": lambda output, labels: 1.0}, "a float"),
    "labels of a loss": ({"loss": mean_of_all, "labels": torch.zeros(7)}, r"S of images \(8\), got \[7\]"),
    "image size": ({"images": torch.zeros(8, 3, 1, 1)}, "does not run on images"),
    "extra parameter": ({"extra_parameters": ("nothing",)}, "'nothing', which the model does not have"),
}


BAD_VALUES = {"NaN", "Inf", "labels out of range", "negative labels"}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(name: str) -> None:
    refused_before_any_work(name)


@pytest.mark.parametrize("name", [name for name in BAD if name not in BAD_VALUES])
def test_all_but_values_is_refused_before_any_work_that_a_device_computes_apart(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_checks, "computes_apart", lambda tensor: True)
    refused_before_any_work(name)


def refused_before_any_work(name: str) -> None:
    arguments, message = BAD[name]
    passes: list[None] = []
    model = Watched(networks.Attention(), lambda: passes.append(None))
    batch = arguments.get("images", images())
    rest = {k: v for k, v in arguments.items() if k != "images"}
    with pytest.raises(InputError, match=message):
        lswag_fast.score(model, batch, **rest)
    # A model that fails on shapes is tried on two images, to report its own error.
    assert not passes or name in ("image size", "a scalar loss") or "loss" in name
    assert len(passes) <= 1


def test_output_without_logits() -> None:
    with pytest.raises(InputError, match=r"takes logits \[S, classes\].*returns a dict"):
        lswag_fast.score(Pair(), images())


def test_model_on_another_device() -> None:
    with pytest.raises(InputError, match=r"on meta.*model.to\('cpu'\)"):
        lswag_fast.score(networks.Attention().to("meta"), images())


def test_images_on_another_device() -> None:
    with pytest.raises(InputError, match="images"):
        lswag_fast.score(networks.Attention(), images().to("meta"))


def test_not_a_module() -> None:
    with pytest.raises(InputError, match=r"torch\.nn\.Module, got a function"):
        lswag_fast.score(lambda x: x, images())  # type: ignore[arg-type]


def test_nothing_to_score() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch.mean((2, 3)) * self.scale

    with pytest.raises(InputError, match="nothing to score"):
        lswag_fast.score(Bare(), images())


def test_a_loss_that_is_not_finite() -> None:
    model = networks.Attention()
    with torch.no_grad():
        model.head.bias[2] = float("inf")
    with pytest.raises(ScoreError, match="loss of sample 0 is"):
        lswag_fast.score(model, images())


def test_result_is_plain_data_and_consistent() -> None:
    result = lswag_fast.score(networks.Attention(), images(), dtype="float32", groups=4, pattern_samples=6)
    assert result.lswag == result.trainability * result.expressivity
    assert result.options["groups"] == 4
    assert result.options["dtype"] == "float32"
    assert result.options["device"] == "cpu"
    assert result.seconds > 0
    assert json.loads(json.dumps(result.to_dict()))["counts"]["parameters"] == result.counts.parameters
    assert result.counts.parameters == sum(p.numel() for p in networks.Attention().parameters())


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(InputError, match=rf"seed must be an integer from 0 to 2\*\*63 - 1, got {seed}"):
        ScoreOptions(seed=seed)


def test_labels_are_drawn_from_the_seed() -> None:
    torch.manual_seed(0)
    model = networks.Attention()
    drawn = lswag_fast.score(model, images(), seed=5, dtype="float32")
    labels = torch.randint(networks.CLASSES, (8,), generator=torch.Generator().manual_seed(5))
    assert drawn.lswag == lswag_fast.score(model, images(), labels, dtype="float32").lswag
    assert drawn.lswag != lswag_fast.score(model, images(), seed=6, dtype="float32").lswag


@pytest.mark.parametrize(("samples", "bound"), [(2, "samples"), (64, "positions")])
def test_saturated_patterns_are_named(samples: int, bound: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 48), nn.ReLU(), nn.Linear(48, 5))
    result = lswag_fast.score(model, images(samples), groups=2)
    assert result.pattern_saturation.bound == bound
    assert result.pattern_saturation.ratio > 0.95
    assert any("Psi is at" in warning and bound in warning for warning in result.warnings)


def test_window_leaves_the_layers_before_it_alone() -> None:
    torch.manual_seed(0)
    model = networks.SequenceFirst()
    whole = lswag_fast.score(model, images(), dtype="float32")
    late = lswag_fast.score(model, images(), dtype="float32", window=(60, 100))
    assert [row.in_window for row in late.layers] == [row.percentile >= 60 for row in whole.layers]
    for row, same in zip(late.layers, whole.layers, strict=True):
        assert row.log_sum_inverse_sigma == (same.log_sum_inverse_sigma if row.in_window else None)
    assert late.expressivity == whole.expressivity
    assert late.trainability < whole.trainability


def test_numpy_labels_of_a_loss_are_cut_to_each_pass() -> None:
    def squares(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (output.mean(1) - labels).square()

    torch.manual_seed(0)
    model, labels = networks.Convolutions(norm=True), torch.arange(8.0)
    expected = lswag_fast.score(model, images(), labels, loss=squares).lswag
    assert lswag_fast.score(model, images(), labels.numpy(), loss=squares).lswag == expected  # type: ignore[arg-type]


def test_a_device_may_be_spelt_in_other_ways() -> None:
    for device in ("cpu:0", torch.device("cpu")):
        result = lswag_fast.score(networks.Attention(), images(), device=device)  # type: ignore[arg-type]
        assert result.options["device"] == "cpu"


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(InputError, match="run the model once"):
        lswag_fast.score(nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), images())


def test_coupled_samples_need_two_a_group() -> None:
    for samples in (2, 5):
        with pytest.raises(InputError, match=f"an even number of images from 4 on, got S = {samples}"):
            lswag_fast.score(networks.Convolutions(norm=True), images(samples))
    with pytest.raises(InputError, match="with 4 images or more"):
        lswag_fast.score(networks.Convolutions(norm=True), images(2), groups=2)


def test_extra_parameters_of_integers_are_refused() -> None:
    model = networks.Attention()
    model.steps = nn.Parameter(torch.arange(3), requires_grad=False)
    with pytest.raises(InputError, match=r"'steps', which has no gradient"):
        lswag_fast.score(model, images(), extra_parameters=("steps",))


def test_a_model_that_refuses_bfloat16_is_told_of_float32() -> None:
    class Mixed(networks.Attention):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return super().forward(batch + torch.zeros(()).expand(1, 1, 1, 1).float())

    with pytest.raises(InputError, match="dtype='float32' may run"):
        lswag_fast.score(Mixed(), images(), dtype="bfloat16")


def test_a_score_that_is_not_finite_names_the_layer() -> None:
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * float("inf")

    class Model(networks.Attention):
        def body(self, x: torch.Tensor) -> torch.Tensor:
            return Overflow.apply(super().body(x))  # type: ignore[no-any-return,no-untyped-call]

    result = lswag_fast.score(Model(), images())
    assert any("not finite" in warning and "mlp.2.weight" in warning for warning in result.warnings)


OUT_OF_MEMORY: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
    RuntimeError("CUDA: launching count_partitions failed: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def short_of_memory(monkeypatch: pytest.MonkeyPatch, times: int, error: Exception = OUT_OF_MEMORY[0]) -> list[int]:
    """Lets an op run out of memory so many times; returns its calls."""
    calls: list[int] = []
    op = statistics.gradient_moments_grouped

    def moments(*given: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error
        return op(*given, **options)

    monkeypatch.setattr(statistics, "gradient_moments_grouped", moments)
    return calls


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_met_with_one_weight_at_a_time(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    model = networks.Attention()
    expected = lswag_fast.score(model, images(), dtype="float32")
    attempts: list[bool] = []
    original = scoring.PassStatistics

    def recorded(*given: Any, at_once: bool, **options: Any) -> statistics.PassStatistics:
        attempts.append(at_once)
        return original(*given, at_once=at_once, **options)

    monkeypatch.setattr(scoring, "PassStatistics", recorded)
    calls = short_of_memory(monkeypatch, times=1, error=error)
    got = lswag_fast.score(model, images(), dtype="float32")
    assert (got.lswag, got.layers) == (expected.lswag, expected.layers)
    assert attempts == [False, True]
    assert len(calls) == 1 + len(got.layers)


def test_another_failure_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = short_of_memory(monkeypatch, times=2, error=RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        lswag_fast.score(networks.Attention(), images(), dtype="float32")
    assert len(calls) == 1


def test_out_of_memory_twice_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = short_of_memory(monkeypatch, times=2)
    message = r"one weight at a time: CUDA out of memory\. Tried to allocate 2\.00 GiB\.; score fewer images"
    with pytest.raises(ScoreError, match=message):
        lswag_fast.score(networks.Attention(), images(), dtype="float32")
    assert len(calls) == 2


@pytest.mark.parametrize("side", ["inputs", "output_grads", None])
def test_operands_that_change_before_the_launch_are_found(side: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(
        statistics, "launch_gradient_moments", lambda problems: launched.append(problems) or PendingMoments([], [])
    )
    # Operands are kept where a grouped launch takes them.
    monkeypatch.setattr(statistics.backends, "implementation", lambda *_: "triton")
    plan = Plan([], [], [], [], None, (), 0, 0)
    kept = statistics.PassStatistics(plan, ScoreOptions(device="cpu").resolved(4), 4, Clock("cpu"))
    operands = {name: torch.zeros(4, 3, 2, device="meta") for name in ("inputs", "output_grads")}
    layer, weight = Layer("fc.weight", 4, 0, [0]), torch.zeros(2, 2, device="meta")
    kept.weight(layer, [operands["inputs"]], [operands["output_grads"]], None, weight)
    if side is None:
        kept.launch(torch.zeros(4))
        assert len(launched[0]) == 1
        return
    operands[side].mul_(2)
    with pytest.raises(statistics.OperandsChangedError, match=r"of fc\.weight changed in place"):
        kept.launch(torch.zeros(4))
    assert not launched


def test_operands_that_change_before_the_launch_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = networks.Attention()
    expected = lswag_fast.score(model, images(), dtype="float32")
    attempts: list[int] = []
    launch = statistics.PassStatistics.launch

    def changed_at_first(self: statistics.PassStatistics, losses: Tensor, *others: Any) -> None:
        attempts.append(1)
        if not self._at_once:
            raise statistics.OperandsChangedError("changed")
        launch(self, losses, *others)

    monkeypatch.setattr(statistics.PassStatistics, "launch", changed_at_first)
    assert lswag_fast.score(model, images(), dtype="float32").lswag == expected.lswag
    assert len(attempts) == 2
