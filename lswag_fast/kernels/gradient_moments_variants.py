"""The forms of the gradient-moments kernels: the constants of their launches, and the list that tests compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class _Asked:
    """What is asked for beside the sums of |g|."""

    signed: bool = False
    weight: bool = False
    maps: bool = False

    def __str__(self) -> str:
        return ", signed" * self.signed + ", weight" * self.weight + ", maps" * self.maps

    def constants(self, source: tl.dtype) -> dict[str, Any]:
        """Returns what `constants_of` is told of it, with a weight of the type of the operands."""
        return {"signed": self.signed, "maps": self.maps, "weight": source if self.weight else None}


_PLAIN = (_Asked(),)
_DETAILS = (*_PLAIN, _Asked(signed=True), _Asked(signed=True, weight=True), _Asked(True, True, True))
_EVERY_DETAIL = (*_DETAILS, _Asked(signed=True, maps=True), _Asked(maps=True))
"""What has less beside maps takes the tile of all, with fewer values in registers, so one kernel shows it for all."""


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
    for asked in (_Asked(), _Asked(signed=True)):
        yield Variant(
            f"gradient_moments sums{asked}",
            sums_of_tiles,
            _types(asked),
            {"BLOCK": SUMS_BLOCK, "SIGNED": asked.signed},
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
        for asked in details:
            tile = tile_for(architecture, kind, windows=False, unit=unit, signed=asked.signed, maps=asked.maps)
            yield Variant(
                f"gradient_moments {name}{asked} {tile.rows}x{tile.columns}x{tile.chunk}",
                moments_of_tiles,
                _types(asked),
                {**constants_of(tile, kind, source, **asked.constants(source)), "SOURCE": source, "UNIT": unit},
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
        for asked in _DETAILS:
            tile = tile_for(90, kind, windows=True, unit=1, signed=asked.signed, maps=asked.maps)
            constants = constants_of(tile, kind, source, **asked.constants(source))
            yield Variant(
                f"gradient_moments windows {name}{asked} {tile.rows}x{tile.columns}x{tile.chunk}",
                moments_of_windows,
                _types(asked),
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
            for asked in _DETAILS if taps == 32 and name != "float32" else _PLAIN:
                constants = without_product(constants_of(tile, kind, source, **asked.constants(source)))
                yield Variant(
                    f"gradient_moments depthwise {name}{asked} {tile.rows}x{tile.columns}x{tile.chunk}",
                    moments_of_depthwise,
                    _types(asked),
                    {**constants, "A_SOURCE": source, "D_SOURCE": source},
                    tile.warps,
                    tile.stages,
                )


def _types(asked: _Asked) -> dict[str, str]:
    signed = {"signed_partials": "*fp64:16"} if asked.signed else {}
    return {**_POINTERS, **signed, **({"weights": "*i64:16"} if asked.weight else {})}


def constants_of(
    tile: Tile,
    kind: str,
    source: tl.dtype,
    *,
    maps: bool,
    signed: bool,
    weight: tl.dtype | None = None,
    interpreted: bool = False,
) -> dict[str, object]:
    """Returns the constants that the kernels over tiles take, for operands of `source` and a weight of `weight`."""
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
        "WEIGHT": weight,
        "INTERPRETED": interpreted,
    }


def without_product(constants: dict[str, object]) -> dict[str, object]:
    """Returns the constants without those of a matrix product, which depthwise convolutions do not need."""
    return {name: value for name, value in constants.items() if name not in ("COMPUTE", "PRECISION")}
