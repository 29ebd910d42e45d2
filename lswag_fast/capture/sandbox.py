"""A model on copies of its parameters and buffers, so that a score leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from ..errors import InputError

# torch.utils.deterministic is an object with properties, which type checkers take for a plain module.
_deterministic: Any = import_module("torch.utils.deterministic")


class Sandbox:
    """Runs `model` on copies of its parameters and buffers in `dtype`.

    Normalisation layers with running statistics keep float32 (torch's mixed form); integer tensors keep their dtype.
    The model's own parameters, gradients and buffers are never handed to an operation.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        kept = {
            f"{name}.{key}" if name else key
            for name, module in model.named_modules()
            if isinstance(module, _NormBase)
            for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        self.originals = dict(model.named_parameters())
        self.parameters = {n: _copy(p, None if n in kept else dtype) for n, p in self.originals.items()}
        self.buffers = {n: _copy(b, None if n in kept else dtype) for n, b in model.named_buffers()}
        self.dtype = dtype

    def __call__(self, images: Tensor) -> Any:
        """Runs the forward pass on the copies."""
        return self.run(self.parameters, self.buffers, images)

    def run(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Any:
        """Runs the forward pass on the given stand-ins for the parameters and buffers."""
        return functional_call(self.model, {**parameters, **buffers}, (images,), strict=False)

    def stand_ins(self, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns leaves that require gradients for every floating-point parameter, and buffers, on `device`."""
        if device != "meta":
            leaves = {n: p.detach().requires_grad_(p.is_floating_point()) for n, p in self.parameters.items()}
            return leaves, {n: b.clone() for n, b in self.buffers.items()}
        leaves = {
            n: torch.empty_like(p, device="meta").requires_grad_(p.is_floating_point())
            for n, p in self.parameters.items()
        }
        return leaves, {n: torch.empty_like(b, device="meta") for n, b in self.buffers.items()}


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor.detach().clone()
    return tensor.detach().to(dtype, copy=True)


def check_device(model: nn.Module, device: str) -> None:
    """Raises InputError unless every parameter and buffer of `model` is on `device`."""
    wanted = torch.device(device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != wanted.type:
            raise InputError(
                f"the model's {name} is on {tensor.device}, but the score runs on {wanted}; "
                f"call model.to({str(wanted)!r}) first, or pass device={str(tensor.device)!r}"
            )


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Sets a model and torch up for scoring, and puts everything back, also after an exception.

    Inside: dropout and stochastic depth off, batch normalisation in its own mode, gradients on, autocast off,
    deterministic algorithms, IEEE float32 products.
    """
    modes = [(module, module.training) for module in model.modules()]
    python_rng, cpu_rng = random.getstate(), torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _deterministic.fill_uninitialized_memory
    try:
        for module, _ in modes:
            if not isinstance(module, _NormBase):
                module.training = False
        torch.set_float32_matmul_precision("highest")
        # Filling fresh memory with NaN is part of deterministic mode, and would cost a pass over every tensor.
        _deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _deterministic.fill_uninitialized_memory = fill
        torch.set_float32_matmul_precision(precision)
        random.setstate(python_rng)
        torch.set_rng_state(cpu_rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state_all(cuda_rng)
