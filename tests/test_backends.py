from __future__ import annotations

import pytest
import torch

from lswag_fast import _C, backends
from lswag_fast.errors import InputError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LSWAG_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_device_has_its_own_kernels() -> None:
    assert backends.implementation("gradient_moments", "cpu") == "cpp"
    assert backends.implementation("gradient_moments", "cuda") == "triton"
    assert backends.implementation("activation_patterns", "cuda") == "cuda"
    assert backends.implementation("layer_norm", "cpu") == "torch"
    assert backends.implementation("layer_norm", "cuda") == "triton"
    assert backends.implementation("gradient_moments", "xpu") is None


def test_an_environment_variable_prefers_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSWAG_BACKEND", "torch")
    assert backends.implementation("relative_attention", "cuda") == "torch"
    assert backends.implementation("gradient_moments", "cuda") == "triton"
    monkeypatch.setenv("LSWAG_BACKEND", "cuda")
    assert backends.implementation("gradient_moments", "cuda") == "cuda"
    assert backends.implementation("gradient_moments", "cpu") == "cpp"
    monkeypatch.setenv("LSWAG_BACKEND", "triton")
    assert backends.implementation("gradient_moments", "cpu") == "cpp"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.implementation("gradient_moments", "cpu") == "triton"
    assert backends.implementation("activation_patterns", "cpu") == "cpp"


def test_an_unknown_preference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSWAG_BACKEND", "rocm")
    with pytest.raises(InputError, match="LSWAG_BACKEND must be auto or one of cpp, cuda, torch, triton, got 'rocm'"):
        backends.implementation("gelu", "cpu")


def test_a_device_that_is_too_old_is_named_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cuda_kernels", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    cuda = next(b for b in backends.backends() if b.name == "cuda")
    assert (cuda.available, cuda.detail) == (False, "compute capability 7.5; 8.0 or newer is needed")
    with pytest.raises(InputError, match=r"device 'cuda' cannot be used: compute capability 7\.5; 8\.0 or newer"):
        backends.resolve_device("cuda")


@pytest.mark.parametrize(
    ("cuda", "visible", "reason"),
    [
        (None, None, f"torch {torch.__version__} is built without CUDA"),
        ("13.0", None, "torch finds no CUDA device"),
        ("13.0", "", "torch finds no CUDA device (CUDA_VISIBLE_DEVICES is '')"),
    ],
)
def test_why_there_is_no_device_is_said(
    cuda: str | None, visible: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "cuda_kernels", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = next(b for b in backends.backends() if b.name == "cuda")
    assert (found.available, found.detail) == (False, reason)
    assert backends.resolve_device("auto") == "cpu"
    with pytest.raises(InputError, match=r"device 'cuda:0' cannot be used: torch .*; pass device='cpu'"):
        backends.resolve_device("cuda:0")


def test_a_device_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cuda_kernels", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    cuda = next(b for b in backends.backends() if b.name == "cuda")
    assert not cuda.available
    assert "pip install 'lswag-fast[gpu]'" in cuda.detail
