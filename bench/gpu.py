"""Everything that only a GPU can show, in one command of at most eight minutes: `make bench-gpu`.

In this order, each in a process of its own and written as it comes: correctness on the device (and beside it the
kernels of later steps are compiled), the whole score, the kernels, the peers, some tests again under a memory checker;
last, tests and times of the wgmma kernel of gradient moments, which no result before them uses. A step that fails or
runs out of time is recorded with its reason, and the next one runs; so it is with the rows of a step. Logs go to the
output folder, results to bench/results/<device>-kernels.json and there too. With --only, the results of the other
steps stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
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
from steps import Rows, Step, rows_path, run
from torch import Tensor

from lswag_fast import images, spaces
from lswag_fast.backends import preferring
from lswag_fast.correlation import kendall_tau
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.kernels.gradient_moments_launch import has_wgmma
from lswag_fast.options import ScoreOptions

BUDGET = {
    "correctness": 150,
    "score": 90,
    "kernels": 60,
    "peers": 35,
    "memory checker": 50,
    "wgmma correctness": 20,
    "wgmma": 20,
}
"""Seconds a step may take; with the build they are eight minutes."""
ROUNDS = 20
PRODUCT = 8192
COPY_BYTES = 2**32
CACHE_BYTES = 2**28
"""Operands of one kernel are rotated through several times the cache."""
SLEEP_CYCLES, CYCLES_A_SECOND = 20_000_000, 2_000_000_000


def step(name: str, folder: Path) -> Step:
    """Returns what a step runs."""
    seconds = BUDGET[name]
    script = [sys.executable, __file__, "--output", str(folder)]
    # Compiled kernels stay in the checkout, and a call after this one on the same machine finds them.
    cache = {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(measure.ROOT / "build" / "triton"))}
    if name in STEPS:
        return Step(name, seconds, [*script, "--step", name], environment=cache)
    found = sorted(str(path.relative_to(measure.ROOT)) for path in (measure.ROOT / "tests").rglob("test_*on_device.py"))
    tests = [path for path in found if ("wgmma" in path) == (name == "wgmma correctness")]
    pytest = [sys.executable, "-P", "-m", "pytest", "-v", "-rs", "--tb=short", "-p", "no:cacheprovider", *tests]
    if name == "wgmma correctness":
        return Step(name, seconds, pytest, environment=cache)
    if name == "correctness":
        # Most of it is compiling, which several processes share.
        parallel = ["-n", "6", "--dist", "worksteal"] if find_spec("xdist") else []
        beside = [[*script, "--compile", what] for what in COMPILED]
        return Step(name, seconds, [*pytest, *parallel, "--durations=15"], environment=cache, beside=beside)
    checker = shutil.which("compute-sanitizer")
    some = "hamming or groups_of_samples or made_to_collide or few_groups or equal_magnitudes"
    command = None if checker is None else [checker, "--error-exitcode", "9", *pytest, "-k", some]
    # Blocks of a caching allocator hide where a tensor ends.
    environment = {**cache, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(name, seconds, command, "compute-sanitizer is not installed", environment)


def timed(call: Callable[[], Any], rounds: int = ROUNDS, *, waits: bool = False) -> dict[str, float]:
    """Returns the median seconds of a call on the device, and of its launch on the host.

    The device first sleeps, longer than a launch takes, so that it is the device that is timed and not the launch; a
    call that `waits` for the device is timed by the clock instead.
    """
    launch = 0.0
    for _ in range(3):
        began = time.perf_counter()
        call()
        launch = time.perf_counter() - began
    torch.cuda.synchronize()
    cycles = max(SLEEP_CYCLES, int(2 * launch * CYCLES_A_SECOND))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    host = []
    for start, end in events:
        if not waits:
            torch.cuda._sleep(cycles)
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
    peaks = rates()
    rows.add(peaks, "rates")
    subjects = {name: Subject(name, samples=64) for name in MIDDLE}
    for name, subject in subjects.items():
        rows.attempt(partial(timed, subject.score, waits=True), name, "score")
        rows.attempt(partial(timed, subject.launch), name, "launch of a score, the device behind")
        rows.attempt(subject.candidates_a_minute, name, "candidates a minute")
        rows.add(subject.products_floor(peaks), name, "floor_seconds_of_products_alone")
        for how in ("published formulation", "space.build"):
            rows.attempt(partial(subject.plain_pass, how), name, f"plain pass, {how}")
    for dtype in ("bfloat16", "float32"):
        rows.attempt(partial(ranking, dtype), "ranking", dtype)
    for name, subject in subjects.items():
        rows.attempt(subject.profile, name, "profile")


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

    def launch(self) -> Any:
        return self.engine.launch(self.arch)

    def plain_pass(self, how: str) -> dict[str, float]:
        """Returns the times of a plain bfloat16 forward and backward pass to every parameter, and with a wait after."""
        if how == "space.build":
            model = self.space.build(self.arch, supernet=self.supernet)
        else:
            model = original_candidate(self.space, self.arch, self.supernet.subnet(self.arch).state_dict())
        call = partial(_plain_pass, model.to("cuda", torch.bfloat16), self.images, self.labels)

        def waiting() -> None:
            call()
            torch.cuda.synchronize()

        return {**timed(call), "seconds_with_a_wait": timed(waiting, waits=True)["seconds"]}

    def candidates_a_minute(self, candidates: int = 64) -> dict[str, float]:
        """Returns how many different ones are scored a minute, by how many are under way at a time."""
        archs = list(self.space.sample(candidates, seed=1))
        for arch in archs[:8]:
            self.engine.score(arch)
        found = {}
        for most, how in ((1, "one at a time"), (2, "two in flight")):
            pending: deque[Any] = deque()
            started = time.perf_counter()
            for arch in archs:
                pending.append(self.engine.launch(arch))
                if len(pending) == most:
                    pending.popleft().finish()
            while pending:
                pending.popleft().finish()
            found[how] = 60 * candidates / (time.perf_counter() - started)
        return found

    def peer(self, how: str) -> Callable[[], Any]:
        """Returns a run of another way to Lambda, on the published formulation in bfloat16."""
        published = original_candidate(self.space, self.arch, self.supernet.subnet(self.arch).state_dict())
        model = per_sample_gradients.with_plain_modules(published.to("cuda", torch.bfloat16))
        run: Callable[[], Any] = getattr(per_sample_gradients, how)(model, self.images, self.labels)
        return run

    def profile(self) -> dict[str, Any]:
        """Returns what the device does for one score: how many launches, their milliseconds, and both by kernel."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self.score()
        on_device = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        longest = sorted(on_device, key=lambda e: -e.self_device_time_total)[:25]
        return {
            "launches": sum(e.count for e in on_device),
            "milliseconds": sum(e.self_device_time_total for e in on_device) / 1e3,
            "longest": {e.key[:80]: [e.count, e.self_device_time_total / 1e3] for e in longest},
        }

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
                measure.wait()  # raises where the device takes no more work


