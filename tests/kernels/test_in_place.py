"""Candidates scored one after the other in the same memory, recorded launches and all, on the CPU.

What makes the difference on a GPU, CUDA graphs, is stood in for by a recorder that keeps to the addresses as they do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")
if torch.cuda.is_available():
    pytest.skip("kernels are not interpreted where there is a CUDA device", allow_module_level=True)

from lswag_fast import backends, spaces
from lswag_fast.engine.autoformer import MOST_IN_FLIGHT, AutoFormerEngine
from lswag_fast.engine.in_place import Places
from lswag_fast.errors import ScoreError
from lswag_fast.ops.gradient_moments import gradient_moments
from lswag_fast.ops.gradient_moments_grouped import MomentProblem, PendingMoments
from lswag_fast.options import ScoreOptions
from lswag_fast.proxies import statistics
from lswag_fast.proxies.result import LswagResult
from lswag_fast.spaces.autoformer import Choices

CHOICES = Choices((16, 24), (2, 3), (1, 2), (2,), 256)
SAMPLES = 3


class Recorder:
    """Records work as a CUDA graph does: its launch works on the tensors of the recording, whatever came since."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return work(), replay


@pytest.fixture(scope="module")
def supernet() -> spaces.AutoFormerSupernet:
    return spaces.get("autoformer-tiny", image_size=32, num_classes=5).supernet(seed=0)


@pytest.fixture
def quick(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower kernels are left to C++, the moments all together at the end as on a device."""
    implementation = backends.implementation

    def chosen(op: str, kind: str) -> str | None:
        return "cpp" if op == "relative_attention" else implementation(op, kind)

    def launched(problems: list[MomentProblem]) -> PendingMoments:
        with backends.preferring("cpp"):
            return PendingMoments([], [gradient_moments(p.inputs, p.output_grads, p.groups) for p in problems])

    monkeypatch.setattr(backends, "implementation", chosen)
    monkeypatch.setattr(statistics, "launch_gradient_moments", launched)


def engine(supernet: spaces.AutoFormerSupernet, recorder: Any = None, **options: Any) -> AutoFormerEngine:
    images = torch.randn(SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    resolved = ScoreOptions(device="cpu", dtype="float32", **options).resolved(SAMPLES)
    made = AutoFormerEngine(supernet, images, torch.arange(SAMPLES), None, resolved)
    made._space = SimpleNamespace(choices=CHOICES, macs=lambda arch: 1, params=lambda arch: 1)
    if recorder is not None:
        made._recorder = lambda: recorder
        made._places = Places(made._in_place, MOST_IN_FLIGHT)
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


def poison(engine: AutoFormerEngine) -> None:
    """Overwrites all memory that is lent to nobody."""
    for memory in engine._places._memories:
        for shelf in memory._shelves.values() if memory.is_free else ():
            for buffer in shelf._buffers:
                buffer.fill_(255)


def bits(result: LswagResult) -> dict[str, Any]:
    return {**result.to_dict(), "seconds": 0, "proxy_seconds": 0}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("options", [{}, {"window": (30, 60)}, {"window": (0, 40), "pattern_samples": 2}])
def test_each_candidate_has_the_score_it_has_alone(
    supernet: spaces.AutoFormerSupernet, options: dict[str, Any]
) -> None:
    alone, recorder = engine(supernet, **options), Recorder()
    in_place = engine(supernet, recorder, **options)
    for arch in archs(32):
        assert bits(in_place.score(arch)) == bits(alone.score(arch))
        poison(in_place)
    assert len(in_place._places._memories) == 1
    assert recorder.replayed > recorder.recorded > 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("in_flight", [2, 3])
def test_candidates_in_flight_do_not_disturb_each_other(supernet: spaces.AutoFormerSupernet, in_flight: int) -> None:
    alone, recorder = engine(supernet), Recorder()
    in_place, pending = engine(supernet, recorder), []
    for number, arch in enumerate(archs(32)):
        pending.append((arch, in_place.launch(arch)))
        poison(in_place)
        if len(pending) == in_flight:
            # Neither the first nor the last has to be read first.
            of, launched = pending.pop(number % in_flight)
            assert bits(launched.finish()) == bits(alone.score(of))
    assert len(in_place._places._memories) == MOST_IN_FLIGHT
    assert recorder.replayed > 0


@pytest.mark.usefixtures("quick")
def test_memory_is_free_again_whatever_became_of_a_candidate(supernet: spaces.AutoFormerSupernet) -> None:
    in_place = engine(supernet, Recorder())
    (arch,) = archs(1)
    pending = in_place.launch(arch)
    (memory,) = in_place._places._memories
    assert not memory.is_free
    del pending
    gc.collect()
    assert memory.is_free
    in_place._loss = lambda logits, labels: logits.sum(1) / 0
    pending = in_place.launch(arch)
    with pytest.raises(ScoreError, match="the loss of sample 0"):
        pending.finish()
    assert memory.is_free


class Refusing(Recorder):
    """Refuses to record any more after the first three times."""

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.recorded < 3:
            return super().__call__(work)
        work()
        self.replayed = 0
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.usefixtures("quick")
def test_after_a_refusal_nothing_recorded_is_launched(supernet: spaces.AutoFormerSupernet) -> None:
    recorder = Refusing()
    in_place = engine(supernet, recorder)
    (arch,) = archs(1)
    expected = bits(engine(supernet).score(arch))
    results = [bits(in_place.score(arch)) for _ in range(4)]
    told = [result.pop("warnings") for result in results]
    usual = expected.pop("warnings")
    reason = "launches are not recorded as CUDA graphs: operation not permitted when stream is capturing"
    assert [[w for w in warnings if w not in usual] for warnings in told] == [[], [reason], [], []]
    assert all(result == expected for result in results)
    assert (recorder.recorded, recorder.replayed) == (3, 0)


@pytest.mark.usefixtures("quick")
def test_where_memory_is_short_candidates_take_new_memory(supernet: spaces.AutoFormerSupernet) -> None:
    def too_much(work: Callable[[], Any]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    in_place = engine(supernet, too_much)
    (arch,) = archs(1)
    expected = engine(supernet).score(arch).lswag
    found = []
    for _ in range(3):
        found.append(in_place.score(arch).lswag)
        found.append(len(in_place._places._memories))
    assert found == [expected, 1, pytest.approx(expected), 0, expected, 0]


@pytest.mark.usefixtures("quick")
def test_operations_that_choose_their_own_memory_are_not_recorded(
    supernet: spaces.AutoFormerSupernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = backends.implementation
    monkeypatch.setattr(
        backends, "implementation", lambda op, kind: "torch" if op == "layer_norm" else chosen(op, kind)
    )
    in_place = engine(supernet, Recorder())
    (arch,) = archs(1)
    assert bits(in_place.score(arch)) == bits(engine(supernet).score(arch))
    assert not in_place._places._memories


def test_every_kernel_puts_its_results_where_it_is_told(
    device: torch.device, supernet: spaces.AutoFormerSupernet
) -> None:
    in_place = engine(supernet, Recorder())
    in_place._space.choices = Choices((8,), (1,), (1,), (1,), 256)
    assert in_place._in_place() is not None
