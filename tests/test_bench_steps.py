"""How bench/gpu.py's steps are run, with short commands in their place: no GPU is needed."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import pytest
import steps
from steps import Rows, Step


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def writing(folder: Path) -> Callable[[dict[str, Any]], Path]:
    def write(results: dict[str, Any]) -> Path:
        path = folder / "results.json"
        path.write_text(json.dumps(results))
        return path

    return write


def run(given: list[Step], folder: Path, results: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    failed = steps.run(given, folder, {} if results is None else results, writing(folder))
    return failed, json.loads((folder / "results.json").read_text())["steps"]


def test_a_step_that_hangs_or_fails_leaves_its_rows_and_the_next_one_runs(tmp_path: Path) -> None:
    child = tmp_path / "child"
    # A child of the step's own, which must not outlive it.
    hang = f"""
import json, pathlib, subprocess, sys, time
pathlib.Path({str(steps.rows_path(tmp_path, "hangs"))!r}).write_text(json.dumps({{"found": 1}}))
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(child)!r}).write_text(str(process.pid))
time.sleep(60)
"""
    given = [
        Step("hangs", 3, python(hang)),
        Step("fails", 20, python("print('no device'); raise SystemExit(7)")),
        Step("is missing", 20, None, "no checker is installed"),
        Step("works", 20, python("import os; print(os.environ['COLOUR'])"), environment={"COLOUR": "green"}),
    ]
    started = time.monotonic()
    failed, found = run(given, tmp_path, {"steps": {"earlier": {"ok": True}}})
    assert time.monotonic() - started < 30
    assert failed == 2
    assert list(found) == ["earlier", "hangs", "fails", "is missing", "works"]
    assert (found["hangs"]["ok"], found["hangs"]["why"], found["hangs"]["found"]) == (False, "stopped after 3 s", 1)
    assert (found["fails"]["ok"], found["fails"]["exit_code"]) == (False, 7)
    assert found["is missing"]["why"] == "not run: no checker is installed"
    assert (tmp_path / "fails.log").read_text() == "no device\n"
    assert (tmp_path / "works.log").read_text() == "green\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path != child) == [
        *("fails.log", "hangs.log", "results.json", "works.log"),
    ]
    time.sleep(0.5)
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_results_are_written_before_the_next_step(tmp_path: Path) -> None:
    read = f"import json; print(sorted(json.load(open({str(tmp_path / 'results.json')!r}))['steps']))"
    run([Step("first", 20, python("pass")), Step("second", 20, python(read))], tmp_path)
    assert (tmp_path / "second.log").read_text() == "['first']\n"


def test_what_runs_beside_a_step_may_fail_and_ends_with_its_time(tmp_path: Path) -> None:
    beside = [python("print('warm'); raise SystemExit(1)"), python("import time; time.sleep(60)")]
    started = time.monotonic()
    failed, found = run([Step("tests", 3, python("pass"), beside=beside)], tmp_path)
    assert 2 < time.monotonic() - started < 30
    assert (failed, found["tests"]["ok"]) == (0, True)
    assert (tmp_path / "tests.log").read_text().endswith("== beside it\nwarm\n")


def test_failed_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test_good(): pass\ndef test_bad(): assert 0\ndef test_worse(): assert 0\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    failed, found = run([Step("tests", 60, [*command, str(tmp_path / "test_it.py")])], tmp_path)
    assert failed == 1
    assert found["tests"]["tests"] == "2 failed, 1 passed"
    assert [name.rpartition("::")[2] for name in found["tests"]["failed_tests"]] == ["test_bad", "test_worse"]


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_a_test_that_hangs_is_named_and_so_are_those_that_failed_before(workers: list[str], tmp_path: Path) -> None:
    hangs = "import time\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_hangs(): time.sleep(60)\n"
    (tmp_path / "test_it.py").write_text(hangs)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", os.devnull, *workers]
    failed, found = run([Step("tests", 6, [*command, "--rootdir", str(tmp_path), str(tmp_path)])], tmp_path)
    assert failed == 1
    assert found["tests"]["why"] == "stopped after 6 s"
    for what, name in (("failed_tests", "test_bad"), ("unfinished_tests", "test_hangs")):
        assert [test.rpartition("::")[2] for test in found["tests"][what]] == [name]


def test_a_row_that_fails_is_told_and_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(tmp_path / "rows.json")
    rows.add(1.0, "rate")
    rows.attempt(lambda: 1 / 0, "tiny", "score")
    rows.attempt(lambda: {"seconds": 1 / 3}, "tiny", "kernel")
    expected = {"score": "failed: ZeroDivisionError: division by zero", "kernel": {"seconds": 0.33333}}
    assert json.loads(rows.path.read_text()) == {"rate": 1.0, "tiny": expected}
    with pytest.raises(SystemExit, match="1"):
        rows.end()

    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measure, "wait", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rows.attempt(lambda: 1 / 0, "small", "score")
    assert json.loads(rows.path.read_text())["small"] == {"score": expected["score"]}
