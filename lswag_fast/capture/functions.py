"""The torch functions that capture looks at, and the canonical form of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import relative_attention as attention_op


class Kind(Enum):
    """What a function is to capture."""

    LINEAR = auto()  # linear(x, W, b)
    MATMUL = auto()  # a product of two tensors, either of which may be the weight
    CONVOLUTION = auto()  # conv1d and conv2d
    PRODUCT = auto()  # products that only the slow path covers
    ACTIVATION = auto()
    BATCH_NORM = auto()
    ATTENTION = auto()  # no weights of its own; counted in multiply-adds
    COMPOSITE = auto()  # a Python function whose body is run under capture
    LAYER_NORM = auto()  # looked at on the meta device only, where torch takes long for its shape


_ACTIVATIONS: dict[str, list[Callable[..., Any]]] = {
    "relu": [F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_],
    "relu6": [F.relu6, F.hardtanh],  # nn.ReLU6 calls hardtanh with the limits 0 and 6
    "gelu": [F.gelu],
    "silu": [F.silu],
    "hardswish": [F.hardswish],
}

_MATMULS = [torch.matmul, torch.mm, torch.addmm, Tensor.matmul, Tensor.mm, Tensor.addmm]
_MATMULS += [Tensor.__matmul__, Tensor.__rmatmul__]
_PRODUCTS = [torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm, torch.addbmm, Tensor.addbmm]
_PRODUCTS += [torch.mv, Tensor.mv, torch.addmv, Tensor.addmv, torch.inner, Tensor.inner]
_PRODUCTS += [torch.einsum, torch.tensordot, torch.chain_matmul, torch.linalg.multi_dot, F.bilinear, torch.bilinear]
_PRODUCTS += [Tensor.addmm_, Tensor.baddbmm_, Tensor.addbmm_, Tensor.addmv_]
_RECURRENT = [torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu]
_RECURRENT += [torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell]
_PRODUCTS += _RECURRENT
_PRODUCTS += [torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d]

KINDS: dict[Any, Kind] = {
    F.linear: Kind.LINEAR,
    **dict.fromkeys(_MATMULS, Kind.MATMUL),
    **dict.fromkeys([torch.conv1d, torch.conv2d], Kind.CONVOLUTION),
    **dict.fromkeys(_PRODUCTS, Kind.PRODUCT),
    **dict.fromkeys([f for functions in _ACTIVATIONS.values() for f in functions], Kind.ACTIVATION),
    **dict.fromkeys([F.batch_norm, torch.batch_norm], Kind.BATCH_NORM),
    **dict.fromkeys([F.layer_norm, torch.layer_norm], Kind.LAYER_NORM),
    **dict.fromkeys([F.scaled_dot_product_attention, attention_op.relative_attention], Kind.ATTENTION),
    F.multi_head_attention_forward: Kind.COMPOSITE,
}
"""Every function that is looked at; all others run as they are."""

UNPLANNED = (None, Kind.BATCH_NORM, Kind.LAYER_NORM)
"""Kinds of calls that a plan does not list."""

_NAMES = {function: name for name, functions in _ACTIVATIONS.items() for function in functions}


@dataclass(frozen=True)
class Product:
    """A product in the form y = linear(x, weight, bias), and how the call's own result is had from y."""

    x: Tensor  # [..., I]
    weight: Tensor  # [O, I]
    bias: Tensor | None
    transposed: bool  # the call's result is y with its last two axes exchanged


def kind_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind | None:
    """Returns what a call is to capture; None where it runs as it is."""
    if func is F.hardtanh:
        limits = _bind(("input", "min_val", "max_val"), (None, -1.0, 1.0), args, kwargs)[1:]
        return Kind.ACTIVATION if limits == [0, 6] else None
    return KINDS.get(func)


def linear_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product:
    """Returns the operands of a call of linear(input, weight, bias=None)."""
    x, weight, bias = _bind(("input", "weight", "bias"), (None, None, None), args, kwargs)
    return Product(x, weight, bias, False)


def matmul_operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (left, right, addend) of a matrix product; the addend is that of addmm."""
    if func in (torch.addmm, Tensor.addmm):
        addend, left, right = _bind(("input", "mat1", "mat2"), (None, None, None), args, kwargs)
        return left, right, addend
    if func is Tensor.__rmatmul__:
        return args[1], args[0], None
    tensors = [*args, *(kwargs[k] for k in ("input", "other", "mat2", "tensor2") if k in kwargs)]
    return tensors[0], tensors[1], None


def as_linear(left: Tensor, right: Tensor, addend: Tensor | None, weight_on_right: bool) -> Product | None:
    """Returns left @ right (+ addend) as a linear map with the weight on the side named; None where it is not one."""
    if weight_on_right:
        if right.dim() != 2 or left.dim() < 2 or (addend is not None and addend.dim() != 1):
            return None
        return Product(left, right.t(), addend, False)
    if left.dim() != 2 or right.dim() < 2 or addend is not None:
        return None
    return Product(right.transpose(-1, -2), left, None, True)


@dataclass(frozen=True)
class ConvolutionCall:
    """The operands of conv1d or conv2d, per-dimension settings as tuples of the weight's own length (1 or 2)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    symmetric: bool  # "same" with an even kernel pads one side more


