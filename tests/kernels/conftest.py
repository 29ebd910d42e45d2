"""Triton kernels run on a GPU where there is one; elsewhere they are interpreted, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run, with Triton preferred there."""
    pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")
    monkeypatch.setenv("LSWAG_BACKEND", "triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    _mend_interpreter(monkeypatch)
    return torch.device("cpu")


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops take Triton on any device."""
    monkeypatch.setenv("LSWAG_BACKEND", "triton")


@pytest.fixture
def poisoned():
    """A context in which every tensor that torch allocates without a value is full of NaN."""

    @contextmanager
    def context() -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.utils.deterministic.fill_uninitialized_memory
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    return context


def _mend_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter of Triton 3.6 take loop bounds from tensors under NumPy 2.4.

    NumPy no longer turns an array of one element into an int, which is how the interpreter holds scalars.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
