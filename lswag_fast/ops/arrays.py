"""Tensors and DLPack arrays as the native kernels can read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError


def as_tensor(array: Any, name: str) -> Tensor:
    """Returns a tensor or DLPack array as a detached strided tensor whose memory holds its values.

    It shares that memory, but for NumPy arrays with negative strides or without permission to write, which torch cannot
    import, and tensors that are lazily negated or conjugated: those are copied.

    Raises:
        InputError: no array, one that torch cannot import (another byte order), or a sparse or other opaque layout.
    """
    tensor = array if isinstance(array, Tensor) else _imported(array, name)
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise InputError(f"{name} must be a dense strided tensor, got layout {layout}; call .to_dense() first")
    if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor


@contextmanager
def refusals() -> Iterator[None]:
    """Raises as InputError what the kernels refuse to read: a fake tensor, which has no memory."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _imported(array: Any, name: str) -> Tensor:
    if not hasattr(array, "__dlpack__"):
        raise InputError(f"{name} must be a tensor or a DLPack array, got {type(array).__name__}")
    if isinstance(array, np.ndarray):
        array = _importable(array, name)
    try:
        imported: Tensor = torch.utils.dlpack.from_dlpack(array)
        return imported
    except (AttributeError, TypeError, ValueError, BufferError, RuntimeError) as error:
        raise InputError(f"{name} must be a tensor or a DLPack array that torch imports: {error}") from error


def _importable(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    if not array.dtype.isnative:
        raise InputError(f"{name} must be in this machine's byte order, got {array.dtype}; call .astype() first")
    # from_dlpack ends the process on a negative stride.
    if array.flags.writeable and all(stride >= 0 for stride in array.strides):
        return array
    return array.copy(order="C")
