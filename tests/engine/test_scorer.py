"""The Scorer over a space of numbers with a cheap score; and, where scores matter, over AutoFormer-Tiny.

Run as a program, this file scores numbers into a store, to be killed: `test_scorer.py STORE COUNT SECONDS`.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from number_space import IMAGES, NumberSpace, numbers, result_of, scorer

from lswag_fast.engine import scorer as scorer_module
from lswag_fast.engine.scorer import Scorer
from lswag_fast.errors import InputError, ScoreError, StoreError
from lswag_fast.proxies.result import Counts, LswagResult, PatternSaturation
from lswag_fast.store import Store


class CountingScore:
    """Stands for `score`: the score of a number is the number, and every call is counted."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.seconds = 0.0
        self.slow_from = 0
        self.errors: dict[int, BaseException] = {}

    def __call__(self, model: Any, *_: Any, **__: Any) -> LswagResult:
        self.calls.append(model.n)
        if self.seconds and model.n >= self.slow_from:
            time.sleep(self.seconds)
        if model.n in self.errors:
            raise self.errors[model.n]
        return result_of(model.n)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CountingScore:
    score = CountingScore()
    monkeypatch.setattr(scorer_module.scoring, "score", score)
    return score


def test_every_candidate_is_yielded_after_its_commit(counted: CountingScore, tmp_path: Path) -> None:
    with scorer(tmp_path / "s.db") as scoring, Store(tmp_path / "s.db", read_only=True) as reader:
        for n, record in enumerate(scoring.score(numbers(*range(300)))):
            assert (record.arch, record.lswag, record.reused) == ({"n": n}, float(n), False)
            assert list(reader.find([record.key])) == [record.key]
        assert (scoring.scored, scoring.reused, scoring.failures) == (300, 0, 0)


def test_what_the_store_holds_is_not_computed_again(counted: CountingScore, tmp_path: Path) -> None:
    with scorer(tmp_path / "s.db") as first:
        fresh = {r.key: r for r in first.score(numbers(1, 2, 3))}
    with scorer(tmp_path / "s.db") as second:
        reused = list(second.score(numbers(3, 2, 1, 4)))
        assert (second.scored, second.reused) == (1, 3)
    assert counted.calls == [1, 2, 3, 4]
    assert {r.key: r.lswag for r in reused if r.reused} == {key: r.lswag for key, r in fresh.items()}


def test_repeated_candidate_is_scored_once(counted: CountingScore) -> None:
    with scorer() as scoring:
        records = list(scoring.score(numbers(*[5, 6] * 200)))
    assert sorted(counted.calls) == [5, 6]
    assert len(records) == 400
    assert sum(not r.reused for r in records) == 2


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), MemoryError(), ScoreError("the loss is NaN"), ZeroDivisionError()]
)
def test_failed_candidate_is_recorded_and_the_run_goes_on(
    counted: CountingScore, tmp_path: Path, error: Exception
) -> None:
    counted.errors = {2: error}
    with scorer(tmp_path / "s.db") as scoring:
        records = {r.arch["n"]: r for r in scoring.score(numbers(1, 2, 3))}
        assert scoring.failures == 1
    assert [records[n].status for n in (1, 2, 3)] == ["ok", "error", "ok"]
    assert str(records[2].error).startswith(type(error).__name__)
    counted.errors = {}
    with scorer(tmp_path / "s.db") as again:
        assert [r.reused for r in again.score(numbers(2))] == [True]
        assert again.failures == 1
    with scorer(tmp_path / "s.db", retry_failed=True) as retrying:
        assert [(r.arch["n"], r.reused, r.status) for r in retrying.score(numbers(2, 1))] == [
            (2, False, "ok"),
            (1, True, "ok"),
        ]


def test_retry_of_what_fails_again_ends(counted: CountingScore) -> None:
    with Store(None) as store:
        counted.errors = {1: RuntimeError("always")}
        list(scorer(store).score(numbers(1)))
        records = list(scorer(store, retry_failed=True).score(numbers(1, 1, 1)))
    assert [r.reused for r in records] == [False, True, True]
    assert counted.calls == [1, 1]


def test_score_that_is_not_a_number_fails(counted: CountingScore, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = LswagResult(
        float("nan"), 1.0, 1, PatternSaturation(0, None), Counts(1, 1, 0, 1), (), (), (), (), {}, {}, {}, 0.0, {}
    )
    monkeypatch.setattr(scorer_module.scoring, "score", lambda *_, **__: nan)
    with scorer() as scoring:
        assert [r.status for r in scoring.score(numbers(1))] == ["error"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), InputError("no such loss")])
def test_what_was_finished_before_a_stop_is_kept(counted: CountingScore, tmp_path: Path, stop: BaseException) -> None:
    counted.errors = {10: stop}  # in the middle of a batch
    with scorer(tmp_path / "s.db") as scoring, pytest.raises(type(stop)):
        list(scoring.score(numbers(*range(20))))
    with Store(tmp_path / "s.db", read_only=True) as store:
        assert [r.arch["n"] for r in store.records()] == list(range(10))


def test_candidate_outside_the_space_is_named_by_its_place(counted: CountingScore) -> None:
    with scorer() as scoring, pytest.raises(InputError, match=r"candidate 3 of the stream: n must be .* got -1"):
        list(scoring.score(numbers(1, 2, -1)))


