"""Packing and counting activation patterns, on the thirteen GELU outputs of a middle AutoFormer-Tiny: [S, 197, 800].

Bytes moved at least: the fused activation reads and writes every value once and writes 8 * ceil(S / 64) bytes a
position; packing alone only reads; counting reads the words once. The floor is these bytes at the rate of a copy
measured in the same run, and the share is floor / time. Beside it stands torch's GELU, so that "beyond torch" is what
patterns cost a score on top of the activation that it computes anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from conftest import Show
from torch import Tensor
from torch.nn import functional as F

from lswag_fast.ops import activation_patterns as ap

SAMPLES = (16, 24, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS, TOKENS, WIDTH = 13, 197, 800
ROUNDS = 9


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(t) for name, t in times.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", SAMPLES)
def test_patterns_of_a_score(samples: int, dtype: str, show: Show) -> None:
    generator = torch.Generator().manual_seed(0)
    # One layer's values serve all thirteen; their words differ, as those of a network do.
    layer = torch.randn(samples, TOKENS, WIDTH, generator=generator).to(DTYPES[dtype])
    out = torch.empty_like(layer)
    words = [ap.pack_signs(layer.roll(n, 2) - 0.1 * n) for n in range(LAYERS)]

    def layers(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(LAYERS)]

    times = milliseconds(
        {
            "copy": layers(lambda: out.copy_(layer)),
            "torch GELU": layers(lambda: F.gelu(layer)),
            "GELU and pack": layers(lambda: ap.activate_and_pack(layer, "gelu")),
            "pack": layers(lambda: ap.pack_signs(layer)),
            "count": lambda: ap.count_patterns(words, samples),
        }
    )
    values = LAYERS * layer.numel() * layer.element_size()
    word_bytes = LAYERS * TOKENS * WIDTH * 8 * ap.words_per_pattern(samples)
    moved = {
        "torch GELU": 2 * values,
        "GELU and pack": 2 * values + word_bytes,
        "pack": values + word_bytes,
        "count": word_bytes,
    }
    rate = 2 * values / times["copy"]
    rows = [
        [name, f"{size / 1e6:.0f}", f"{times[name]:.2f}", f"{size / rate:.2f}", f"{size / rate / times[name]:.0%}"]
        for name, size in moved.items()
    ]
    beyond = times["GELU and pack"] - times["torch GELU"] + times["count"]
    rows.append(["beyond torch's GELU", "", f"{beyond:.2f}", "", ""])
    title = f"patterns, {dtype}, S = {samples}, {torch.get_num_threads()} threads, copy {rate / 1e6:.1f} GB/s"
    show(title, ["", "MB", "ms", "floor ms", "share"], rows)


@pytest.mark.parametrize("samples", SAMPLES)
def test_count_patterns(benchmark: Callable[..., object], samples: int) -> None:
    words = [ap.pack_signs(torch.randn(samples, TOKENS, WIDTH)) for _ in range(LAYERS)]
    benchmark(ap.count_patterns, words, samples)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activate_and_pack(benchmark: Callable[..., object], dtype: str) -> None:
    benchmark(ap.activate_and_pack, torch.randn(16, TOKENS, WIDTH).to(DTYPES[dtype]), "gelu")


def test_hamming_kernel(benchmark: Callable[..., Tensor]) -> None:
    benchmark(ap.hamming_kernel, [ap.pack_signs(torch.randn(64, TOKENS, WIDTH))], 64)