def kernels_step(rows: Rows) -> None:
    """Finds the time of every kernel at the shapes of each middle candidate, and its share of its floor."""
    peaks = rates()
    rows.add(peaks, "rates")
    subjects: dict[str, Iterator[Case]] = {name: cases(MIDDLE[name], samples=64) for name in MIDDLE}
    for name, of_subject in {**subjects, "convolutions": depthwise_cases(samples=64)}.items():
        for case in of_subject:
            rows.attempt(partial(row_of, case, peaks), name, case.name)


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
                    rows.attempt(partial(row_of, case, peaks), name, f"{case.name}, {preferred}{again}")
        with preferring("cuda"):
            rows.attempt(lambda name=name: timed(Subject(name, samples=64).score, waits=True), name, "score")


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


def compile_scores(name: str) -> None:
    """Compiles the kernels of a space's scores in bfloat16, and of its kernels' cases."""
    Subject(name, samples=64).score()
    for case in cases(MIDDLE[name], samples=64):
        case.make()()


def compile_ranking() -> None:
    """Compiles the kernels of the fixed candidates' scores, each embedding's."""
    _, lines = fixed.read_scores()
    data, net = fixed.batch(), fixed.supernet()
    archs = {line["arch"]["embed_dim"]: line["arch"] for line in lines}
    for dtype in ("float32", "bfloat16"):
        engine = AutoFormerEngine(
            net, data.images, data.labels, None, ScoreOptions(dtype=dtype, device="cuda").resolved(len(data.images))
        )
        for arch in archs.values():
            engine.score(arch)


def compile_convolutions() -> None:
    """Compiles the kernels of the depthwise cases."""
    for case in depthwise_cases(samples=64):
        case.make()()


STEPS: dict[str, Callable[[Rows], None]] = {
    "score": score_step,
    "kernels": kernels_step,
    "peers": peers_step,
    "wgmma": wgmma_step,
}
COMPILED: dict[str, Callable[[], None]] = {
    **{name: partial(compile_scores, name) for name in MIDDLE},
    "ranking": compile_ranking,
    "convolutions": compile_convolutions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=measure.ROOT / "build" / "gpu-results", help="logs, and results")
    parser.add_argument("--only", choices=BUDGET, action="append", help="run only these steps")
    parser.add_argument("--step", choices=STEPS, help="run this step in this process")
    parser.add_argument("--compile", choices=COMPILED, help="run each kernel of these once, and measure nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make bench-gpu measures a CUDA device, and torch finds none here")
    warnings.simplefilter("ignore")
    if arguments.compile:
        COMPILED[arguments.compile]()
    elif arguments.step:
        rows = Rows(rows_path(arguments.output, arguments.step))
        STEPS[arguments.step](rows)
        rows.end()
    else:
        sys.exit(1 if run_all(arguments.only or list(BUDGET), arguments.output) else 0)


def run_all(names: Sequence[str], folder: Path) -> int:
    """Runs steps, and returns how many failed; what a step found before stays until it is run again."""
    known = measure.results_path("cuda", "kernels")
    before = json.loads(known.read_text())["steps"] if known.exists() and set(names) != set(BUDGET) else {}

    def write(results: dict[str, Any]) -> Path:
        path = measure.write("cuda", "kernels", results)
        shutil.copy(path, folder)
        return path

    return run([step(name, folder) for name in names], folder, {"steps": before}, write)


if __name__ == "__main__":
    main()
