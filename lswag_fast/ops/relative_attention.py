"""Attention with AutoFormer's 2-D relative positions on keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .. import backends
from ..errors import InputError
from ..memory import Empty
from .arrays import as_tensor, refusals

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relative_attention(
    qkv: Tensor,  # [S, T, 3*H*D]
    key_tables: tuple[Tensor, Tensor],  # vertical, horizontal: [2*L+2, D] each
    value_tables: tuple[Tensor, Tensor],  # vertical, horizontal: [2*L+2, D] each
    *,
    heads: int,
    grid: tuple[int, int],
    scale: float | None = None,
) -> Tensor:  # [S, T, H*D]
    """Self-attention of a class token and a grid of patches, with relative positions on keys and values.

    `out_i = sum_j p_ij (v_j + r_V[i, j])` with `p = softmax_j(scale * (q_i . k_j + q_i . r_K[i, j]))` in each head,
    where `r[i, j] = vertical[iv] + horizontal[ih]`. Both indices are 0 where i or j is the class token; elsewhere
    `iv = L + 1 + clip(row_j - row_i, -L, L)`, and `ih` is the same of columns.

    No T x T x D tensor is built: what the tables add to the scores of a query at row r is a slice of its products
    with the 2L+2 table rows, and what they add to its output is the probabilities summed over each row and each column
    of the key grid, times the tables. The gradient recomputes the probabilities from two numbers a query.

    Args:
        qkv: Queries, keys and values of `T = 1 + rows * columns` tokens, the class token first, head-major in each
            third. Float32, bfloat16 and float16 run natively. On the CPU bfloat16 multiplies bfloat16 pairs where the
            processor has such instructions (sums, softmax float32), and float16 computes in float32. On a CUDA device
            both are multiplied as they are and float32 as IEEE float32; D = 64, grids up to 31 x 31 and L from 1 to 15
            run there, read in place where rows are contiguous. Others take `relative_attention_torch`.
        key_tables: Vertical and horizontal table of the keys, read in the dtype of `qkv`; index 0 is the class token.
        value_tables: The same of the values.
        heads: H.
        grid: Rows and columns of patches.
        scale: Factor of the scores, above 0; `D ** -0.5` where None.

    Returns:
        The heads side by side, in the dtype of `qkv`; differentiable once in `qkv` and in every table. Same input,
        same bits, whatever the number of threads.

    Raises:
        InputError: Shapes, devices or dtypes that do not fit each other, or a scale that is not above 0.

    Source: AutoFormer (Chen et al., ICCV 2021), section 3.1, after Shaw et al. (2018), eq. 3 and 4.
    """
    tensors = (qkv, *key_tables, *value_tables)
    if has_torch_function(tensors):
        result: Tensor = handle_torch_function(
            relative_attention, tensors, qkv, key_tables, value_tables, heads=heads, grid=grid, scale=scale
        )
        return result
    _check(qkv, key_tables, value_tables, heads, grid, scale)
    function = _native(qkv, [*key_tables, *value_tables], heads, grid)
    if function is None:
        return relative_attention_torch(qkv, key_tables, value_tables, heads=heads, grid=grid, scale=scale)
    factor = _head_dim(qkv, heads) ** -0.5 if scale is None else float(scale)
    tables = [table.to(qkv.dtype) for table in tensors[1:]]
    output: Tensor = function.apply(qkv, *tables, (heads, *grid), factor)  # type: ignore[no-untyped-call]
    return output


@dataclass(frozen=True)
class RelativeAttention:
    """`relative_attention` with what its gradient in `qkv` needs; where it runs natively no graph is kept."""

    output: Tensor  # [S, T, H*D]
    _gradient: Callable[[Tensor, Empty], Tensor]

    @staticmethod
    def of(
        qkv: Tensor,
        key_tables: tuple[Tensor, Tensor],
        value_tables: tuple[Tensor, Tensor],
        *,
        heads: int,
        grid: tuple[int, int],
        empty: Empty = torch.empty,
    ) -> RelativeAttention:
        """Takes contiguous tables in the dtype of `qkv`; else as `relative_attention`, with its errors.

        Where it runs natively, results are put in `empty`.
        """
        tables = [*key_tables, *value_tables]
        _check(qkv, key_tables, value_tables, heads, grid, None)
        function = _native(qkv, tables, heads, grid)
        if function is None:
            return _of_graph(qkv, key_tables, value_tables, heads, grid)
        scale = _head_dim(qkv, heads) ** -0.5
        if function is _TritonRelativeAttention:
            return _of_kernels(qkv, tables, heads, grid, scale, empty)
        layout = (heads, *grid)
        qkv = qkv.contiguous()
        output, softmax = _forward(qkv, tables, layout, scale, empty)
        gradient = partial(_backward, qkv, softmax, tables, layout, scale, of_tables=False)
        return RelativeAttention(output, lambda grad_output, empty: gradient(grad_output, empty=empty)[0])

    def backward(self, grad_output: Tensor, *, empty: Empty = torch.empty) -> Tensor:
        """Returns the gradient at `qkv`, from that at `output`."""
        return self._gradient(grad_output, empty)


def relative_attention_torch(
    qkv: Tensor,
    key_tables: tuple[Tensor, Tensor],
    value_tables: tuple[Tensor, Tensor],
    *,
    heads: int,
    grid: tuple[int, int],
    scale: float | None = None,
) -> Tensor:
    """`relative_attention` in plain differentiable torch, on any device and dtype; same arguments and errors."""
    _check(qkv, key_tables, value_tables, heads, grid, scale)
    samples, tokens, _ = qkv.shape
    head_dim = _head_dim(qkv, heads)
    q, k, v = qkv.reshape(samples, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    key_class, key_rows, key_columns = _relative(key_tables, grid, qkv)
    value_class, value_rows, value_columns = _relative(value_tables, grid, qkv)

    q_grid = q[:, :, 1:].unflatten(2, grid)
    by_row = torch.einsum("shrcd,rbd->shrcb", q_grid, key_rows)
    by_column = torch.einsum("shrcd,ced->shrce", q_grid, key_columns)
    of_patches = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).reshape(samples, heads, tokens - 1, tokens - 1)
    of_class = (q @ key_class).unsqueeze(-1)
    bias = torch.cat(
        (of_class[:, :, :1].expand(-1, -1, 1, tokens), torch.cat((of_class[:, :, 1:], of_patches), -1)), dim=2
    )
    factor = head_dim**-0.5 if scale is None else scale
    p = ((q @ k.transpose(-2, -1) + bias) * factor).softmax(-1)

    p_grid = p[:, :, 1:, 1:].unflatten(3, grid).unflatten(2, grid)
    moved = torch.einsum("shrcb,rbd->shrcd", p_grid.sum(-1), value_rows)
    moved = moved + torch.einsum("shrce,ced->shrcd", p_grid.sum(-2), value_columns)
    to_class = torch.cat((p[:, :, :1].sum(-1, keepdim=True), p[:, :, 1:, :1]), dim=2)
    out = p @ v + to_class * value_class + F.pad(moved.flatten(2, 3), (0, 0, 1, 0))
    output: Tensor = out.transpose(1, 2).reshape(samples, tokens, heads * head_dim)
    return output


def multiply_adds(samples: int, tokens: int, heads: int, head_dim: int, table_rows: int) -> int:
    """Multiply-adds of one forward pass: both attention products, and queries and sums with `table_rows` rows a table.

    `table_rows` is 2*L+2, the rows of one of the four tables.
    """
    return samples * (2 * tokens * tokens + 4 * table_rows * tokens) * heads * head_dim


def _relative(tables: tuple[Tensor, Tensor], grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the entry of the class token [D], and [n, n, D] from each to each row, and the same of columns."""
    spread = []
    for table, n in zip(tables, grid, strict=True):
        reach = table.shape[0] // 2 - 1
        place = torch.arange(n, device=table.device)
        index = (place[None, :] - place[:, None]).clamp(-reach, reach) + reach + 1
        spread.append(table.to(like.dtype)[index])
    of_class = (tables[0][0] + tables[1][0]).to(like.dtype)
    return of_class, spread[0], spread[1]


