"""A model on copies of its parameters and buffers, so that a score leaves nothing behind."""

from __future__ import annotations

import os
import random
from collections import OrderedDict
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

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_IS_ASKED_FOR = _CUBLAS in (torch.use_deterministic_algorithms.__doc__ or _CUBLAS)
"""Whether this torch calls matrix products on CUDA deterministic only where that is set, as its documentation says then
(or nothing, under python -OO). Newer ones always give cuBLAS a workspace of its own (pytorch/pytorch#161749), and parse
the variable anew at every product."""
_MATH: Any = torch.backends
_FLOAT32_BACKENDS: list[Any] = [
    backend
    for library, names in (("cuda", ["matmul"]), ("cudnn", ["conv", "rnn"]), ("mkldnn", ["matmul", "conv", "rnn"]))
    for backend in (getattr(getattr(_MATH, library), name, None) for name in names)
    if hasattr(backend, "fp32_precision")
]
"""What torch sets the precision of float32 products for; empty before torch 2.9, which has one setting for all."""


class _Attributes:
    """The attributes of every module of a model as they are now: a forward pass may fill caches, or count."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, dict(vars(module))) for module in model.modules()]
        self._containers = [
            (value, value.copy())
            for _, attributes in self._modules
            for name, value in attributes.items()
            if type(value) in (dict, OrderedDict, list, set) and not name.endswith(("_hooks", "_hooks_with_kwargs"))
        ]

    def restore(self, *, modes: bool) -> None:
        """Puts everything back; the modes (train or eval) only where asked."""
        for module, attributes in self._modules:
            now = vars(module)
            mode = {name: now[name] for name in ("training",) if name in now and not modes}
            now.clear()
            now.update(attributes | mode)
        for container, content in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


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
        self._attributes = _Attributes(model)

    def cast(self, dtype: torch.dtype) -> Sandbox:
        """Returns a sandbox of the same model in another dtype.

        It knows the model's attributes from before any pass of this one filled a cache.
        """
        other = Sandbox(self.model, dtype)
        other._attributes = self._attributes
        return other

    def __call__(self, images: Tensor) -> Any:
        """Runs the forward pass on the copies."""
        return self.run(self.parameters, self.buffers, images)

    def run(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Any:
        """Runs the forward pass on the given stand-ins for the parameters and buffers.

        Attributes that a pass before this one has set (a table kept from a pass on shapes, say) are put back first.
        The model gets a copy of `images`, so that it may work in place on it.
        """
        self._attributes.restore(modes=False)
        return functional_call(self.model, {**parameters, **buffers}, (images.clone(),), strict=False)

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
    """Raises InputError unless every parameter and buffer of `model` has its values, on `device`."""
    wanted = torch.device(device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"the model's {name} has no shape yet; run the model once on a batch before scoring it")
        if tensor.device.type != wanted.type:
            raise InputError(
                f"the model's {name} is on {tensor.device}, but the score runs on {wanted}; "
                f"call model.to({str(wanted)!r}) first, or pass device={str(tensor.device)!r}"
            )


@contextmanager
def random_states() -> Iterator[None]:
    """Puts the states of Python's and torch's random generators back."""
    python_rng, cpu_rng = random.getstate(), torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python_rng)
        torch.set_rng_state(cpu_rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state_all(cuda_rng)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Sets a model and torch up for scoring, and puts everything back, also after an exception.

    Inside: dropout and stochastic depth off, batch normalisation in its own mode, gradients on, autocast off,
    deterministic algorithms, IEEE float32 products.
    """
    attributes = _Attributes(model)
    try:
        for module in model.modules():
            if not isinstance(module, _NormBase):
                module.training = False
        with random_states(), torch_settings():
            yield
    finally:
        attributes.restore(modes=True)


@contextmanager
def torch_settings() -> Iterator[None]:
    """Gradients on, autocast off, deterministic algorithms and IEEE float32 products; everything put back after."""
    precisions = [(backend, backend.fp32_precision) for backend in _FLOAT32_BACKENDS]
    matmul, convolution = _older_settings()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _deterministic.fill_uninitialized_memory
    workspace = os.environ.get(_CUBLAS)
    try:
        # Where torch has both, operations fail unless the older settings say the same as the newer.
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = False
        for backend in _FLOAT32_BACKENDS:
            backend.fp32_precision = "ieee"
        # Filling fresh memory with NaN is part of deterministic mode, and would cost a pass over every tensor.
        _deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        if _CUBLAS_IS_ASKED_FOR:
            os.environ.setdefault(_CUBLAS, ":4096:8")
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        if workspace is None:
            os.environ.pop(_CUBLAS, None)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _deterministic.fill_uninitialized_memory = fill
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = convolution
        for backend, value in precisions:
            backend.fp32_precision = value


def _older_settings() -> tuple[str | None, bool | None]:
    """Returns the precision of float32 products, and whether convolutions may take TF32; None where torch cannot say.

    It cannot where somebody set only the newer ones.
    """
    found: list[Any] = []
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found[0], found[1]
