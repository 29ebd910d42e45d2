"""Relative attention of AutoFormer-Tiny, beside the published formulation and beside attention without positions.

FLOP of a (sample, head), T = 197 tokens, D = 64 channels, a grid of 14 x 14: 2*T*T*D for each of the 2 products of the
forward and the 5 of the backward pass, 2*(T - 1)*28*D for each of the tables' steps (2 forward, 3 backward, and 2 more
for the tables' own gradients): 11.3 MFLOP forward, 38.3 with the backward pass. Bytes that must move: qkv in and the
output out, 4*T*D numbers, and 7*T*D more backwards: 0.2 and 0.55 MB in float32, some 25 MB a batch of 48. At 20 GB/s
that is 1.3 ms against 4.2 ms of arithmetic on two cores: the floor is arithmetic, at the rate that one tile of the
kernel sustains in cache on a Zen 5 core (220 GFLOP/s in float32, 460 on bfloat16 pairs).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import pytest
import torch
import torch.nn.functional as F
from conftest import Show
from original_autoformer import HEAD_DIM, MAX_RELATIVE_POSITION, AttentionSuper
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from lswag_fast.ops.relative_attention import relative_attention, relative_attention_torch

SAMPLES, TOKENS, GRID = 16, 197, (14, 14)
TILE_GFLOPS = {"float32": 220, "bfloat16": 460}
TABLE_ROWS = 2 * MAX_RELATIVE_POSITION + 2
PASSES = ("forward", "forward and backward", "the same with the tables' gradients")
HEADS = ("", "ms", "GF/s", "share of the floor", "x published", "x no positions", "x published, processor time")

Attention = Callable[[Tensor, list[Tensor]], Tensor]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [3, 4])
def test_autoformer_tiny(
    benchmark: BenchmarkFixture, device: str, threads: int, rounds: int, show: Show, heads: int, dtype: str
) -> None:
    if device != "cpu":
        pytest.skip("relative attention has CPU kernels only")
    methods = _methods(heads, getattr(torch, dtype))
    timed = {
        which: measure.Rounds({name: _pass(which, method, heads, dtype) for name, method in methods.items()}, device)
        for which in PASSES
    }
    benchmark.pedantic(lambda: [in_turn() for in_turn in timed.values()], rounds=rounds, warmup_rounds=1)
    found: dict[str, Any] = {}
    for which, in_turn in timed.items():
        plain, published = in_turn.summary("no positions"), in_turn.summary("published")
        for name, row in published.items():
            gflops = _flop(which, heads) / row["fastest_seconds"] / 1e9
            found[f"{which}: {name}"] = {
                **row,
                "gflops": gflops,
                "share_of_floor": gflops / (TILE_GFLOPS[dtype] * threads),
                "ratio_to_no_positions": plain[name]["ratio"],
            }
    benchmark.extra_info.update(found)
    facts = {"samples": SAMPLES, "tokens": TOKENS, "heads": heads, "threads": threads, "methods": found}
    path = measure.write(device, f"relative-attention-{heads}-heads-{dtype}", facts)
    columns = ("share_of_floor", "ratio", "ratio_to_no_positions", "ratio_of_processor_time")
    rows = [
        (name, f"{row['fastest_seconds'] * 1e3:.2f}", f"{row['gflops']:.0f}", *(f"{row[c]:.2f}" for c in columns))
        for name, row in found.items()
    ]
    show(f"S = {SAMPLES}, {heads} heads, {dtype}, {threads} threads, {path.name}", HEADS, rows)


def _flop(which: str, heads: int) -> int:
    products, table_steps = {PASSES[0]: (2, 2), PASSES[1]: (7, 5), PASSES[2]: (7, 7)}[which]
    patches = TOKENS - 1
    return 2 * SAMPLES * heads * HEAD_DIM * (products * TOKENS**2 + table_steps * sum(GRID) * patches)


def _methods(heads: int, dtype: torch.dtype) -> dict[str, Attention]:
    published = AttentionSuper(HEAD_DIM * heads, heads).to(dtype)
    published.qkv = published.proj = nn.Identity()
    names = [f"rel_pos_embed_{kind}.embeddings_table_{way}" for kind in "kv" for way in "vh"]

    def original(qkv: Tensor, tables: list[Tensor]) -> Tensor:
        parameters = dict(zip(names, tables, strict=True))
        out: Tensor = torch.func.functional_call(published, parameters, (qkv,))
        return out

    def ours(op: Callable[..., Tensor], qkv: Tensor, tables: list[Tensor]) -> Tensor:
        return op(qkv, tuple(tables[:2]), tuple(tables[2:]), heads=heads, grid=GRID)

    def no_positions(qkv: Tensor, tables: list[Tensor]) -> Tensor:
        q, k, v = qkv.view(SAMPLES, TOKENS, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return {
        "native": partial(ours, relative_attention),
        "twin": partial(ours, relative_attention_torch),
        "published": original,
        "no positions": no_positions,
    }


def _pass(which: str, attention: Attention, heads: int, dtype: str) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(SAMPLES, TOKENS, 3 * heads * HEAD_DIM, generator=generator).to(getattr(torch, dtype))
    tables = [torch.randn(TABLE_ROWS, HEAD_DIM, generator=generator).to(qkv.dtype) * 0.02 for _ in range(4)]
    grad_out = torch.randn(SAMPLES, TOKENS, heads * HEAD_DIM, generator=generator).to(qkv.dtype)
    if which == PASSES[0]:
        return lambda: attention(qkv, tables)
    leaves = [t.requires_grad_() for t in ([qkv, *tables] if which == PASSES[2] else [qkv])]
    return lambda: torch.autograd.grad(attention(qkv, tables), leaves, grad_out, allow_unused=True)
