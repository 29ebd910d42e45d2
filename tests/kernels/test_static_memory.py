"""Candidates scored one after the other in the same memory, captured launches and all, on the CPU.

CUDA graphs are stood in for by captures that keep to the addresses as they do.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from same_scores import assert_same, poison

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")
if torch.cuda.is_available():
    pytest.skip("kernels are not interpreted where there is a CUDA device", allow_module_level=True)

from lswag_fast import backends, spaces
from lswag_fast.engine.autoformer import MOST_IN_FLIGHT, AutoFormerEngine
from lswag_fast.engine.static_memory import RUNS_BEFORE_CAPTURE
from lswag_fast.errors import ScoreError
from lswag_fast.ops.gradient_moments_grouped import PendingMoments, PreparedProblem, launch_gradient_moments
from lswag_fast.options import ScoreOptions
from lswag_fast.proxies import statistics
from lswag_fast.spaces.autoformer import Choices

CHOICES = Choices((16, 24), (2, 3), (1, 2), (2,), 256)
SAMPLES = 3
OTHERS = ("lswag", "zico", "swap", "nwot", "snip", "gsnr", "l2_norm")


class Captures:
    """Captures work as a CUDA graph does: a replay works on the tensors of the capture, whatever came since."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        work()

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.fixture(scope="module")
def supernet() -> spaces.AutoFormerSupernet:
    return spaces.get("autoformer-tiny", image_size=32, num_classes=5).supernet(seed=0)


