"""Backward pass of GELU and of the other activations that scores count, one pass over memory.

Reads the gradient and the saved tensor and writes one: 3 * 2 bytes an element in 16 bits. AutoFormer-Tiny at S = 64,
12,608 rows of 960: 73 MB, at 4.3 TB/s a floor of 17 us a layer. Some 30 operations an element for the error function,
two thirds of that time, run beside it. A program has 1024 elements on 4 warps, 8 a thread: 16 bytes a load in 16 bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import Empty, empty_like
from .arithmetic import narrow
from .launch import MOST_LAUNCHES, Launch
from .variant import Variant

KINDS = ("relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish")
BLOCK = 1024


@triton.jit
def slope(x, KIND: tl.constexpr):
    """Returns the derivative of the activation at `x`, float32; of relu also from its result."""
    if KIND == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif KIND == "relu6":
        return tl.where((x > 0) & (x < 6), 1.0, 0.0)
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * density
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh u) is the logistic function of 2 u.
        upper = tl.sigmoid(x * (1.5957691216057308 + 0.0713548162726 * x * x))
        return upper + x * upper * (1 - upper) * (1.5957691216057308 + 0.2140644488178 * x * x)
    elif KIND == "silu":
        upper = tl.sigmoid(x)
        return upper + x * upper * (1 - upper)
    else:
        tl.static_assert(KIND == "hardswish")
        return tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, x / 3 + 0.5))


@triton.jit
def backward_kernel(gradient, saved, result, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Writes `result` [count] = `gradient` times the derivative at `saved`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(saved + place, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, narrow(d * slope(x, KIND), result.dtype.element_ty), mask=inside)


def backward(gradient: Tensor, saved: Tensor, kind: str, empty: Empty = torch.empty) -> Tensor:
    """Returns the gradient at the input of an activation, in the layout of `saved`.

    `saved` is the input (of relu its result will do), dense in some order of its axes, `gradient` of the same strides
    and dtype.
    """
    result = empty_like(saved, empty)
    count = saved.numel()
    if count:
        _launch(count, kind, saved.dtype, saved.device)(gradient, saved, result)
    return result


@lru_cache(MOST_LAUNCHES)
def _launch(count: int, kind: str, _dtype: torch.dtype, device: torch.device) -> Launch:
    arguments = {"count": count, "KIND": kind, "BLOCK": BLOCK}
    return Launch(backward_kernel, device, arguments, triton.cdiv(count, BLOCK))


def variants() -> Iterator[Variant]:
    """Every activation in bfloat16, GELU in every dtype."""
    for name in ("bf16", "fp16", "fp32"):
        for kind in KINDS if name == "bf16" else ("gelu",):
            yield Variant(
                name=f"gelu backward {name} {kind}",
                kernel=backward_kernel,
                types={**dict.fromkeys(("gradient", "saved", "result"), f"*{name}:16"), "count": "i32:16"},
                constants={"KIND": kind, "BLOCK": BLOCK},
                warps=4,
                stages=1,
            )
