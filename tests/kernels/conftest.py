"""Kernels are tested on the CUDA device where there is one, elsewhere in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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
