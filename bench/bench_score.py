"""The score of the middle AutoFormer-Tiny candidate at 224x224, beside one plain forward and backward pass.

The baseline is the published formulation in float32, every parameter trained. Ratios are taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import measure
import pytest
import score_methods
import torch
import torch.nn.functional as F
from conftest import Show
from pytest_benchmark.fixture import BenchmarkFixture
from score_methods import ARCH, BASELINE, OWN, PACKAGES, PLAIN, SCORES, Subject

from lswag_fast import backends, scoring
from lswag_fast.proxies import statistics

SAMPLES = 16
PRODUCT = 2048
OPTIONAL = {"Opacus": "opacus", "BackPACK": "backpack"}
SCRIPT = Path(score_methods.__file__)
HEADS = ("", "median s", "x plain pass", "of fastest", "of processor time", "share of floor")

pytestmark = pytest.mark.filterwarnings("ignore")


def test_score_beside_plain_passes(benchmark: BenchmarkFixture, device: str, rounds: int, show: Show) -> None:
    missing = _not_measured(device, SCORES)
    names = [name for name in (*PLAIN, *SCORES) if name not in missing]
    subject = Subject(SAMPLES, device)
    products = {f"product of {PRODUCT} x {PRODUCT}, {str(d)[6:]}": d for d in (torch.float32, torch.bfloat16)}
    runs = {name: subject.method(name) for name in names}
    runs |= {name: _matrix_product(dtype, device) for name, dtype in products.items()}
    methods = _measured(benchmark, runs, device, rounds)
    # The floor: the multiplications of one forward and backward pass at the rate of the large matrix product.
    work = 6 * subject.space.macs(ARCH) * SAMPLES / (2 * PRODUCT**3)
    floors = {name.split()[-1]: work * methods.pop(name)["median_seconds"] for name in products}
    for name, row in methods.items():
        row["share_of_floor"] = floors[name.split()[-1]] / row["median_seconds"]
    _report("score", device, show, methods, {"floor_seconds": floors}, missing)


def test_other_ways_to_per_sample_gradients(benchmark: BenchmarkFixture, device: str, rounds: int, show: Show) -> None:
    missing = _not_measured(device, (*SCORES, *PACKAGES))
    names = [name for name in (BASELINE, *SCORES, *PACKAGES) if name not in missing]
    subject = Subject(SAMPLES, device)
    runs = {name: subject.method(name) for name in names}
    methods = _measured(benchmark, runs, device, max(1, rounds // 5))
    _report("per-sample-gradients", device, show, methods, {}, missing)


def test_peak_memory(benchmark: BenchmarkFixture, device: str, threads: int, show: Show) -> None:
    if device == "cuda":
        pytest.skip("the peak of resident memory says nothing about a GPU")
    if not measure.CLEAR_REFS.exists():
        pytest.skip(f"peak memory is read from Linux's {measure.CLEAR_REFS}")
    missing = _not_measured(device, PACKAGES)
    names = [name for name in (BASELINE, *SCORES, *OWN, *PACKAGES) if name not in missing]
    peaks: dict[str, float] = {}

    def all_methods() -> None:
        for name in names:
            peaks[name] = measure.in_fresh_process(SCRIPT, name, str(SAMPLES), str(threads)) / measure.MIB

    benchmark.pedantic(all_methods, rounds=1)
    methods = {n: {"peak_mib": peak, "ratio": peak / peaks[BASELINE]} for n, peak in peaks.items()}
    data = {
        "how": "rise of peak resident memory during the first call in a fresh process, over what it held with packages "
        "imported, model and images in memory",
        **_shapes(),
        "methods": methods,
        "not_measured": missing,
    }
    path = measure.write(device, "memory", data)
    rows = [(n, f"{m['peak_mib']:.0f}", f"{m['ratio']:.2f}") for n, m in methods.items()]
    show(f"Peak memory of one call, {path.name}", ("", "MiB", "x plain pass"), rows)


@pytest.mark.parametrize("dtype", SCORES.values())
def test_share_of_pattern_counting(benchmark: BenchmarkFixture, device: str, show: Show, dtype: str) -> None:
    if reason := _no_kernels(device):
        pytest.skip(reason)
    found: dict[int, dict[str, float]] = {}

    def all_sizes() -> None:
        for samples in (16, 24, 64):
            found[samples] = _pattern_shares(Subject(samples), dtype, runs=3)

    benchmark.pedantic(all_sizes, rounds=1)
    data = {**_shapes(), "samples": list(found), "dtype": dtype, "by_samples": found}
    path = measure.write(device, f"patterns-{dtype}", data)
    rows = [(f"S = {s}", *(f"{row[c]:.4f}" for c in row)) for s, row in found.items()]
    show(f"Seconds of the parts of a score in {dtype}, {path.name}", ("", *next(iter(found.values()))), rows)


def _measured(
    benchmark: BenchmarkFixture, runs: dict[str, Callable[[], Any]], device: str, rounds: int
) -> dict[str, dict[str, float]]:
    in_turn = measure.Rounds(runs, device)
    benchmark.pedantic(in_turn, rounds=rounds)
    _agree(in_turn.first)
    summary = in_turn.summary(BASELINE)
    benchmark.extra_info.update(summary)
    return summary


def _report(
    what: str,
    device: str,
    show: Show,
    methods: dict[str, dict[str, float]],
    extra: dict[str, Any],
    missing: dict[str, str],
) -> None:
    data = {**_shapes(), **extra, "baseline": BASELINE, "methods": methods, "not_measured": missing}
    path = measure.write(device, what, data)
    columns = ("median_seconds", "ratio", "ratio_of_fastest", "ratio_of_processor_time", "share_of_floor")
    rows = [(n, *(f"{m[c]:.3f}" if c in m else "" for c in columns)) for n, m in methods.items()]
    rows += [(name, reason, *[""] * (len(columns) - 1)) for name, reason in missing.items()]
    show(f"S = G = {SAMPLES}, {torch.get_num_threads()} threads, {path.name}", HEADS, rows)


def _shapes() -> dict[str, Any]:
    return {"space": "autoformer-tiny", "image_size": 224, "samples": SAMPLES, "groups": "one a sample", "arch": ARCH}


def _no_kernels(device: str) -> str | None:
    """Says why scores cannot be measured on a device, or None."""
    return next((b.detail for b in backends.backends() if b.name == device and not b.available), None)


def _not_measured(device: str, names: Iterable[str]) -> dict[str, str]:
    """Says which methods cannot run here, and why."""
    reasons = {}
    for name in names:
        if name in SCORES and (reason := _no_kernels(device)):
            reasons[name] = reason
        if name in OPTIONAL and find_spec(OPTIONAL[name]) is None:
            reasons[name] = "not installed; pip install 'lswag-fast[bench]'"
    return reasons


def _agree(results: dict[str, Any]) -> None:
    """Checks that methods that are compared compute the same."""
    for name, found in results.items():
        if name in PACKAGES:
            expected = results["loop over samples"]
            assert found == pytest.approx(expected, rel=1e-5), name
        if name in SCORES and "loop over samples" in results:
            assert found.trainability == pytest.approx(results["loop over samples"], rel=1e-3), name


def _matrix_product(dtype: torch.dtype, device: str) -> Callable[[], Any]:
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _pattern_shares(subject: Subject, dtype: str, runs: int) -> dict[str, float]:
    """Returns the fastest of some scores: its seconds, those of activations with packing, without, and of counting."""
    scores = [_timed_parts(subject, dtype) for _ in range(runs)]
    best = min(scores[1:], key=lambda parts: parts["score"])
    patterns = max(best["activations with packing"] - best["activations alone"], 0.0) + best["counting"]
    return {**best, "share of packing and counting": patterns / best["score"]}


def _timed_parts(subject: Subject, dtype: str) -> dict[str, float]:
    parts = dict.fromkeys(("activations with packing", "activations alone", "counting"), 0.0)
    originals = statistics.activate_and_pack, statistics.count_patterns_device

    def timed(part: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        parts[part] += time.perf_counter() - start
        return result

    def activate(pre: torch.Tensor, kind: str, **options: Any) -> Any:
        timed("activations alone", lambda: F.gelu(pre))
        return timed("activations with packing", lambda: originals[0](pre, kind, **options))

    def count(*arguments: Any) -> Any:
        return timed("counting", lambda: originals[1](*arguments))

    statistics.activate_and_pack, statistics.count_patterns_device = activate, count
    try:
        start = time.perf_counter()
        scoring.score(subject.supernet.subnet(ARCH), subject.images, subject.labels, dtype=dtype)
        whole = time.perf_counter() - start
    finally:
        statistics.activate_and_pack, statistics.count_patterns_device = originals
    return {"score": whole - parts["activations alone"], **parts}