def convolution_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvolutionCall:
    """Returns the operands of a call of conv1d or conv2d."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _bind(names, (None, None, None, 1, 0, 1, 1), args, kwargs)
    dims = weight.dim() - 2
    dilation = _per_dimension(dilation, dims)
    symmetric = True
    if padding == "same":
        both_sides = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        symmetric = all(n % 2 == 0 for n in both_sides)
        padding = tuple(n // 2 for n in both_sides)
    elif padding == "valid":
        padding = 0
    return ConvolutionCall(
        x, weight, bias, _per_dimension(stride, dims), _per_dimension(padding, dims), dilation, groups, symmetric
    )


def input_of(kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weight_on_right: bool) -> Tensor:
    """Returns the input [..., I] or [S, C, ...] of a product, or the pre-activation, of a call that a plan follows."""
    if kind is Kind.LINEAR:
        return linear_arguments(args, kwargs).x
    if kind is Kind.CONVOLUTION:
        return convolution_arguments(args, kwargs).x
    if kind is Kind.ACTIVATION:
        return activation_kind(func, args, kwargs)[1]
    left, right, _ = matmul_operands(func, args, kwargs)
    return left if weight_on_right else right.transpose(-1, -2)


def activation_kind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Tensor, bool]:
    """Returns (kind, pre-activation, in place) of a call of an activation function."""
    name = _NAMES[func]
    x = args[0] if args else kwargs["input"]
    if func is F.gelu:
        approximate = args[1] if len(args) > 1 else kwargs.get("approximate", "none")
        return ("gelu_tanh" if approximate == "tanh" else "gelu"), x, False
    at = 3 if func is F.hardtanh else 1
    inplace = bool(args[at] if len(args) > at else kwargs.get("inplace", False))
    return name, x, inplace or func in (F.relu_, torch.relu_, Tensor.relu_)


def batch_norm_uses_batch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether a batch_norm call normalises by the statistics of its batch."""
    return bool(batch_norm_arguments(func, args, kwargs)[-1])


def batch_norm_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Returns input, weight, bias, running mean and variance, and whether it trains, of a batch_norm call."""
    if func is torch.batch_norm:
        names = ("input", "weight", "bias", "running_mean", "running_var", "training")
        return _bind(names, (None, None, None, None, None, False), args, kwargs)
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    x, mean, variance, weight, bias, training = _bind(names, (None, None, None, None, None, False), args, kwargs)
    return [x, weight, bias, mean, variance, training]


def multiply_adds(kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Returns the multiply-adds of one call with result `out`; 0 for functions that multiply no matrices."""
    if kind is Kind.LINEAR:
        return int(out.numel() * linear_arguments(args, kwargs).weight.shape[1])
    if kind is Kind.MATMUL:
        return int(out.numel() * matmul_operands(func, args, kwargs)[0].shape[-1])
    if kind is Kind.CONVOLUTION:
        return int(out.numel() * convolution_arguments(args, kwargs).weight[0].numel())
    if kind is Kind.ATTENTION:
        if func is attention_op.relative_attention:
            return _relative_attention_multiply_adds(*args, **kwargs)
        query, key, value = _bind(("query", "key", "value"), (None, None, None), args, kwargs)
        return int(query.numel() * key.shape[-2] + query.shape[:-1].numel() * key.shape[-2] * value.shape[-1])
    if kind is Kind.PRODUCT:
        return _product_multiply_adds(func, args, kwargs, out)
    return 0


def run_body(func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs the body of a Python function of torch past its own check for an active function mode."""
    # A function of torch that finds a mode active hands the call back to the mode; its body, with that one check
    # answered "no", calls the functions inside it under the mode.
    body = FunctionType(
        func.__code__,
        {**func.__globals__, "has_torch_function": lambda _: False},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body(*args, **kwargs)


def _relative_attention_multiply_adds(
    qkv: Tensor, key_tables: tuple[Tensor, Tensor], *_: Any, heads: int, **__: Any
) -> int:
    samples, tokens, width = qkv.shape
    return samples * attention_op.multiply_adds(1, tokens, heads, width // (3 * heads), key_tables[0].shape[0])


def _product_multiply_adds(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> int:
    operands = tensors_in((args, kwargs))
    if func is torch.einsum and isinstance(args[0], str) and "." not in args[0]:
        terms = args[0].replace(" ", "").split("->")[0].split(",")
        sizes = {
            letter: n
            for term, operand in zip(terms, operands, strict=True)
            for letter, n in zip(term, operand.shape, strict=True)
        }
        total = 1
        for n in sizes.values():
            total *= n
        return total
    name = getattr(func, "__name__", "")
    if name.startswith("conv_transpose"):
        return operands[0].numel() * operands[1][0].numel()
    if name.startswith("conv"):
        return out.numel() * operands[1][0].numel()
    if func in _RECURRENT:
        # Every weight meets every step of every sample once; the input has no axis but these and its channels.
        steps = operands[0].numel() // operands[0].shape[-1]
        return steps * sum(t.numel() for t in tensors_in(args[2:]) if t.dim() == 2)
    if name == "bilinear":
        return out.numel() * operands[0].shape[-1] * operands[1].shape[-1]
    left = operands[-2] if len(operands) > 1 else operands[0]
    return out.numel() * left.shape[-1]


def tensors_in(values: Any) -> list[Tensor]:
    """Returns the tensors of a nest of tuples, lists and dictionaries, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return [t for value in values for t in tensors_in(value)]
    return []


def _bind(
    names: tuple[str, ...], defaults: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    positional = list(args[: len(names)])
    return positional + [kwargs.get(n, d) for n, d in zip(names[len(args) :], defaults[len(args) :], strict=True)]


def _per_dimension(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * (dims if len(value) == 1 else 1)
