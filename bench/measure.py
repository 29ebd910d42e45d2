"""Timing in interleaved rounds, peak memory in fresh processes, and the facts of the machine."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MIB = 2**20
CLEAR_REFS = Path("/proc/self/clear_refs")


class Rounds:
    """Times several callables in turn, once each a round: what slows the machine for a while slows all of them."""

    def __init__(self, methods: Mapping[str, Callable[[], Any]], device: str) -> None:
        self.methods = methods
        self.device = device
        self.wall: dict[str, list[float]] = {name: [] for name in methods}
        self.processor: dict[str, list[float]] = {name: [] for name in methods}
        self.first = {name: method() for name, method in methods.items()}

    def __call__(self) -> None:
        for name, method in self.methods.items():
            gc.collect()
            self._wait()
            wall, processor = time.perf_counter(), time.process_time()
            method()
            self._wait()
            self.wall[name].append(time.perf_counter() - wall)
            self.processor[name].append(time.process_time() - processor)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def summary(self, baseline: str) -> dict[str, dict[str, float]]:
        """Returns seconds, and ratios to the baseline of the same round, a method."""
        return {name: self._row(name, baseline) for name in self.methods}

    def _row(self, name: str, baseline: str) -> dict[str, float]:
        pairs = zip(self.wall[name], self.wall[baseline], strict=True)
        processor = zip(self.processor[name], self.processor[baseline], strict=True)
        return {
            "rounds": len(self.wall[name]),
            "median_seconds": median(self.wall[name]),
            "fastest_seconds": min(self.wall[name]),
            "ratio": median(a / b for a, b in pairs),
            "ratio_of_fastest": min(self.wall[name]) / min(self.wall[baseline]),
            "ratio_of_processor_time": median(a / b for a, b in processor),
        }


def peak_bytes(call: Callable[[], Any]) -> int:
    """Returns by how much the first call raises this process's peak resident memory above what it held before.

    Linux only. To be asked in a fresh process: memory freed earlier and kept by the allocator would hide a need.
    """
    gc.collect()
    # 5 resets the high-water mark of resident memory (proc_pid_clear_refs, Linux 4.0).
    CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def in_fresh_process(script: Path, *arguments: str) -> Any:
    """Runs a script and returns the JSON that it prints last."""
    path = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, str(script), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    return json.loads(run.stdout.splitlines()[-1])


def machine(device: str) -> dict[str, Any]:
    """Returns what a measurement depends on: device, instruction set, threads, versions, date."""
    from lswag_fast import _C, __version__

    packages = ("torch", *(["triton"] if device == "cuda" else []), "numpy", "opacus", "backpack-for-pytorch")
    facts = {
        "device": device_name(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.cpu_path(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "lswag_fast": __version__,
        **{name: _version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
    }
    if device == "cpu":
        facts["load_at_start"] = round(os.getloadavg()[0], 2)
    return {name: fact for name, fact in facts.items() if fact is not None}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def processor() -> str:
    """Returns the processor's model, with the family and model number that virtual machines leave as the only clue."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def wait() -> None:
    """Waits for a CUDA device; raises what went wrong on it, after some errors for good."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def results_path(device: str, what: str) -> Path:
    """Returns results/<device>-<what>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{slug}-{what}.json"


def write(device: str, what: str, data: Mapping[str, Any]) -> Path:
    """Writes results/<device>-<what>.json."""
    path = results_path(device, what)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(device), **rounded(data)}, indent=1) + "\n")
    return path


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(k): rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value
