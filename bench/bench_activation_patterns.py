"""Packing and counting activation patterns, on the thirteen GELU outputs of a middle AutoFormer-Tiny: [S, 197, 800].

Bytes moved at least: the fused activation reads and writes every value once and writes 8 * ceil(S / 64) bytes a
position; packing alone only reads; counting reads the words once. The floor is these bytes at the rate of a copy
measured in the same run, and the share is floor / time. Beside it stands torch's GELU, so that "beyond torch" is what
patterns cost a score on top of the activation that it computes anyway. Times are the fastest of nine
rounds, of the wall and of the processor (threads that wait for one another count as busy).
"""

from __future__ import annotations

import pytest
import torch
from conftest import Show
from measure import Rounds
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn import functional as F

from lswag_fast.ops import activation_patterns as ap

SAMPLES = (16, 24, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS, TOKENS, WIDTH = 13, 197, 800
ROUNDS = 9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", SAMPLES)
def test_patterns_of_a_score(benchmark: BenchmarkFixture, samples: int, dtype: str, show: Show) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (samples, TOKENS, WIDTH)
    layers = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(LAYERS)]
    out = torch.empty_like(layers[0])
    words = [ap.pack_signs(layer) for layer in layers]
    rounds = Rounds(
        {
            "copy": lambda: [out.copy_(layer) for layer in layers],
            "torch GELU": lambda: [F.gelu(layer) for layer in layers],
            "GELU and pack": lambda: [ap.activate_and_pack(layer, "gelu") for layer in layers],
            "pack": lambda: [ap.pack_signs(layer) for layer in layers],
            "count": lambda: ap.count_patterns(words, samples),
        },
        "cpu",
    )
    benchmark.pedantic(rounds, rounds=ROUNDS)
    times = {name: 1e3 * min(seconds) for name, seconds in rounds.wall.items()}
    processor = {name: 1e3 * min(seconds) for name, seconds in rounds.processor.items()}
    values = LAYERS * out.numel() * out.element_size()
    word_bytes = LAYERS * TOKENS * WIDTH * 8 * ap.words_per_pattern(samples)
    moved = {
        "torch GELU": 2 * values,
        "GELU and pack": 2 * values + word_bytes,
        "pack": values + word_bytes,
        "count": word_bytes,
    }
    rate = 2 * values / times["copy"]
    rows = []
    for name, size in moved.items():
        floor = size / rate
        share = f"{floor / times[name]:.0%}"
        rows.append([name, f"{size / 1e6:.0f}", f"{times[name]:.2f}", f"{processor[name]:.2f}", f"{floor:.2f}", share])
    beyond = [t["GELU and pack"] - t["torch GELU"] + t["count"] for t in (times, processor)]
    rows.append(["beyond torch's GELU", "", f"{beyond[0]:.2f}", f"{beyond[1]:.2f}", "", ""])
    title = f"patterns, {dtype}, S = {samples}, {torch.get_num_threads()} threads, copy {rate / 1e6:.1f} GB/s"
    show(title, ["", "MB", "ms", "processor ms", "floor ms", "share"], rows)


@pytest.mark.parametrize("samples", SAMPLES)
def test_count_patterns(benchmark: BenchmarkFixture, samples: int) -> None:
    words = [ap.pack_signs(torch.randn(samples, TOKENS, WIDTH)) for _ in range(LAYERS)]
    benchmark(ap.count_patterns, words, samples)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activate_and_pack(benchmark: BenchmarkFixture, dtype: str) -> None:
    benchmark(ap.activate_and_pack, torch.randn(16, TOKENS, WIDTH).to(DTYPES[dtype]), "gelu")


def test_hamming_kernel(benchmark: BenchmarkFixture) -> None:
    benchmark(ap.hamming_kernel, [ap.pack_signs(torch.randn(64, TOKENS, WIDTH))], 64)
