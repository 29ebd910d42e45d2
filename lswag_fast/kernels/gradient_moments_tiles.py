"""Tile shapes of the gradient-moments kernels: committed, not searched for when a program starts.

Chosen by what compiles without a spill (tests/kernels/resources.json) and then by intensity; not yet timed on a GPU.
`python bench/tune_tiles.py` times others.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """The piece of a weight that a program works on at a time."""

    rows: int
    columns: int
    chunk: int
    """Rows of a sample multiplied at a time. 32 wastes 12 % of T = 197, 64 wastes 23 %."""
    warps: int
    stages: int
    residents: int
    """Programs that fit a multiprocessor, by registers and shared memory."""


HALF, TF32, IEEE, FLOAT64 = "half", "tf32", "ieee", "float64"
"""What is multiplied: bfloat16 or float16, float32 by TF32, by float32, or by float64 (two or three groups)."""

TILES: dict[int, dict[str, Tile]] = {
    80: {
        HALF: Tile(64, 128, 64, 8, 3, 1),
        TF32: Tile(64, 128, 32, 8, 3, 1),
        IEEE: Tile(64, 64, 32, 4, 3, 3),
        FLOAT64: Tile(32, 64, 16, 4, 3, 2),
    },
    90: {
        HALF: Tile(128, 128, 64, 8, 3, 1),
        TF32: Tile(64, 128, 32, 8, 3, 1),
        IEEE: Tile(64, 64, 32, 4, 3, 3),
        FLOAT64: Tile(32, 64, 16, 4, 3, 2),
    },
}
"""Of `moments_of_tiles`, by compute capability times ten. Newer devices take the last row."""

WINDOW_TILES: dict[int, dict[str, Tile]] = {
    architecture: {
        HALF: Tile(64, 64, 32, 8, 2, 1),
        TF32: Tile(64, 64, 32, 8, 2, 1),
        IEEE: Tile(64, 64, 16, 8, 2, 1),
        FLOAT64: Tile(32, 64, 16, 8, 2, 1),
    }
    for architecture in TILES
}
"""Of `moments_of_windows`."""

NARROW_TILE = Tile(64, 64, 32, 4, 2, 2)
"""Of `moments_of_tiles` where a width or stride is odd: loads are scalar and wait, so registers go to addresses."""

SMALL_TILES: dict[bool, dict[str, Tile]] = {
    False: {
        HALF: Tile(64, 64, 64, 8, 3, 1),
        TF32: Tile(64, 64, 32, 8, 3, 1),
        IEEE: Tile(32, 64, 32, 4, 3, 2),
        FLOAT64: Tile(32, 32, 16, 4, 3, 2),
    },
    True: {
        HALF: Tile(32, 64, 32, 8, 2, 1),
        TF32: Tile(32, 64, 32, 8, 2, 1),
        IEEE: Tile(32, 64, 16, 8, 2, 1),
        FLOAT64: Tile(32, 32, 16, 8, 2, 1),
    },
}
"""Where signed moments (six values a weight, not three) or maps are asked for: of `moments_of_tiles` and, True, of
`moments_of_windows`."""

SMALL_NARROW_TILE = Tile(64, 64, 32, 8, 2, 1)
SIGNED_HALF_TILE = Tile(64, 128, 64, 8, 3, 1)
"""For compute capability 9.0 and newer, where signed moments are asked for and maps are not."""

WGMMA_TILE = Tile(128, 128, 64, 12, 7, 1)
"""Of the CUDA C++ kernel (csrc/cuda/gradient_moments.cuh), whose code has these numbers; 4 of the warps copy."""

DEPTHWISE_TILES = {
    IEEE: {16: Tile(4, 16, 32, 4, 1, 2), 32: Tile(2, 32, 32, 4, 1, 2)},
    FLOAT64: {16: Tile(2, 16, 32, 4, 1, 2), 32: Tile(1, 32, 32, 4, 1, 2)},
}
"""Of `moments_of_depthwise`, by the places for taps of a kernel: channels x taps x positions of products."""

INTERPRETED_DEPTHWISE_TILE = Tile(4, 8, 16, 4, 1, 1)
INTERPRETED_TILE = Tile(32, 32, 16, 4, 2, 1)
"""Under TRITON_INTERPRET=1: small, so that small tests have several tiles and chunks."""


def depthwise_tile(architecture: int, kind: str, taps: int) -> Tile:
    """Returns the tile for a depthwise kernel of so many taps; larger ones are cut into several tiles."""
    if architecture == 0:
        return INTERPRETED_DEPTHWISE_TILE
    return DEPTHWISE_TILES[kind][16 if taps <= 16 else 32]


def tile_for(architecture: int, kind: str, *, windows: bool, unit: int, signed: bool, maps: bool) -> Tile:
    """Returns the tile for a compute capability times ten (0: interpreted), and the elements to a vector of loads."""
    if architecture == 0:
        return INTERPRETED_TILE
    known = max((a for a in TILES if a <= architecture), default=min(TILES))
    narrow = not windows and unit == 1 and kind != FLOAT64
    if signed or maps:
        if kind == HALF and unit > 1 and not maps and known >= 90:
            return SIGNED_HALF_TILE
        return SMALL_NARROW_TILE if narrow else SMALL_TILES[windows][kind]
    if narrow:
        return NARROW_TILE
    return (WINDOW_TILES if windows else TILES)[known][kind]
