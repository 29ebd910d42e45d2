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
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import float64_ranking as fixed
import measure
import torch
from gpu_cases import MIDDLE, Case, cases, depthwise_cases, moments_case
from gpu_subject import FROM_PASS, Subject
from gpu_timing import rates, timed
from steps import Rows, Step, rows_path, run

from lswag_fast.backends import preferring
from lswag_fast.correlation import kendall_tau
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.kernels.gradient_moments_launch import has_wgmma
from lswag_fast.options import ScoreOptions

BUDGET = {
    "correctness": 150,
    "score": 100,
    "kernels": 60,
    "peers": 35,
    "memory checker": 40,
    "wgmma correctness": 30,
    "wgmma": 20,
}
"""Seconds a step may take; with the build they are eight minutes."""
CACHE_BYTES = 2**28
"""Operands of one kernel are rotated through several times the cache."""


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
    pytest += ["-o", f"faulthandler_timeout={seconds // 2}"]  # says where a test hangs, before the step is stopped
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


def score_step(rows: Rows) -> None:
    """Finds how fast whole scores are beside plain passes, and how they rank."""
    peaks = rates()
    rows.add(peaks, "rates")
    subjects = {name: Subject(name, samples=64) for name in MIDDLE}
    for name, subject in subjects.items():
        for how, engine in (("", subject.engine), (", without CUDA graphs", subject.without_graphs)):
            add_score(rows, subject, engine, how, peaks)
        rows.attempt(subject.candidates_a_minute, name, "candidates a minute")
        for how in ("published formulation", "space.build"):
            rows.attempt(partial(subject.plain_pass, how), name, f"plain pass, {how}")
    for dtype in ("bfloat16", "float32"):
        rows.attempt(partial(ranking, dtype), "ranking", dtype)
    for name, subject in subjects.items():
        rows.attempt(subject.profile, name, "profile")
    how = f", {len(FROM_PASS)} proxies"
    for name, subject in subjects.items():
        add_score(rows, subject, subject.with_others, how, peaks)
        rows.attempt(partial(subject.candidates_a_minute, others=True), name, f"candidates a minute{how}")


def add_score(rows: Rows, subject: Subject, engine: AutoFormerEngine, how: str, peaks: dict[str, float]) -> None:
    """Finds the time of an engine's score, and that of the device for it."""
    score, launch = partial(engine.score, subject.arch), partial(engine.launch, subject.arch)
    rows.attempt(partial(timed, score, waits=True), subject.name, f"score{how}")
    # The device's time of it, for the host does not wait.
    rows.attempt(partial(shares, launch, *subject.flops_and_bytes(), peaks), subject.name, f"launch of a score{how}")


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
    """Returns the time of a kernel and its shares."""
    sets = max(1, min(16, math.ceil(CACHE_BYTES / case.bytes)))
    return shares(rotating([case.make() for _ in range(sets)]), case.flops, case.bytes, peaks)


def shares(call: Callable[[], Any], flops: float, moved: float, peaks: dict[str, float]) -> dict[str, float]:
    """Returns the time of a call that multiplies and moves so much, its shares of both rates, and of its floor."""
    row = timed(call)
    of_matrix_rate = flops / peaks["bfloat16_flops_per_second"] / row["seconds"]
    of_copy_rate = moved / peaks["copy_bytes_per_second"] / row["seconds"]
    facts = {"flops": flops, "bytes": moved, "share_of_floor": max(of_matrix_rate, of_copy_rate)}
    return {**row, **facts, "share_of_matrix_rate": of_matrix_rate, "share_of_copy_rate": of_copy_rate}


def rotating(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Returns a call of each in turn: operands that were read a moment ago would lie in the cache."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def compile_scores(name: str) -> None:
    """Compiles the kernels of a space's scores in bfloat16, and of its kernels' cases."""
    subject = Subject(name, samples=64)
    for engine in (subject.engine, subject.with_others):
        engine.score(subject.arch)
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
