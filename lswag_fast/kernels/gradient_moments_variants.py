"""The forms of the gradient-moments kernels: the constants of their launches, and the list that tests compile."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from .gradient_moments import largest_magnitudes, moments_of_tiles, moments_of_windows, sums_of_tiles
from .gradient_moments_tiles import FLOAT64, HALF, IEEE, TF32, TILES, Tile, tile_for
from .variant import Variant

MAGNITUDE_BLOCK = {"LINES": 16, "COLUMNS": 128}
SUMS_BLOCK = 256
_POINTERS = {
    "problems": "*i64:16",
    "uses": "*i64:16",
    "ends": "*i64:16",
    "magnitudes": "*i32:16",
    "partials": "*fp64:16",
    "problem_count": "i32",
    "first_tile": "i32",
    "end_tile": "i32",
}


def variants() -> Iterator[Variant]:
    """The launches that `gradient_moments_launch` makes: aligned and odd widths, windows, and the small kernels."""
    half, single = tl.bfloat16, tl.float32
    for architecture in TILES:
        for name, source, kind, unit in (
            ("bf16", half, HALF, 8),
            ("fp16", tl.float16, HALF, 8),
            ("bf16, widths divisible by 4", half, HALF, 4),
            ("bf16, odd widths", half, HALF, 1),
            ("tf32", single, TF32, 4),
            ("float32", single, IEEE, 4),
            ("float32, sums in float64", single, FLOAT64, 4),
        ):
            # float16 compiles to what bfloat16 does: once is enough to see that.
            if source == tl.float16 and architecture != 90:
                continue
            tile = tile_for(architecture, kind, windows=False, unit=unit)
            constants = constants_of(tile, kind, source, maps=False)
            yield Variant(
                f"gradient_moments {name} {tile.rows}x{tile.columns}x{tile.chunk}",
                moments_of_tiles,
                _POINTERS,
                {**constants, "SOURCE": source, "UNIT": unit},
                tile.warps,
                tile.stages,
                matrix=kind in (HALF, TF32),
                pipelined=unit > 1,
                architectures=(architecture,),
            )
    for name, source, kind in (
        ("bf16", half, HALF),
        ("tf32", single, TF32),
        ("float32", single, IEEE),
        ("float32, sums in float64", single, FLOAT64),
    ):
        tile = tile_for(90, kind, windows=True, unit=1)
        constants = constants_of(tile, kind, source, maps=False)
        yield Variant(
            f"gradient_moments windows {name} {tile.rows}x{tile.columns}x{tile.chunk}",
            moments_of_windows,
            _POINTERS,
            {**constants, "A_SOURCE": source, "D_SOURCE": source},
            tile.warps,
            tile.stages,
            matrix=kind in (HALF, TF32),
        )
    yield Variant(
        "gradient_moments magnitudes bf16",
        largest_magnitudes,
        {"operands": "*i64:16", "magnitudes": "*i32:16"},
        {"SOURCE": half, **MAGNITUDE_BLOCK},
        warps=4,
        stages=3,
    )
    yield Variant(
        "gradient_moments sums",
        sums_of_tiles,
        {"problems": "*i64:16", "magnitudes": "*i32:16", "partials": "*fp64:16", "results": "*fp64:16"},
        {"BLOCK": SUMS_BLOCK},
        warps=4,
        stages=3,
    )


def constants_of(
    tile: Tile, kind: str, source: tl.dtype, *, maps: bool, interpreted: bool = False
) -> dict[str, object]:
    """Returns the constants that both kernels over tiles take, for operands of `source`."""
    # The interpreter multiplies the bits of bfloat16 numbers as integers; their products are exact in float32.
    half = tl.float32 if interpreted and source == tl.bfloat16 else source
    return {
        "COMPUTE": {HALF: half, FLOAT64: tl.float64}.get(kind, tl.float32),
        "REAL": tl.float64 if kind == FLOAT64 else tl.float32,
        "PRECISION": "tf32" if kind == TF32 else "ieee",
        "BO": tile.rows,
        "BI": tile.columns,
        "BT": tile.chunk,
        "MAPS": maps,
        "INTERPRETED": interpreted,
    }
