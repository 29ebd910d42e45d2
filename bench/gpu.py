"""Everything that only a GPU can show, in one command of at most eight minutes: `make bench-gpu`.

In this order, each in a process of its own and written as it comes: correctness on the device, the whole score, the
kernels, the peers, some tests again under a memory checker; last, tests and times of the wgmma kernel of gradient
moments, which no result before them uses. A step that fails or runs out of time is recorded with its reason, and the
next one runs. Everything printed goes to a log a step in the output folder, results there too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import float64_ranking as fixed
import measure
import per_sample_gradients
import torch
import torch.nn.functional as F
from gpu_cases import MIDDLE, Case, cases, depthwise_cases, moments_case
from original_autoformer import original_candidate
from torch import Tensor

from lswag_fast import images, spaces
from lswag_fast.backends import preferring
from lswag_fast.correlation import kendall_tau
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.kernels.gradient_moments_launch import has_wgmma
from lswag_fast.options import ScoreOptions

ROOT = Path(__file__).resolve().parents[1]
BUDGET = {
    "correctness": 150,
    "score": 90,
    "kernels": 60,
    "peers": 30,
    "memory checker": 40,
    "wgmma correctness": 20,
    "wgmma": 20,
}
"""Seconds a step may take; with the build they are eight minutes."""
ROUNDS = 20
PRODUCT = 8192
COPY_BYTES = 2**32
CACHE_BYTES = 2**28
"""Operands of one kernel are rotated through several times the cache."""
SLEEP_CYCLES = 20_000_000


def run(steps: Sequence[str], folder: Path) -> int:
    """Runs the steps, each in a process of its own, and returns how many failed."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": measure.machine("cuda"), "steps": {}}
    failed = 0
    for step in steps:
        print(f"== {step}", flush=True)
        started = time.monotonic()
        outcome = _attempt(command_of(step, folder), step, folder)
        rows = _rows_path(folder, step)
        if rows.exists():
            outcome |= json.loads(rows.read_text())
        results["steps"][step] = {**outcome, "seconds": time.monotonic() - started}
        failed += not outcome["ok"]
        path = measure.write("cuda", "kernels", results)
        shutil.copy(path, folder)
        print(f"== {step}: {'ok' if outcome['ok'] else 'FAILED'}, {time.monotonic() - started:.0f} s", flush=True)
    print(path)
    return failed


def command_of(step: str, folder: Path) -> list[str] | None:
    """Returns what a step runs; None where it cannot run here."""
    if step in STEPS:
        return [sys.executable, __file__, "--step", step, "--output", str(folder)]
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*on_device.py"))
    tests = [path for path in found if ("wgmma" in path) == (step == "wgmma correctness")]
    pytest = [sys.executable, "-P", "-m", "pytest", "-v", "-rs", "--tb=short", "-p", "no:cacheprovider", *tests]
    if step == "wgmma correctness":
        return pytest
    if step == "correctness":
        # Most of it is compiling, which several processes share.
        return [*pytest, *(["-n", "6", "--dist", "worksteal"] if find_spec("xdist") else []), "--durations=15"]
    checker = shutil.which("compute-sanitizer")
    some = "hamming or groups_of_samples or made_to_collide"
    return None if checker is None else [checker, "--error-exitcode", "9", *pytest, "-k", some]


def _attempt(command: list[str] | None, step: str, folder: Path) -> dict[str, Any]:
    """Runs a command within its time, everything that it prints in a file, and returns how it ended."""
    if command is None:
        return {"ok": True, "why": "not run: compute-sanitizer is not installed"}
    log = folder / f"{step.replace(' ', '-')}.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if step == "memory checker":
        # Blocks of a caching allocator hide where a tensor ends.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(BUDGET[step])
            outcome = {"ok": code == 0, "exit_code": code}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = {"ok": False, "why": f"stopped after {BUDGET[step]} s"}
    print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    return outcome


def _rows_path(folder: Path, step: str) -> Path:
    return folder / f"{step}.json"


class Rows:
    """What a step has found so far: in a file after every row, so that a failure later loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}

    def add(self, value: Any, *keys: str) -> None:
        """Keeps a value under its keys, and prints it."""
        place = self.found
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = measure.rounded(value)
        self.path.write_text(json.dumps(self.found))
        print(*keys, json.dumps(place[keys[-1]]), flush=True)


def timed(call: Callable[[], Any], rounds: int = ROUNDS, *, waits: bool = False) -> dict[str, float]:
    """Returns the median seconds of a call on the device, and of its launch on the host.

    The device first sleeps, longer than a launch takes, so that it is the device that is timed and not the launch; a
    call that `waits` for the device is timed by the clock instead.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    host = []
    for start, end in events:
        if not waits:
            torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        began = time.perf_counter()
        call()
        host.append(time.perf_counter() - began)
        end.record()
        torch.cuda.synchronize()
    if waits:
        return {"seconds": median(host), "host_seconds": median(host)}
    return {"seconds": median(a.elapsed_time(b) for a, b in events) / 1e3, "host_seconds": median(host)}


