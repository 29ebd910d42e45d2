"""What a score depends on besides the candidate: the part of a store's key that one run shares."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import InputError
from ..options import DEFINITION_VERSION, LSWAG, ScoreOptions


@dataclass(frozen=True)
class Context:
    """Space, batch, options, weights, loss and definition; two scores are comparable where all of these are equal."""

    space: dict[str, Any]
    images: str  # sha256 of dtype, shape and bytes
    labels: str  # the same, or the seed that draws them
    options: dict[str, Any]  # resolved
    weights: str  # "seed:K", or "state:" and the digest of a state dict
    loss: str
    definition_version: int = DEFINITION_VERSION

    @staticmethod
    def of(
        space_options: Mapping[str, Any],
        images: Tensor,
        labels: Tensor | None,
        options: ScoreOptions,
        weights: str,
        loss: str,
    ) -> Context:
        """Returns the context of scores with these arguments; `options` must be resolved."""
        named = options.to_dict()
        # L-SWAG alone is what a store without this option holds; it must be found there.
        if named["proxies"] == [LSWAG]:
            del named["proxies"]
        # A store is shared by the devices of one machine: cuda:0 and cuda:1 score alike.
        named["device"] = named["device"].split(":")[0]
        drawn = f"seed:{options.seed}"
        return Context(
            space=dict(space_options),
            images=tensor_digest(images),
            labels=drawn if labels is None else tensor_digest(labels),
            options=json.loads(json.dumps(named)),
            weights=weights,
            loss=loss,
        )

    @cached_property
    def id(self) -> str:
        """The SHA-256, in hexadecimal, of every field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def key(self, encoded_arch: str) -> str:
        """Returns the key of a candidate: the SHA-256 of everything its score depends on, in hexadecimal."""
        return hashlib.sha256(f"{self.id}\n{encoded_arch}".encode()).hexdigest()

    def metadata(self, samples: int) -> dict[str, Any]:
        """Returns the fields, and the machine and versions that a reader of the scores wants to know."""
        versions = {"lswag_fast": __version__, "torch": torch.__version__, "numpy": np.__version__}
        cuda = torch.cuda.get_device_name() if self.options["device"] == "cuda" else None
        return {
            **asdict(self),
            "samples": samples,
            "versions": {**versions, "python": platform.python_version()},
            "device_name": cuda or f"{platform.machine()} CPU",
            "threads": torch.get_num_threads(),
        }


def tensor_digest(tensor: Tensor) -> str:
    """Returns the SHA-256, in hexadecimal, of a tensor's dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}\n".encode())
    sha.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def describe_loss(loss: Any, *, lasting: bool) -> str:
    """Returns the name under which a store knows a loss.

    That is its `identity` attribute where it has one, the qualified name of a function, or the class, settings and
    tensors of a module. `lasting` says that the store outlives this process: nameless losses are refused there,
    because two different ones could not be told apart.
    """
    if loss is None:
        return "cross_entropy"
    if isinstance(getattr(loss, "identity", None), str):
        return str(loss.identity)
    if isinstance(loss, nn.Module):
        return "; ".join(_describe_module(name, module, lasting) for name, module in loss.named_modules())
    name = getattr(loss, "__qualname__", None)
    bound = isinstance(loss, MethodType)  # its name does not tell the object that it computes with
    if name is None or bound or "<lambda>" in name or "<locals>" in name:
        if lasting:
            raise InputError(
                f"a store tells losses apart by name, which {loss!r} does not have; pass a function defined at the top "
                f"of a module, or set its `identity` attribute to a text that changes with what it computes"
            )
        return "unnamed"
    return f"{loss.__module__}.{name}"


def _describe_module(name: str, module: nn.Module, lasting: bool) -> str:
    """Returns the class and what sets it: numbers, texts, sequences of them, and the digests of tensors."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    plain = {key: value for key, value in vars(module).items() if key == "training" or not key.startswith("_")}
    settings: dict[str, Any] = {}
    for key, value in {**plain, **tensors}.items():
        if isinstance(value, Tensor):
            settings[key] = tensor_digest(value)
        elif all(isinstance(v, bool | int | float | str | None) for v in _flat(value)):
            settings[key] = value
        elif lasting:
            raise InputError(
                f"a store tells losses apart by their settings, and {key} of {type(module).__name__} is "
                f"{value!r}; set the loss's `identity` attribute to a text that changes with what it computes"
            )
    return f"{name} {type(module).__module__}.{type(module).__qualname__} {settings}".strip()


def _flat(value: Any) -> list[Any]:
    return [v for item in value for v in _flat(item)] if isinstance(value, list | tuple) else [value]
