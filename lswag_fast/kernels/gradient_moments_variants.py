"""The forms of the gradient-moments kernels: the constants of their launches, and the list that tests compile."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from .gradient_moments import moments_of_tiles
from .gradient_moments_depthwise import moments_of_depthwise
from .gradient_moments_shared import largest_magnitudes, sums_of_tiles
from .gradient_moments_tiles import DEPTHWISE_TILES, FLOAT64, HALF, IEEE, TF32, TILES, Tile, tile_for
from .gradient_moments_windows import moments_of_windows
from .variant import Variant

MAGNITUDE_BLOCK = {"LINES": 16, "COLUMNS": 128}
SUMS_BLOCK = 256
_POINTERS = {
    "problems": "*i64:16",
    "uses": "*i64:16",
    "ends": "*i64:16",
    "magnitudes": "*i32:16",
    "partials": "*fp64:16",
    "results": "*fp64:16",
    "problem_count": "i32",
    "first_tile": "i32",
    "end_tile": "i32",
}


_PLAIN = ((False, False),)
_DETAILS = (*_PLAIN, (True, False), (True, True))
_EVERY_DETAIL = (*_DETAILS, (False, True))
"""Whether signed moments, and whether maps are asked for. Maps alone take the tile of both, with half the values in
registers, so one kernel shows it for all."""


def variants() -> Iterator[Variant]:
    """The launches that `gradient_moments_launch` makes: aligned and odd widths, windows, and the small kernels."""
    for architecture in TILES:
        yield from _of_tiles(architecture)
    yield from _of_windows()
    yield from _of_depthwise()
    yield Variant(
        "gradient_moments magnitudes bf16",
        largest_magnitudes,
        {"operands": "*i64:16", "magnitudes": "*i32:16"},
        {"SOURCE": tl.bfloat16, **MAGNITUDE_BLOCK},
        warps=4,
        stages=3,
    )
    for signed in (False, True):
        yield Variant(
            f"gradient_moments sums{_detail(signed, False)}",
            sums_of_tiles,
            _types(signed),
            {"BLOCK": SUMS_BLOCK, "SIGNED": signed},
            warps=4,
            stages=3,
        )


def _of_tiles(architecture: int) -> Iterator[Variant]:
    # float16 and vectors of 4 differ from the first row in their loads alone, so their details are not compiled.
    for name, source, kind, unit, details in (
        ("bf16", tl.bfloat16, HALF, 8, _EVERY_DETAIL),
        ("fp16", tl.float16, HALF, 8, _PLAIN if architecture == 90 else ()),
        ("bf16, widths divisible by 4", tl.bfloat16, HALF, 4, _PLAIN),
        ("bf16, odd widths", tl.bfloat16, HALF, 1, _DETAILS),
        ("tf32", tl.float32, TF32, 4, _DETAILS),
        ("float32", tl.float32, IEEE, 4, _DETAILS),
        ("float32, sums in float64", tl.float32, FLOAT64, 4, _DETAILS),
    ):
        for signed, maps in details:
            tile = tile_for(architecture, kind, windows=False, unit=unit, signed=signed, maps=maps)
            yield Variant(
                f"gradient_moments {name}{_detail(signed, maps)} {tile.rows}x{tile.columns}x{tile.chunk}",
                moments_of_tiles,
                _types(signed),
                {**constants_of(tile, kind, source, maps=maps, signed=signed), "SOURCE": source, "UNIT": unit},
                tile.warps,
                tile.stages,
                matrix=kind in (HALF, TF32),
                pipelined=unit > 1,
                architectures=(architecture,),
            )


def _of_windows() -> Iterator[Variant]:
    for name, source, kind in (
        ("bf16", tl.bfloat16, HALF),
        ("tf32", tl.float32, TF32),
        ("float32", tl.float32, IEEE),
        ("float32, sums in float64", tl.float32, FLOAT64),
    ):
        for signed, maps in _DETAILS:
            tile = tile_for(90, kind, windows=True, unit=1, signed=signed, maps=maps)
            constants = constants_of(tile, kind, source, maps=maps, signed=signed)
            yield Variant(
                f"gradient_moments windows {name}{_detail(signed, maps)} {tile.rows}x{tile.columns}x{tile.chunk}",
                moments_of_windows,
                _types(signed),
                {**constants, "A_SOURCE": source, "D_SOURCE": source},
                tile.warps,
                tile.stages,
                matrix=kind in (HALF, TF32),
            )


def _of_depthwise() -> Iterator[Variant]:
    for name, source, kind in (
        ("bf16", tl.bfloat16, IEEE),
        ("float32", tl.float32, IEEE),
        ("float32, sums in float64", tl.float32, FLOAT64),
    ):
        for taps, tile in DEPTHWISE_TILES[kind].items():
            # Signed moments and maps are of a tile's weights, not its positions: where most fit, fewer do. Types differ
            # in their loads alone.
            for signed, maps in _DETAILS if taps == 32 and name != "float32" else _PLAIN:
                constants = without_product(constants_of(tile, kind, source, maps=maps, signed=signed))
                yield Variant(
                    f"gradient_moments depthwise {name}{_detail(signed, maps)} {tile.rows}x{tile.columns}x{tile.chunk}",
                    moments_of_depthwise,
                    _types(signed),
                    {**constants, "A_SOURCE": source, "D_SOURCE": source},
                    tile.warps,
                    tile.stages,
                )


def _detail(signed: bool, maps: bool) -> str:
    return ", signed" * signed + ", maps" * maps


def _types(signed: bool) -> dict[str, str]:
    return {**_POINTERS, "signed_partials": "*fp64:16"} if signed else _POINTERS


def constants_of(
    tile: Tile, kind: str, source: tl.dtype, *, maps: bool, signed: bool, interpreted: bool = False
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
        "SIGNED": signed,
        "INTERPRETED": interpreted,
    }


def without_product(constants: dict[str, object]) -> dict[str, object]:
    """Returns the constants without those of a matrix product, which depthwise convolutions do not need."""
    return {name: value for name, value in constants.items() if name not in ("COMPUTE", "PRECISION")}