def rates() -> dict[str, float]:
    """Returns what this GPU does at most: bytes a second of a copy (read and written), bf16 FLOP a second."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * COPY_BYTES / timed(lambda: target.copy_(source))["seconds"]
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * PRODUCT**3 / timed(lambda: a @ b)["seconds"]
    return {"copy_bytes_per_second": copy, "bfloat16_flops_per_second": product}


def score_step(rows: Rows) -> None:
    """Finds how fast whole scores are beside plain passes, and how they rank."""
    rates_here = rates()
    rows.add(rates_here, "rates")
    for name in MIDDLE:
        subject = Subject(name, samples=64)
        score = timed(subject.score, waits=True)
        rows.add(score, name, "score")
        rows.add(60 / score["seconds"], name, "candidates a minute, one at a time")
        rows.add(60 / subject.seconds_in_flight(), name, "candidates a minute, two in flight")
        rows.add(subject.products_floor(rates_here), name, "floor_seconds_of_products_alone")
        for how, call in subject.plain_passes().items():
            rows.add(timed(call), name, f"plain pass, {how}")
        rows.add(subject.profile(), name, "profile")
    for dtype in ("float32", "bfloat16"):
        rows.add(ranking(dtype), "ranking", dtype)


def ranking(dtype: str) -> dict[str, Any]:
    """Returns how the 200 fixed candidates rank against their float64 scores.

    Where weights or images were drawn with other bits than those of the file, that is said: a rank then says little.
    """
    header, lines = fixed.read_scores()
    data, net = fixed.batch(), fixed.supernet()
    options = ScoreOptions(dtype=dtype, device="cuda").resolved(len(data.images))
    engine = AutoFormerEngine(net, data.images, data.labels, None, options)
    results = [engine.score(line["arch"]) for line in lines]
    scores, exact = [r.lswag for r in results], [line["lswag"] for line in lines]
    strata = [
        kendall_tau([exact[i] for i in rows], [scores[i] for i in rows])
        for rows in fixed.strata([line["arch"] for line in lines]).values()
    ]
    return {
        "same_weights_as_the_file": net.digest() == header["computed_with"]["supernet_sha256"],
        "tau": kendall_tau(exact, scores),
        "tau_of_lowest_stratum": min(strata),
        "largest_error_of_a_log_term": max(map(fixed.log_term_error, results, lines)),
        "same_bits_again": [engine.score(line["arch"]).lswag for line in lines[:20]] == scores[:20],
    }


class Subject:
    """The middle candidate of a space, its supernet and Gaussian images, on the GPU."""

    def __init__(self, name: str, samples: int) -> None:
        self.space = spaces.get(name, image_size=224, patch_size=16, num_classes=1000)
        self.arch = self.space.canonical(MIDDLE[name])
        self.samples = samples
        data = images.load("noise", samples, image_size=224, seed=0)
        options = ScoreOptions(dtype="bfloat16", device="cuda").resolved(samples)
        self.supernet = self.space.supernet(seed=0)
        self.engine = AutoFormerEngine(self.supernet, data.images, data.labels, None, options)
        self.images, self.labels = data.images.cuda().bfloat16(), data.labels.cuda()

    def score(self) -> Any:
        return self.engine.score(self.arch)

    def plain_passes(self) -> dict[str, Callable[[], None]]:
        """Returns plain bfloat16 forward and backward passes, to every parameter."""
        own = self.space.build(self.arch, supernet=self.supernet).to("cuda", torch.bfloat16)
        published = original_candidate(self.space, self.arch, self.supernet.subnet(self.arch).state_dict())
        passes = {"published formulation": published.to("cuda", torch.bfloat16), "space.build": own}
        return {how: partial(_plain_pass, model, self.images, self.labels) for how, model in passes.items()}

    def seconds_in_flight(self, candidates: int = 64) -> float:
        """Returns the seconds a candidate over different ones, of which two are under way at a time."""
        archs = list(self.space.sample(candidates, seed=1))
        pending: deque[Any] = deque()
        for arch in archs[:8]:
            self.engine.score(arch)
        started = time.perf_counter()
        for arch in archs:
            pending.append(self.engine.launch(arch))
            if len(pending) == 2:
                pending.popleft().finish()
        while pending:
            pending.popleft().finish()
        return (time.perf_counter() - started) / candidates

    def peer(self, how: str) -> Callable[[], Any]:
        """Returns a run of another way to Lambda, on the published formulation in bfloat16."""
        published = original_candidate(self.space, self.arch, self.supernet.subnet(self.arch).state_dict())
        model = per_sample_gradients.with_plain_modules(published.to("cuda", torch.bfloat16))
        run: Callable[[], Any] = getattr(per_sample_gradients, how)(model, self.images, self.labels)
        return run

    def profile(self) -> dict[str, float]:
        """Returns the device's milliseconds in one score, by kernel, of those that take most."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self.score()
        events = [(e.key[:80], e.self_device_time_total / 1e3) for e in profiler.key_averages()]
        return dict(sorted(events, key=lambda event: -event[1])[:25])

    def products_floor(self, rates: dict[str, float]) -> float:
        """Returns the seconds of the multiplications of one forward and backward pass, memory left out."""
        return 6 * self.space.macs(self.arch) * self.samples / rates["bfloat16_flops_per_second"]


