"""What proxies cost: all that share L-SWAG's pass beside L-SWAG alone, and each by itself.

AutoFormer-Tiny's middle candidate at 224x224; the ratio is taken within a round.
"""

from __future__ import annotations

from typing import Any

import measure
import pytest
import torch
from conftest import Show
from pytest_benchmark.fixture import BenchmarkFixture
from score_methods import ARCH, Subject

import lswag_fast
from lswag_fast import proxies

SAMPLES = 16
SHARED = ("lswag", "lambda", "psi", "zico", "swap", "reg_swap", "nwot", "grad_norm", "snip", "plain", "fisher")
SHARED = (*SHARED, "gradsign", "gsnr", "te_nas_regions", "l2_norm", "params", "flops")
"""Those that run no pass of their own."""
ALONE, TOGETHER = "L-SWAG alone", "all that share its pass"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_shared_proxies(benchmark: BenchmarkFixture, device: str, rounds: int, show: Show, dtype: str) -> None:
    subject = Subject(SAMPLES, device)

    def score(*names: str) -> lswag_fast.LswagResult:
        model = subject.supernet.subnet(ARCH)
        return lswag_fast.score(model, subject.images, subject.labels, dtype=dtype, proxies=names)

    in_turn = measure.Rounds({ALONE: lambda: score("lswag"), TOGETHER: lambda: score(*SHARED)}, device)
    benchmark.pedantic(in_turn, rounds=rounds)
    methods = in_turn.summary(ALONE)
    result = score(*proxies.names())
    missing = [text for text in result.warnings if "has no value" in text or "failed" in text]
    seconds = dict(sorted(result.proxy_seconds.items(), key=lambda pair: pair[1]))
    data: dict[str, Any] = {
        "space": "autoformer-tiny",
        "arch": ARCH,
        "samples": SAMPLES,
        "dtype": dtype,
        "shared": SHARED,
        "methods": methods,
        "seconds_of_each_in_one_score": seconds,
        "values": result.proxies,
        "without_value": missing,
    }
    path = measure.write(device, f"proxies-{dtype}", data)
    rows = [(name, f"{m['median_seconds']:.3f}", f"{m['ratio']:.3f}") for name, m in methods.items()]
    rows += [(name, f"{value:.3f}", "") for name, value in seconds.items()]
    title = f"Proxies in {dtype}, S = {SAMPLES}, {torch.get_num_threads()} threads, {path.name}"
    show(title, ("", "median s", "x L-SWAG alone"), rows)