@pytest.fixture
def quick(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower kernels are left to C++, the moments all together at the end as on a device."""
    implementation = backends.implementation

    def chosen(op: str, kind: str) -> str | None:
        return "cpp" if op == "relative_attention" else implementation(op, kind)

    def launched(problems: list[PreparedProblem]) -> PendingMoments:
        with backends.preferring("cpp"):
            return launch_gradient_moments(problems)

    monkeypatch.setattr(backends, "implementation", chosen)
    monkeypatch.setattr(statistics, "launch_gradient_moments", launched)


def engine(supernet: spaces.AutoFormerSupernet, capture: Any = None, **options: Any) -> AutoFormerEngine:
    images = torch.randn(SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    resolved = ScoreOptions(device="cpu", dtype="float32", **options).resolved(SAMPLES)
    made = AutoFormerEngine(supernet, images, torch.arange(SAMPLES), None, resolved, captures=lambda: capture)
    made._space = SimpleNamespace(choices=CHOICES, macs=lambda arch: 1, params=lambda arch: 1)
    return made


def archs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def one_of(choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    return [
        {
            "embed_dim": one_of(CHOICES.embed_dim),
            "num_heads": [one_of(CHOICES.num_heads) for _ in range(depth)],
            "mlp_ratio": [one_of(CHOICES.mlp_ratio) for _ in range(depth)],
        }
        for depth in [one_of(CHOICES.depth) for _ in range(count)]
    ]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": (30, 60)},
        {"window": (0, 40), "pattern_samples": 2},
        {"window": (0, 40), "proxies": OTHERS},
        {"proxies": ("swap", "nwot", "epe_nas")},
    ],
)
def test_each_candidate_has_the_score_it_has_alone(
    supernet: spaces.AutoFormerSupernet, options: dict[str, Any]
) -> None:
    alone, captures = engine(supernet, **options), Captures()
    shared = engine(supernet, captures, **options)
    for arch in archs(24):
        assert_same(shared.score(arch), alone.score(arch))
        poison(shared)
    assert len(shared.pool.memories) == 1
    assert captures.replayed > captures.captured > 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("in_flight", "options"), [(2, {"window": (0, 40), "proxies": OTHERS}), (3, {})])
def test_candidates_in_flight_do_not_disturb_each_other(
    supernet: spaces.AutoFormerSupernet, in_flight: int, options: dict[str, Any]
) -> None:
    alone, captures = engine(supernet, **options), Captures()
    shared, pending = engine(supernet, captures, **options), []
    for number, arch in enumerate(archs(24)):
        pending.append((arch, shared.launch(arch)))
        poison(shared)
        if len(pending) == in_flight:
            # Neither the first nor the last has to be read first.
            of, launched = pending.pop(number % in_flight)
            assert_same(launched.finish(), alone.score(of))
    assert len(shared.pool.memories) == MOST_IN_FLIGHT
    assert captures.replayed > 0


@pytest.mark.usefixtures("quick")
def test_memory_is_free_again_whatever_became_of_a_candidate(supernet: spaces.AutoFormerSupernet) -> None:
    shared = engine(supernet, Captures())
    (arch,) = archs(1)
    pending = shared.launch(arch)
    (memory,) = shared.pool.memories
    assert not memory.is_free
    del pending
    gc.collect()
    assert memory.is_free
    shared._default_loss, shared._loss = False, lambda logits, labels: logits.sum(1) / 0
    pending = shared.launch(arch)
    with pytest.raises(ScoreError, match="the loss of sample 0"):
        pending.finish()
    assert memory.is_free


@pytest.mark.usefixtures("quick")
def test_captures_are_in_the_seconds_of_no_proxy(supernet: spaces.AutoFormerSupernet) -> None:
    class Slow(Captures):
        def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
            time.sleep(0.2)
            return super().__call__(work)

    captures = Slow()
    shared = engine(supernet, captures, proxies=("zico",))
    (arch,) = archs(1)
    for _ in range(RUNS_BEFORE_CAPTURE):
        shared.score(arch)
    before = captures.captured
    result = shared.score(arch)
    slept = 0.2 * (captures.captured - before)
    assert 0 < slept < result.seconds
    assert result.proxy_seconds["zico"] < result.seconds - slept


class Refusing(Captures):
    """Refuses to capture any more after the first three times."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.captured < 3:
            return super().__call__(work)
        work()
        self.replayed = 0
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.usefixtures("quick")
def test_after_a_refusal_nothing_captured_is_launched(supernet: spaces.AutoFormerSupernet) -> None:
    captures = Refusing()
    shared = engine(supernet, captures)
    (arch,) = archs(1)
    expected = engine(supernet).score(arch)
    reason = "launches are not captured as CUDA graphs: operation not permitted when stream is capturing"
    for told in ((), (reason,), (), ()):
        assert_same(shared.score(arch), replace(expected, warnings=(*expected.warnings, *told)))
    assert (captures.captured, captures.replayed) == (3, 0)


@pytest.mark.usefixtures("quick")
def test_where_memory_is_short_candidates_take_new_memory(supernet: spaces.AutoFormerSupernet) -> None:
    def too_much(work: Callable[[], Any]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    shared = engine(supernet, too_much)
    (arch,) = archs(1)
    expected = engine(supernet).score(arch).lswag
    found = []
    for _ in range(3):
        found.append(shared.score(arch).lswag)
        found.append(len(shared.pool.memories))
    assert found == [expected, 1, pytest.approx(expected), 0, expected, 0]


@pytest.mark.usefixtures("quick")
def test_operations_that_choose_their_own_memory_are_not_captured(
    supernet: spaces.AutoFormerSupernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = backends.implementation
    monkeypatch.setattr(
        backends, "implementation", lambda op, kind: "torch" if op == "layer_norm" else chosen(op, kind)
    )
    shared = engine(supernet, Captures())
    (arch,) = archs(1)
    assert_same(shared.score(arch), engine(supernet).score(arch))
    assert not shared.pool.memories


def test_every_kernel_puts_its_results_where_it_is_told(
    device: torch.device, supernet: spaces.AutoFormerSupernet
) -> None:
    shared = engine(supernet, Captures())
    shared._space.choices = Choices((8,), (1,), (1,), (1,), 256)
    assert shared._static_memory() is not None