def _plain_pass(model: torch.nn.Module, pictures: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(pictures).float(), labels).backward()
    model.zero_grad(set_to_none=True)


def peers_step(rows: Rows) -> None:
    """Finds the time of Lambda by other ways to per-sample gradients, and which of them cannot run here."""
    for name in ("autoformer-tiny", "autoformer-small"):
        subject = Subject(name, samples=16)
        rows.add(timed(subject.score, 10, waits=True), name, "score, S = 16")
        for how in ("torch_func", "loop", "opacus", "backpack"):
            try:
                rows.add(timed(subject.peer(how), 3, waits=True), name, how)
            except Exception as error:  # a package that is missing, or that cannot run this network here
                rows.add(f"not measured: {error}".splitlines()[0], name, how)


def kernels_step(rows: Rows) -> None:
    """Finds the time of every kernel at the shapes of each middle candidate, and its share of its floor."""
    peaks = rates()
    rows.add(peaks, "rates")
    subjects: dict[str, Iterator[Case]] = {name: cases(MIDDLE[name], samples=64) for name in MIDDLE}
    for name, of_subject in {**subjects, "convolutions": depthwise_cases(samples=64)}.items():
        for case in of_subject:
            rows.add(row_of(case, peaks), name, case.name)


def wgmma_step(rows: Rows) -> None:
    """Finds the time of gradient moments by Triton and by CUDA C++, in turn, and of the score with the latter."""
    if not has_wgmma(torch.device("cuda")):
        rows.add("not measured: no device of compute capability 9.0, or no build for sm_90a", "why")
        return
    peaks = rates()
    rows.add(peaks, "rates")
    for name in MIDDLE:
        case = moments_case(MIDDLE[name], samples=64)
        for again in ("", ", again"):
            for preferred in ("triton", "cuda"):
                with preferring(preferred):
                    rows.add(row_of(case, peaks), name, f"{case.name}, {preferred}{again}")
        with preferring("cuda"):
            rows.add(timed(Subject(name, samples=64).score, waits=True), name, "score")


def row_of(case: Case, peaks: dict[str, float]) -> dict[str, float]:
    """Returns the time of a kernel, and its share of the floor and of the matrix rate."""
    sets = max(1, min(16, math.ceil(CACHE_BYTES / case.bytes)))
    row = timed(rotating([case.make() for _ in range(sets)]))
    products = case.flops / peaks["bfloat16_flops_per_second"]
    floor = max(products, case.bytes / peaks["copy_bytes_per_second"])
    facts = {"flops": case.flops, "bytes": case.bytes, "share_of_floor": floor / row["seconds"]}
    return {**row, **facts, "share_of_matrix_rate": products / row["seconds"]}


def rotating(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Returns a call of each in turn: operands that were read a moment ago would lie in the cache."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


STEPS: dict[str, Callable[[Rows], None]] = {
    "score": score_step,
    "kernels": kernels_step,
    "peers": peers_step,
    "wgmma": wgmma_step,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-results", help="logs, and results again")
    parser.add_argument("--only", choices=BUDGET, action="append", help="run only these steps")
    parser.add_argument("--step", choices=STEPS, help="run this step in this process")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make bench-gpu measures a CUDA device, and torch finds none here")
    if arguments.step:
        warnings.simplefilter("ignore")
        STEPS[arguments.step](Rows(_rows_path(arguments.output, arguments.step)))
        return
    sys.exit(1 if run(arguments.only or list(BUDGET), arguments.output) else 0)


if __name__ == "__main__":
    main()
