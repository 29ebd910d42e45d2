"""Rounding and matrix products as kernels write them, right also where Triton's interpreter is not.

The interpreter (Triton 3.6) multiplies the bit patterns of bfloat16 operands as if they were integers, and cuts float32
to bfloat16 instead of rounding it. On a GPU both functions are the plain operation.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Returns float32 `x` rounded to the nearest value of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def multiply(a, b, sum):
    """Returns `sum` + `a` @ `b` in float32; float32 operands are multiplied as IEEE float32, without TF32.

    Those are cut along their common axis until 16 of it are left: each thread of a product without tensor cores
    loads all of that axis at once, 8 registers an element of it.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="ieee")
    elif a.dtype == tl.float32 and a.shape[1] > 16:
        left = tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))
        right = tl.split(tl.reshape(tl.trans(b), [b.shape[1], b.shape[0] // 2, 2]))
        sum = multiply(left[0], tl.trans(right[0]), sum)
        return multiply(left[1], tl.trans(right[1]), sum)
    else:
        return tl.dot(a, b, sum, input_precision="ieee")
