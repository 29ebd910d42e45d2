"""The Scorer over an engine that scores two candidates at a time, as one on a CUDA device does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from number_space import numbers, result_of, scorer

from lswag_fast.engine import scorer as scorer_module
from lswag_fast.errors import InputError, ScoreError
from lswag_fast.proxies.result import LswagResult

TOO_MUCH = torch.OutOfMemoryError("CUDA out of memory")


@dataclass
class Engine:
    """The score of a number is the number; what is done is noted, and errors come where they are asked for."""

    in_flight: int = 2
    done: list[str] = field(default_factory=list)
    launch_errors: dict[int, BaseException] = field(default_factory=dict)
    finish_errors: dict[int, BaseException] = field(default_factory=dict)
    score_errors: dict[int, BaseException] = field(default_factory=dict)
    most: int = 0
    under_way: int = 0

    def launch(self, arch: Any) -> Pending:
        self._note("launch", arch["n"], self.launch_errors)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return Pending(self, arch["n"])

    def score(self, arch: Any) -> LswagResult:
        self._note("score", arch["n"], self.score_errors)
        return result_of(arch["n"])

    def _note(self, what: str, n: int, errors: dict[int, BaseException]) -> None:
        self.done.append(f"{what} {n}")
        if n in errors:
            raise errors[n]


@dataclass
class Pending:
    engine: Engine
    n: int

    def finish(self) -> LswagResult:
        self.engine.under_way -= 1
        self.engine._note("finish", self.n, self.engine.finish_errors)
        return result_of(self.n)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(scorer_module, "engine_for", lambda *_: made)
    # All numbers of a test are claimed together.
    monkeypatch.setattr(scorer_module, "_next_batch", lambda *_: 16)
    return made


def score(*given: int) -> list[tuple[int, str, float | None]]:
    with scorer() as scoring:
        return [(r.arch["n"], r.status, r.lswag) for r in scoring.score(numbers(*given))]


def test_one_is_launched_before_the_one_in_front_of_it_is_read(engine: Engine) -> None:
    assert score(1, 2, 3, 4) == [(n, "ok", float(n)) for n in (1, 2, 3, 4)]
    # The first batch is of one candidate.
    assert engine.done[:2] == ["launch 1", "finish 1"]
    assert engine.done[2:] == ["launch 2", "launch 3", "finish 2", "launch 4", "finish 3", "finish 4"]
    assert engine.most == 2


def test_one_at_a_time_where_the_engine_says_so(engine: Engine) -> None:
    engine.in_flight = 1
    assert score(1, 2, 3) == [(n, "ok", float(n)) for n in (1, 2, 3)]
    assert engine.done == ["score 1", "score 2", "score 3"]


def test_what_does_not_fit_beside_another_is_scored_alone(engine: Engine) -> None:
    engine.launch_errors = {3: TOO_MUCH}
    assert score(1, 2, 3, 4) == [(n, "ok", float(n)) for n in (1, 2, 3, 4)]
    assert engine.done[2:6] == ["launch 2", "launch 3", "finish 2", "score 3"]


def test_what_runs_out_of_memory_at_its_end_is_scored_again(engine: Engine) -> None:
    engine.finish_errors = {2: TOO_MUCH}
    assert score(1, 2, 3) == [(n, "ok", float(n)) for n in (1, 2, 3)]
    assert engine.done[2:6] == ["launch 2", "launch 3", "finish 2", "score 2"]


def test_failures_are_recorded_and_take_no_other_with_them(engine: Engine) -> None:
    engine.finish_errors = {2: ScoreError("the loss of sample 0 is nan")}
    engine.launch_errors = {4: RuntimeError("broken")}
    assert score(1, 2, 3, 4, 5) == [
        (1, "ok", 1.0),
        (2, "error", None),
        (3, "ok", 3.0),
        (4, "error", None),
        (5, "ok", 5.0),
    ]
    assert engine.done.count("launch 4") == 1
    assert not [what for what in engine.done if what.startswith("score")]


def test_an_interrupt_keeps_what_was_finished(engine: Engine) -> None:
    engine.finish_errors = {4: KeyboardInterrupt()}
    with scorer() as scoring:
        records = scoring.score(numbers(1, 2, 3, 4, 5))
        assert next(records).arch == {"n": 1}
        with pytest.raises(KeyboardInterrupt):
            next(records)
        engine.finish_errors = {}
        again = {r.arch["n"]: r.reused for r in scoring.score(numbers(1, 2, 3, 4, 5))}
    assert again == {1: True, 2: True, 3: True, 4: False, 5: False}


def test_bad_input_ends_the_run(engine: Engine) -> None:
    engine.launch_errors = {2: InputError("no such thing")}
    with pytest.raises(InputError, match="no such thing"):
        score(1, 2)