def test_stream_that_stops_early_leaves_no_claim(counted: CountingScore, tmp_path: Path) -> None:
    with scorer(tmp_path / "s.db") as first, scorer(tmp_path / "s.db") as second:
        paused = first.score(numbers(*range(100)))
        for _ in range(20):
            next(paused)
        assert len(list(second.score(numbers(*range(100))))) == 100
        assert len(list(paused)) == 80


def test_slow_candidates_are_committed_one_by_one(counted: CountingScore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "COMMIT_SECONDS", 0.001)
    counted.seconds = 0.005
    read = 0

    def stream() -> Iterator[dict[str, int]]:
        nonlocal read
        for read in range(1, 30):
            yield {"n": read}

    with scorer() as scoring:
        for done, _ in enumerate(scoring.score(stream()), start=1):
            assert read <= done + 2
            assert len(counted.calls) <= done + 1


def test_candidates_that_turn_slow_are_still_committed_in_time(
    counted: CountingScore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer_module, "COMMIT_SECONDS", 0.05)
    counted.seconds, counted.slow_from = 0.02, 300
    with scorer() as scoring:
        for done, _ in enumerate(scoring.score(numbers(*range(330))), start=1):
            assert done <= 300 or len(counted.calls) <= done + 10


def test_memory_is_flat_over_a_long_stream(counted: CountingScore) -> None:
    counted.calls = Discarded()
    blocks = []
    with scorer() as scoring:
        records = scoring.score({"n": n} for n in itertools.count())
        for _ in range(2):
            for _ in itertools.islice(records, 12_000):
                pass
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        records.close()
    assert blocks[1] - blocks[0] < 1_000  # a single object kept of each candidate would be 12,000


class Discarded(list[int]):
    def append(self, value: int) -> None:
        pass


def test_metadata_explains_the_scores(counted: CountingScore, tmp_path: Path) -> None:
    with scorer(tmp_path / "s.db", notes={"images": "a ramp"}) as scoring:
        list(scoring.score(numbers(1)))
    with Store(tmp_path / "s.db", read_only=True) as store:
        (run,) = store.runs()
    assert run.candidates == 1
    assert run.metadata["space"] == {"name": "numbers", "num_classes": 10}
    assert run.metadata["options"]["groups"] == 4
    assert run.metadata["versions"]["torch"] == torch.__version__
    assert run.metadata["notes"] == {"images": "a ramp"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": [1, 2]}, "floating-point tensor"),
        ({"images": IMAGES[0, 0, 0]}, "floating-point tensor"),
        ({"images": IMAGES.to(torch.uint8)}, "floating-point tensor"),
        ({"images": IMAGES[:0]}, "no image"),
        ({"images": IMAGES[:1]}, "needs 2 to 1024 images"),
        ({"images": IMAGES / 0}, "NaN or Inf is in image 0, 1"),
        ({"labels": torch.tensor([0, 1])}, "one entry an image"),
        ({"labels": [0, 1, 2, 3]}, "labels must be a tensor"),
        ({"labels": torch.tensor([0, 1, 2, 10])}, "labels must be from 0 to 9, .* got 0 to 10"),
        ({"groups": 3}, r"divide S = 4 \(2, 4\)"),
        ({"flavour": 3}, "no option is called flavour; there are groups"),
        ({"dtype": "int3"}, "dtype must be one of"),
    ],
)
def test_bad_input_is_told_before_any_work(
    counted: CountingScore, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given = {"images": IMAGES, "device": "cpu", "dtype": "float32", "store": tmp_path / "s.db", **arguments}
    with pytest.raises(InputError, match=message):
        Scorer(NumberSpace(), **given)
    assert not (tmp_path / "s.db").exists()


def test_unwritable_store_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="folder must exist"):
        scorer(tmp_path / "absent" / "s.db")


def start(store: Path, count: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(store), str(count), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_kill_anywhere_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    path, count, yielded = tmp_path / "s.db", 400, set[str]()
    draw = random.Random(0)
    for _ in range(4):
        process = start(path, count, 0.004)
        assert process.stdout is not None
        process.stdout.readline()  # the first line comes when scoring begins
        time.sleep(draw.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        # A line cut by the kill has no end; every whole one was recorded before it was written.
        yielded |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.wait()
        with Store(path) as store:
            assert yielded <= {str(r.arch["n"]) for r in store.records()}
    final = start(path, count, 0.0)
    output, _ = final.communicate(timeout=60)
    assert final.returncode == 0
    assert sorted(map(int, output.split()[1:])) == list(range(count))
    with Store(path) as store:
        assert sorted(r.arch["n"] for r in store.records()) == list(range(count))


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    path, count = tmp_path / "s.db", 300
    processes = [start(path, count, 0.003) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].split()[1:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for output in outputs:
        assert sorted(map(int, output)) == list(range(count))
    with Store(path) as store:
        assert sorted(r.arch["n"] for r in store.records()) == list(range(count))
    calls = [int(Path(f"{path}.{process.pid}").read_text()) for process in processes]
    assert sum(calls) == count
    assert min(calls) > 0


def program(store: str, count: str, seconds: str) -> None:
    score = CountingScore()
    score.seconds = float(seconds)
    scorer_module.scoring.score = score
    with scorer(store) as scoring:
        print("begin", flush=True)
        for record in scoring.score(numbers(*range(int(count)))):
            print(record.arch["n"], flush=True)
    Path(f"{store}.{os.getpid()}").write_text(str(len(score.calls)))


if __name__ == "__main__":
    program(*sys.argv[1:])
