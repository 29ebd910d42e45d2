"""How bench/tune_tiles.py chooses, with a timer that knows the answer."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")

import tune_tiles

from lswag_fast.kernels.gradient_moments_tiles import Tile

START = Tile(64, 64, 32, 4, 3, 1)
SCRIPT = Path(tune_tiles.__file__)


def distance(tile: Tile, to: Tile) -> float:
    """Steps from one tile to another, doublings of sizes and ones of counts."""
    steps = [abs(math.log2(getattr(tile, n) / getattr(to, n))) for n in ("rows", "columns", "chunk", "warps")]
    return sum(steps) + abs(tile.stages - to.stages) + abs(tile.residents - to.residents)


def test_it_climbs_to_the_fastest_tile() -> None:
    fastest = Tile(128, 128, 64, 8, 4, 2)
    best, times = tune_tiles.climb(START, lambda tile: 1.0 + distance(tile, fastest))
    assert best == fastest
    assert times[START] == 7.0
    assert times[best] == min(times.values())


def test_a_gain_within_the_noise_changes_nothing() -> None:
    best, _ = tune_tiles.climb(START, lambda tile: 1.0 if tile == START else 0.98)
    assert best == START


def test_each_tile_is_timed_once_and_one_that_cannot_run_is_passed_over() -> None:
    asked: list[Tile] = []

    def seconds(tile: Tile) -> float:
        asked.append(tile)
        return math.inf if tile.rows * tile.columns > 64 * 128 else 1.0 / (tile.rows * tile.columns)

    best, times = tune_tiles.climb(START, seconds)
    assert len(asked) == len(set(asked)) == len(times)
    assert best.rows * best.columns == 64 * 128


def test_a_device_that_runs_no_tile_keeps_the_committed_one() -> None:
    best, times = tune_tiles.climb(START, lambda tile: math.inf)
    assert best == START
    row = tune_tiles.report("TILES[90]['half']", START, START, times)
    assert set(row["seconds"].values()) == {None}


def test_neighbours_differ_in_one_number_that_a_kernel_can_take() -> None:
    for tile in tune_tiles.neighbours(Tile(1, 16, 256, 4, 1, 1)):
        assert distance(tile, Tile(1, 16, 256, 4, 1, 1)) == 1
        assert min(tile.rows, tile.columns, tile.chunk, tile.warps, tile.stages, tile.residents) >= 1
        assert tile.chunk <= 256


def test_what_to_change_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    best = Tile(64, 128, 32, 4, 3, 1)
    row = tune_tiles.report("TILES[90]['half']", START, best, {START: 2e-3, best: 1e-3})
    assert (
        "TILES[90]['half']: change Tile(64, 64, 32, 4, 3, 1) to Tile(64, 128, 32, 4, 3, 1)" in capsys.readouterr().out
    )
    assert row["fastest"]["columns"] == 128


def test_without_a_device_it_says_so() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert run.stderr.strip() == "bench/tune_tiles.py times tiles on a CUDA device, and torch finds none here"
