"""The network and its batch, for proxies that run passes of their own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import Plan, Sandbox
from ..errors import InputError
from ..losses import logits_of
from .proxy import UnavailableError
from .shared_work import SharedWork

Loss = Callable[[Any, Any], Tensor]


class Network:
    """Runs a network on copies of its parameters and buffers: no pass leaves a trace in the model or in another pass.

    While proxies are computed, dropout is off, batch normalisation keeps its mode, and torch computes in IEEE float32
    and deterministically.

    Attributes:
        model: the module, for its structure; its own parameters must not be handed to an operation.
        plan: its layers and activations, by first use.
        images: [S, ...] as they were given; `run` casts them.
        labels: as the loss takes them.
        dtype: of the score.
        seed: of the score, for what a proxy draws; draw on the CPU in float32.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        plan: Plan,
        images: Tensor,
        labels: Any,
        loss: Loss,
        seed: int,
        shared: SharedWork | None = None,
    ) -> None:
        self.model: nn.Module = sandbox.model
        self.plan = plan
        self.dtype = sandbox.dtype
        self.images = images.detach()
        self.labels = labels
        self.seed = seed
        self._loss = loss
        self._sandbox_of_score = sandbox
        self._shared = shared or SharedWork()

    def parameters(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Returns the parameters by name in `dtype` (None: that of the score), shared by all callers: do not write."""
        return self._sandbox(dtype).parameters

    def run(
        self, images: Tensor, parameters: Mapping[str, Tensor] | None = None, *, dtype: torch.dtype | None = None
    ) -> Any:
        """Returns the output of the network on `images` [s, ...], which need not be those of the batch.

        `parameters` stand in for those of the same name, and may require gradients; normalisation layers with running
        statistics keep their parameters and buffers in float32 whatever the dtype.
        """
        sandbox = self._sandbox(dtype)
        buffers = {name: buffer.clone() for name, buffer in sandbox.buffers.items()}
        return sandbox.run({**sandbox.parameters, **(parameters or {})}, buffers, images.to(sandbox.dtype))

    def losses(self, output: Any, labels: Any = None) -> Tensor:
        """Returns one loss a sample [S] of an output on the batch (or on samples with these labels)."""
        return self._loss(output, self.labels if labels is None else labels)

    def logits(self, output: Any) -> Tensor:
        """Returns the logits [s, classes] of an output; raises UnavailableError where it has none."""
        try:
            return logits_of(output)
        except InputError as error:
            raise UnavailableError("it is defined on logits [S, classes], which the model does not return") from error

    @property
    def input_jacobian(self) -> Tensor:
        """[S, values of an image]: the gradient at each image of the sum of all logits, in one pass in float32."""
        jacobian: Tensor = self.once("input jacobian", self._input_jacobian)
        return jacobian

    def _input_jacobian(self) -> Tensor:
        images = self.images.to(torch.float32, copy=True).requires_grad_()
        total = self.logits(self.run(images, dtype=torch.float32)).sum()
        (jacobian,) = torch.autograd.grad(total, images)
        return jacobian.flatten(1)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Returns compute(), which is called for the first request with this key only: passes that proxies share."""
        return self._shared.once(key, compute)

    def _sandbox(self, dtype: torch.dtype | None) -> Sandbox:
        if dtype in (None, self.dtype):
            return self._sandbox_of_score
        sandbox: Sandbox = self.once(("parameters", dtype), lambda: self._sandbox_of_score.cast(dtype))
        return sandbox
