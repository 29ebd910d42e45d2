"""Times tile shapes of the gradient-moments kernels: `PYTHONPATH=build/gpu python bench/tune_tiles.py` after bench-gpu.

For each row of the tables in lswag_fast/kernels/gradient_moments_tiles.py that this device takes, climbs from the
committed tile to the fastest by changing one number at a time, prints what to change, and writes every time to
bench/results/<device>-tiles.json. Nothing is changed: after an edit, `python tests/kernels/resources.py --write` shows
whether the new tile spills.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import measure
import torch
from gpu_cases import MIDDLE, linear_shapes
from gpu_timing import timed

from lswag_fast.kernels.gradient_moments_launch import Placed, architecture_of, launch
from lswag_fast.kernels.gradient_moments_layout import Weight, layout_of
from lswag_fast.kernels.gradient_moments_tiles import FLOAT64, HALF, IEEE, TF32, Tile

MARGIN = 0.03
"""A tile must be faster by this share to take the place of another: less than that is noise."""
TOKENS, SAMPLES = 197, 64


@dataclass(frozen=True)
class Row:
    """A row of the committed tables, and weights that take it."""

    name: str
    weights: list[Weight]

    def tile(self, architecture: int) -> Tile:
        """Returns the committed tile."""
        return layout_of(self.weights[0], architecture).form.tile

    def seconds(self, tile: Tile, architecture: int) -> float:
        """Returns the median time of a launch with a tile; infinite where the device cannot run it."""
        placed = []
        for weight in self.weights:
            operands = [t for pair in zip(weight.inputs, weight.output_grads, strict=True) for t in pair]
            placed.append(Placed(layout_of(weight, architecture, tile), operands))
        try:
            return timed(partial(launch, placed))["seconds"]
        except Exception as error:  # the compiler's, of a tile that does not fit
            print(f"{self.name} {_shown(tile)}: {str(error).splitlines()[0]}", flush=True)
            return math.inf


def rows(architecture: int) -> Iterator[Row]:
    """Draws the weights of each row: AutoFormer-Small's layers, convolutions of 3 x 3, depthwise ones."""
    device = torch.device("cuda")
    half, single = torch.bfloat16, torch.float32

    def lines(dtype: torch.dtype, groups: int = SAMPLES, **asked: bool) -> list[Weight]:
        found = []
        for out, width in linear_shapes(MIDDLE["autoformer-small"])[:8]:
            a, d = (torch.randn(SAMPLES, TOKENS, n, device=device, dtype=dtype) for n in (width, out))
            views = [t.transpose(1, 2).unsqueeze(2) for t in (a, d)]
            found.append(Weight([views[0]], [views[1]], groups, **asked))
        return found

    def planes(dtype: torch.dtype, groups: int, channels: int, channel_groups: int, kernel: int) -> list[Weight]:
        a, d = (torch.randn(SAMPLES, channels, 28, 28, device=device, dtype=dtype) for _ in range(2))
        sizes = ((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), channel_groups)
        return [Weight([a], [d], groups, *sizes)]

    for kind, dtype, groups, tf32 in (
        (HALF, half, SAMPLES, False),
        (TF32, single, SAMPLES, True),
        (IEEE, single, SAMPLES, False),
        (FLOAT64, single, 2, False),
    ):
        yield Row(f"TILES[{architecture}][{kind!r}]", lines(dtype, groups, tf32=tf32))
        if kind != TF32:
            yield Row(f"WINDOW_TILES[{architecture}][{kind!r}]", planes(dtype, groups, 128, 1, 3))
    yield Row("SIGNED_HALF_TILE" if architecture >= 90 else "SMALL_TILES[False]['half']", lines(half, signed=True))
    for places, kernel in ((16, 3), (32, 5)):
        yield Row(f"DEPTHWISE_TILES['ieee'][{places}]", planes(half, SAMPLES, 4096, 4096, kernel))


def neighbours(tile: Tile) -> list[Tile]:
    """Returns the tiles that differ from one in one number, by a factor of two or by one."""
    sizes = [(name, size) for name in ("rows", "columns", "chunk") for size in _doubled(getattr(tile, name), 1, 256)]
    sizes += [("warps", warps) for warps in _doubled(tile.warps, 2, 16)]
    for name in ("stages", "residents"):
        value = getattr(tile, name)
        sizes += [(name, n) for n in (value - 1, value + 1) if 1 <= n <= 5]
    return [replace(tile, **{name: size}) for name, size in sizes]


def _doubled(size: int, least: int, most: int) -> list[int]:
    return [n for n in (size // 2, size * 2) if least <= n <= most]


def climb(start: Tile, seconds: Callable[[Tile], float]) -> tuple[Tile, dict[Tile, float]]:
    """Returns the tile reached from `start` that no neighbour beats by MARGIN, and the seconds of all it tried."""
    times = {start: seconds(start)}
    best = start
    while True:
        near = neighbours(best)
        for tile in near:
            if tile not in times:
                times[tile] = seconds(tile)
        fastest = min(near, key=times.__getitem__)
        if not times[fastest] < times[best] * (1 - MARGIN):
            return best, times
        best = fastest


def report(name: str, committed: Tile, best: Tile, times: dict[Tile, float]) -> dict[str, Any]:
    """Prints what a row of the tables should become, and returns what is written of it."""
    if best == committed:
        print(f"{name}: keep {_shown(committed)}, {times[committed] * 1e6:.0f} us", flush=True)
    else:
        gain = times[committed] / times[best]
        print(f"{name}: change {_shown(committed)} to {_shown(best)}, {gain:.2f} times as fast", flush=True)
    return {
        "committed": asdict(committed),
        "fastest": asdict(best),
        "seconds": {_shown(tile): None if math.isinf(s) else s for tile, s in times.items()},
    }


def _shown(tile: Tile) -> str:
    return f"Tile({', '.join(str(n) for n in asdict(tile).values())})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="time only the rows whose name holds this")
    only = parser.parse_args().only
    if not torch.cuda.is_available():
        sys.exit("bench/tune_tiles.py times tiles on a CUDA device, and torch finds none here")
    architecture = architecture_of(torch.device("cuda", torch.cuda.current_device()))
    results: dict[str, Any] = {"machine": measure.machine("cuda"), "rows": {}}
    for row in rows(architecture):
        if only in row.name:
            committed = row.tile(architecture)
            best, times = climb(committed, partial(row.seconds, architecture=architecture))
            results["rows"][row.name] = report(row.name, committed, best, times)
            path = measure.write("cuda", "tiles", results)
            print(path, flush=True)


if __name__ == "__main__":
    main()