def _native(
    qkv: Tensor, tables: list[Tensor], heads: int, grid: tuple[int, int]
) -> type[torch.autograd.Function] | None:
    """Returns the function that runs these natively; None where only plain torch can."""
    if qkv.dtype not in _NATIVE_DTYPES or torch._C._are_functorch_transforms_active():
        return None
    if qkv.is_meta:
        return _RelativeAttention
    implementation = backends.implementation("relative_attention", qkv.device.type)
    if implementation == "triton":
        from ..kernels import relative_attention as kernel

        return _TritonRelativeAttention if kernel.fits(qkv, tables, heads, grid) else None
    return _RelativeAttention if implementation == "cpp" else None


def _head_dim(qkv: Tensor, heads: int) -> int:
    return qkv.shape[2] // (3 * heads)


def _check(
    qkv: Tensor,
    key_tables: tuple[Tensor, Tensor],
    value_tables: tuple[Tensor, Tensor],
    heads: int,
    grid: tuple[int, int],
    scale: float | None,
) -> None:
    if not qkv.is_floating_point():
        raise InputError(f"expected qkv of a floating dtype, got {qkv.dtype}; convert it first")
    if heads < 1 or len(grid) != 2 or min(grid) < 1:
        raise InputError(f"expected heads >= 1 and a grid of (rows, columns) >= 1, got heads = {heads}, grid = {grid}")
    tokens = 1 + grid[0] * grid[1]
    if qkv.dim() != 3 or qkv.shape[1] != tokens:
        got = f"T = {qkv.shape[1]}" if qkv.dim() == 3 else f"shape {list(qkv.shape)}"
        raise InputError(f"expected qkv [S, T, 3*H*D] with T = 1 + {grid[0]}*{grid[1]} = {tokens} tokens, got {got}")
    if qkv.shape[2] == 0 or qkv.shape[2] % (3 * heads):
        raise InputError(
            f"expected qkv [S, T, 3*H*D] whose last size divides by 3*H = {3 * heads}, got {qkv.shape[2]}; "
            f"pass the heads that made qkv"
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise InputError(f"scale must be above 0 and finite, got {scale}; pass None for D ** -0.5")
    for name, tables in (("key_tables", key_tables), ("value_tables", value_tables)):
        _check_tables(name, tables, _head_dim(qkv, heads), qkv.device)


def _check_tables(name: str, tables: tuple[Tensor, Tensor], head_dim: int, device: torch.device) -> None:
    if len(tables) != 2:
        raise InputError(f"expected {name} = (vertical, horizontal), got {len(tables)} tables")
    for direction, table in zip(("vertical", "horizontal"), tables, strict=True):
        good = table.dim() == 2 and table.shape[0] >= 2 and table.shape[0] % 2 == 0 and table.shape[1] == head_dim
        if not good or not table.is_floating_point():
            raise InputError(
                f"expected the {direction} table of {name} as floating [2*L+2, D] with D = {head_dim}, "
                f"got {table.dtype} {list(table.shape)}"
            )
        if table.device != device:
            raise InputError(f"expected {name} on the device of qkv ({device}), got {table.device}; move them there")


def _of_graph(
    qkv: Tensor,
    key_tables: tuple[Tensor, Tensor],
    value_tables: tuple[Tensor, Tensor],
    heads: int,
    grid: tuple[int, int],
) -> RelativeAttention:
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        output = relative_attention_torch(leaf, key_tables, value_tables, heads=heads, grid=grid)

    def gradient(grad: Tensor, _: Empty) -> Tensor:
        return torch.autograd.grad(output, leaf, grad, retain_graph=True)[0]

    return RelativeAttention(output.detach(), gradient)


def _of_kernels(
    qkv: Tensor, tables: list[Tensor], heads: int, grid: tuple[int, int], scale: float, empty: Empty
) -> RelativeAttention:
    from ..kernels import relative_attention as kernel
    from ..kernels.relative_attention_backward import backward

    qkv = kernel.rows_apart(qkv)
    output, softmax = kernel.forward(qkv, tables, heads, grid, scale, empty)

    def gradient(grad_output: Tensor, empty: Empty) -> Tensor:
        grad_output = grad_output.contiguous()
        grad_qkv, _ = backward(qkv, tables, heads, grid, scale, output, softmax, grad_output, (True, False), empty)
        assert grad_qkv is not None
        return grad_qkv

    return RelativeAttention(output, gradient)


def _forward(
    qkv: Tensor,
    tables: list[Tensor],
    layout: tuple[int, int, int],
    scale: float,
    empty: Empty = torch.empty,
) -> tuple[Tensor, Tensor]:
    """Returns the output and what the gradient needs of the softmax, by the kernels in C++; on meta their shapes."""
    samples, tokens, width = qkv.shape
    out = empty((samples, tokens, width // 3), dtype=qkv.dtype, device=qkv.device)
    softmax = empty((samples, layout[0], tokens, 2), dtype=torch.float32, device=qkv.device)
    if qkv.device.type == "cpu" and samples > 0:
        from .. import _C

        threads = torch.get_num_threads()
        with refusals():
            size = _C.relative_attention_forward_bytes(qkv, tables, layout, threads)
            workspace = torch.empty(size, dtype=torch.uint8)
            _C.relative_attention_forward(qkv, tables, layout, scale, threads, out, softmax, workspace)
    return out, softmax


def _backward(
    qkv: Tensor,
    softmax: Tensor,
    tables: list[Tensor],
    layout: tuple[int, int, int],
    scale: float,
    grad_out: Tensor,
    *,
    of_tables: bool,
    empty: Empty = torch.empty,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradient of `qkv`, and where asked those of the tables, by the kernels in C++."""
    grad_qkv = empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad_tables = [torch.zeros_like(table) for table in tables] if of_tables else []
    if qkv.device.type == "cpu" and qkv.shape[0] > 0:
        from .. import _C

        threads = torch.get_num_threads()
        size = _C.relative_attention_backward_bytes(qkv, tables, layout, threads, of_tables)
        workspace = torch.empty(size, dtype=torch.uint8)
        grad_out = as_tensor(grad_out, "grad_out").contiguous()
        _C.relative_attention_backward(
            qkv, tables, layout, scale, threads, softmax, grad_out, grad_qkv, grad_tables, workspace
        )
    return grad_qkv, grad_tables


class _RelativeAttention(torch.autograd.Function):
    """The kernels in C++; on the meta device only their shapes."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        key_vertical: Tensor,
        key_horizontal: Tensor,
        value_vertical: Tensor,
        value_horizontal: Tensor,
        layout: tuple[int, int, int],
        scale: float,
    ) -> Tensor:
        qkv, *tables = (
            as_tensor(t, "qkv and tables").contiguous()
            for t in (qkv, key_vertical, key_horizontal, value_vertical, value_horizontal)
        )
        out, softmax = _forward(qkv, tables, layout, scale)
        ctx.save_for_backward(qkv, softmax, *tables)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, softmax, *tables = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:5]
        grad_qkv, grad_tables = _backward(qkv, softmax, tables, ctx.layout, ctx.scale, grad_out, of_tables=any(wanted))
        kept = [g if w else None for g, w in zip(grad_tables, wanted, strict=True)] if grad_tables else [None] * 4
        return grad_qkv, *kept, None, None


class _TritonRelativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        key_vertical: Tensor,
        key_horizontal: Tensor,
        value_vertical: Tensor,
        value_horizontal: Tensor,
        layout: tuple[int, int, int],
        scale: float,
    ) -> Tensor:
        from ..kernels import relative_attention as kernel

        qkv = kernel.rows_apart(as_tensor(qkv, "qkv"))
        tables = [
            as_tensor(t, "tables").contiguous()
            for t in (key_vertical, key_horizontal, value_vertical, value_horizontal)
        ]
        ctx.heads, ctx.grid, ctx.scale = layout[0], layout[1:], scale
        out, softmax = kernel.forward(qkv, tables, ctx.heads, ctx.grid, scale)
        ctx.save_for_backward(qkv, out, softmax, *tables)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        from ..kernels import relative_attention_backward as kernel

        qkv, out, softmax, *tables = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:5]
        grad_qkv, grad_tables = kernel.backward(
            qkv,
            tables,
            ctx.heads,
            ctx.grid,
            ctx.scale,
            out,
            softmax,
            as_tensor(grad_out, "grad_out").contiguous(),
            (ctx.needs_input_grad[0], any(wanted)),
        )
        kept = [g if w else None for g, w in zip(grad_tables, wanted, strict=True)] if grad_tables else [None] * 4
        return grad_qkv, *kept, None, None
