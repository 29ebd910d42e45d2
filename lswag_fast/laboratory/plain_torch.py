"""Reads published `.pth` files that hold plain values, without ever running the code that a pickle may name."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError

_NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1")


class _NumberType:
    """What stands for numpy.dtype while a file is read: the types of numbers, and nothing else."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _NUMBERS:
            raise pickle.UnpicklingError(f"a numpy value of type {code!r}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.code = f"{order if order in ('<', '>') else '='}{self.code}"


def _number(kind: _NumberType, data: bytes) -> Any:
    return np.frombuffer(data, dtype=kind.code)[0].item()


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def load(path: Path) -> Any:
    """Returns the containers, texts, numbers (numpy's too, as Python's) and tensors of a file that torch.save wrote.

    Raises InputError where the file holds anything else, or cannot be read; nothing that it names is imported or run.
    """
    try:
        # torch warns of pickles that it did not write itself; what cannot be read is told below.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than plain values and tensors, and is not read: loading it could run code "
            f"({_first_line(error)}). Convert it, where you trust it, to JSON lines with an arch and accuracies each"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is no file that torch.save wrote, or it is damaged ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "numpy value" in line]
    return (named or lines or [type(error).__name__])[0][:200]
