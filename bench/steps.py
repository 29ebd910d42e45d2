"""Steps of a long measurement, each in a process of its own and within its time; what they find is kept as it comes."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure

TAIL = 25
"""Lines of a step's log that are printed."""
LAST_SECONDS = 10.0
"""That a killed process gets to end: one that waits for a device that hangs may never."""


ENDED = r"^(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b"
ENDED_BY_A_WORKER = r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (\S+\.py::.+?) *$"
"""Lines of `pytest -v`."""


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and what runs beside it."""

    name: str
    seconds: float
    command: Sequence[str] | None
    """None: it cannot run here, for the reason that `missing` gives."""
    missing: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: Sequence[Sequence[str]] = ()
    """Commands that only make later steps quicker: however they end, the step has not failed."""


def run(steps: Sequence[Step], folder: Path, results: dict[str, Any], write: Callable[[dict[str, Any]], Path]) -> int:
    """Runs the steps one after the other, and returns how many failed.

    A step's outcome and the rows that it left go to results["steps"], and the results are written, before the next step
    begins. Logs go to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for step in steps:
        print(f"== {step.name}", flush=True)
        rows = rows_path(folder, step.name)
        rows.unlink(missing_ok=True)
        started = time.monotonic()
        outcome = _attempt(step, folder)
        if rows.exists():
            outcome |= json.loads(rows.read_text())
            rows.unlink()
        seconds = time.monotonic() - started
        when = {"seconds": round(seconds, 1), "date": datetime.date.today().isoformat()}
        results.setdefault("steps", {})[step.name] = {**outcome, **when}
        failed += not outcome["ok"]
        written = write(results)
        print(f"== {step.name}: {'ok' if outcome['ok'] else 'FAILED'}, {seconds:.0f} s, in {written}", flush=True)
    return failed


def _attempt(step: Step, folder: Path) -> dict[str, Any]:
    """Runs a step within its time, all that it and what is beside it print in a file, and returns how it ended."""
    if step.command is None:
        return {"ok": True, "why": f"not run: {step.missing}"}
    log = folder / f"{_slug(step.name)}.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    until = time.monotonic() + step.seconds
    with log.open("w") as file, (folder / f"beside-{_slug(step.name)}.log").open("w") as other:
        process = _started(step.command, file, environment)
        beside = [_started(command, other, environment) for command in step.beside]
        try:
            code = process.wait(step.seconds)
            outcome: dict[str, Any] = {"ok": code == 0, "exit_code": code}
        except subprocess.TimeoutExpired:
            outcome = {"ok": False, "why": f"stopped after {step.seconds:g} s"}
            _kill(process)
        for helper in beside:
            try:
                helper.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill(helper)
    text, beside_text = (Path(f.name).read_text(errors="replace") for f in (file, other))
    Path(other.name).unlink()
    if step.beside:
        log.write_text(f"{text}\n== beside it\n{beside_text}")
    print("\n".join(text.splitlines()[-TAIL:]), flush=True)
    return {**outcome, **_of_pytest(text)}


def _started(command: Sequence[str], output: Any, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=measure.ROOT, start_new_session=True
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those it started."""
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(LAST_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not end", flush=True)


def _of_pytest(text: str) -> dict[str, Any]:
    """Returns what a log says of tests: how many passed, which failed, and which were under way where it breaks off."""
    summary = re.findall(r"^=+ (\d+ (?:passed|failed|skipped|error).*) in [\d.]+s.*=+$", text, re.MULTILINE)
    failures = set(re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE))
    if not summary:
        ended = dict(re.findall(ENDED, text, re.MULTILINE))
        begun = set(re.findall(r"^(\S+\.py::.+?) *$", re.sub(f"{ENDED}.*", "", text, flags=re.MULTILINE), re.MULTILINE))
        ended |= {name: outcome for outcome, name in re.findall(ENDED_BY_A_WORKER, text, re.MULTILINE)}
        failures = {name for name, outcome in ended.items() if outcome in ("FAILED", "ERROR")}
        found = {"failed_tests": failures, "unfinished_tests": begun - ended.keys()}
        return {name: sorted(tests) for name, tests in found.items() if tests}
    return {"tests": summary[-1], **({"failed_tests": sorted(failures)} if failures else {})}


def rows_path(folder: Path, step: str) -> Path:
    """Returns where a step leaves its rows."""
    return folder / f"{_slug(step)}.rows.json"


def _slug(name: str) -> str:
    return name.replace(" ", "-")


class Rows:
    """What a step has found so far: in a file after every row, so that a failure later loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self.failed = 0

    def add(self, value: Any, *keys: str) -> None:
        """Keeps a value under its keys, and prints it."""
        place = self.found
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = measure.rounded(value)
        self.path.write_text(json.dumps(self.found))
        print(*keys, json.dumps(place[keys[-1]]), flush=True)

    def attempt(self, call: Callable[[], Any], *keys: str) -> None:
        """Keeps what `call` returns, or why it failed: the step goes on, and ends as failed.

        Raises what `call` did where the device takes no more work.
        """
        try:
            self.add(call(), *keys)
        except Exception as error:
            self.failed += 1
            self.add(f"failed: {type(error).__name__}: {error}".splitlines()[0], *keys)
            measure.wait()

    def end(self) -> None:
        """Ends the process, as failed where an attempt was."""
        sys.exit(1 if self.failed else 0)
