"""What the kernels of relative attention share: which row of a table a pair of tokens takes, without a T x T index.

A token has two *places*: of its grid row and of its grid column, each counted from 1, and both 0 for the class token.
A number for every pair (query i, place of a key) is a tile [BM, 2*PLACES], the rows of the grid first; a number for
every pair (query i, row of a table) is a tile [BM, 2*SLOTS], the vertical table first. For a fixed query a place of
the key is one row of the table, so a small gather along the tile turns one into the other, and a product with a 0/1
matrix [2*PLACES, BN] spreads places over keys (or sums keys by place) on tensor cores. That product is exact: it has
one addend of each kind, and only the tile itself is rounded to the operands' dtype.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEPT: dict[tuple[tuple[int, int], int, torch.dtype, torch.device], Tensor] = {}


def indicator(grid: tuple[int, int], places: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns [1 + rows*columns, 2*places]: 1 at the two places of each token, 0 elsewhere.

    Kernels load its blocks like those of keys: worked out in a kernel, the comparisons cost it 30 registers.

    Any stream and any CUDA graph may read it: it is kept until the process ends, so its memory never becomes another
    tensor's while a stream still reads it, and before it is kept the host waits, once a shape, until it is written.
    While a graph is captured nothing may wait: one made then belongs to that graph, which writes it in every replay.
    """
    key = (grid, places, dtype, device)
    if key in _KEPT:
        return _KEPT[key]
    made = _indicator(grid, places, dtype, device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return made
            torch.cuda.current_stream().synchronize()
    return _KEPT.setdefault(key, made)


def _indicator(grid: tuple[int, int], places: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    token = torch.arange(1 + grid[0] * grid[1], device=device)[:, None]
    place = torch.arange(2 * places, device=device)
    row = torch.where(token == 0, 0, 1 + (token - 1) // grid[1])
    column = torch.where(token == 0, 0, 1 + (token - 1) % grid[1])
    return ((place == row) | (place == places + column)).to(dtype)


@triton.jit
def load_tables(vertical, horizontal, REACH: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr):
    """Returns both tables [2*REACH + 2, D] one below the other, [2*SLOTS, D], zeros between them."""
    slot = tl.arange(0, 2 * SLOTS)[:, None]
    column = tl.arange(0, D)[None, :]
    of_rows = slot < 2 * REACH + 2
    of_columns = (slot >= SLOTS) & (slot < SLOTS + 2 * REACH + 2)
    upper = tl.load(vertical + slot * D + column, mask=of_rows, other=0.0)
    lower = tl.load(horizontal + (slot - SLOTS) * D + column, mask=of_columns, other=0.0)
    return tl.where(of_rows, upper, lower)


@triton.jit
def load_tokens(base, token, stride, T: tl.constexpr, D: tl.constexpr):
    """Returns rows `token` of [T, D] with a row stride, zeros from row T on."""
    return tl.load(base + token[:, None] * stride + tl.arange(0, D)[None, :], mask=token[:, None] < T, other=0.0)


@triton.jit
def own_places(token, half, COLUMNS: tl.constexpr):
    """Returns the grid row of `token` [.., 1] where `half` [1, ..] is 0, its grid column where it is 1; from 0."""
    patch = tl.maximum(token - 1, 0)
    return tl.where(half == 0, patch // COLUMNS, patch % COLUMNS)


@triton.jit
def by_place(by_slot, query, COLUMNS: tl.constexpr, REACH: tl.constexpr, PLACES: tl.constexpr, SLOTS: tl.constexpr):
    """Returns, for each query and place of a key [BM, 2*PLACES], the number in `by_slot` of the table's row there."""
    place = tl.arange(0, 2 * PLACES)[None, :]
    half = place // PLACES
    place = place % PLACES
    distance = place - 1 - own_places(query[:, None], half, COLUMNS)
    slot = REACH + 1 + tl.minimum(tl.maximum(distance, -REACH), REACH)
    slot = tl.where((query[:, None] == 0) | (place == 0), 0, slot) + half * SLOTS
    return tl.gather(by_slot, slot, 1)


@triton.jit
def by_slot(
    by_place,
    query,
    COLUMNS: tl.constexpr,
    REACH: tl.constexpr,
    PLACES: tl.constexpr,
    SLOTS: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """Returns, for each query and row of a table [BM, 2*SLOTS], the sum of `by_place` over the places that take it.

    One place of keys takes a row of the table, but for the class query (all take row 0) and, where distances
    are CLIPPED, for the first and the last distance.
    """
    slot = tl.arange(0, 2 * SLOTS)[None, :]
    half = slot // SLOTS
    slot = slot % SLOTS
    place = own_places(query[:, None], half, COLUMNS) + slot - REACH
    taken = (place >= 1) & (place < PLACES) & (slot >= 1) & (slot < 2 * REACH + 2)
    gathered = tl.gather(by_place, tl.where(taken, place, 0) + half * PLACES, 1)
    result = tl.where(taken, gathered, 0.0)

    source = tl.arange(0, 2 * PLACES)[None, :]
    if CLIPPED:
        of_columns = source // PLACES
        distance = source % PLACES - 1 - own_places(query[:, None], of_columns, COLUMNS)
        far = tl.where((source % PLACES > 0) & (distance >= REACH), by_place, 0.0)
        near = tl.where((source % PLACES > 0) & (distance <= -REACH), by_place, 0.0)
        far_rows = tl.sum(tl.where(of_columns == 0, far, 0.0), 1)[:, None]
        far_columns = tl.sum(tl.where(of_columns == 1, far, 0.0), 1)[:, None]
        near_rows = tl.sum(tl.where(of_columns == 0, near, 0.0), 1)[:, None]
        near_columns = tl.sum(tl.where(of_columns == 1, near, 0.0), 1)[:, None]
        result = tl.where(slot == 2 * REACH + 1, tl.where(half == 0, far_rows, far_columns), result)
        result = tl.where(slot == 1, tl.where(half == 0, near_rows, near_columns), result)
    everything = tl.sum(tl.where(source < PLACES, by_place, 0.0), 1)[:, None]
    result = tl.where(query[:, None] == 0, 0.0, result)
    of_class = tl.where(query[:, None] == 0, everything, gathered)
    return tl.where(slot == 0, of_class, result)
