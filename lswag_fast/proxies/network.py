"""The network and its batch, for proxies that run passes of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import Plan, Sandbox
from ..clock import Clock
from ..errors import InputError
from ..losses import logits_of
from .proxy import UnavailableError

Loss = Callable[[Any, Any], Tensor]


class Network:
    """Runs a network on copies of its parameters and buffers: no pass leaves a trace in the model or in another pass.

    While proxies are computed, dropout is off, batch normalisation keeps its mode, and torch computes in IEEE float32
    and deterministically.

    Attributes:
        model: the module, for its structure; its own parameters must not be handed to an operation.
        plan: its layers and activations, by first use.
        images: [S, ...] in `dtype`.
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
        clock: Clock | None = None,
    ) -> None:
        self.model: nn.Module = sandbox.model
        self.plan = plan
        self.dtype = sandbox.dtype
        self.images = images.detach().to(sandbox.dtype)
        self.labels = labels
        self.seed = seed
        self._loss = loss
        self._sandboxes = {sandbox.dtype: sandbox}
        self._results: dict[Hashable, Any] = {}
        self._clock = clock or Clock("cpu", running=False)
        self._made_of: dict[Hashable, set[Hashable]] = {}
        self.used: set[Hashable] = set()
        """The keys of the shared passes that were asked for; whoever measures a proxy empties it before."""

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
        return sandbox.run({**sandbox.parameters, **(parameters or {})}, buffers, images)

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
        if key not in self._results:
            outer, self.used = self.used, set()
            try:
                with self._clock(shared_label(key)):
                    self._results[key] = compute()
                self._made_of[key] = {key, *self.used}
            finally:
                self.used = outer
        self.used |= self._made_of[key]
        return self._results[key]

    def _sandbox(self, dtype: torch.dtype | None) -> Sandbox:
        wanted = self.dtype if dtype is None else dtype
        if wanted not in self._sandboxes:
            # A copy of the first sandbox still knows the model's attributes from before any pass filled a cache.
            sandbox, cast = copy.copy(self._sandboxes[self.dtype]), Sandbox(self.model, wanted)
            sandbox.parameters, sandbox.buffers, sandbox.dtype = cast.parameters, cast.buffers, wanted
            self._sandboxes[wanted] = sandbox
        return self._sandboxes[wanted]


def shared_label(key: Hashable) -> str:
    """Returns the label under which a clock counts the pass with this key."""
    return f"shared {key}"
