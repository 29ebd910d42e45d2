"""A consumer of capture that asks for nothing, for passes of a proxy's own to derive from."""

from __future__ import annotations

from torch import Tensor

from ..capture import Activation, Layer
from ..ops.gradient_moments import Convolution


class Spectator:
    """Has every method that capture calls; a subclass overrides those it needs."""

    def wants(self, activation: Activation) -> bool:
        """Whether this activation is to be handed over."""
        return False

    def activate(self, activation: Activation, pre: Tensor, kind: str) -> Tensor:
        """Computes an activation; called in a fused pass alone, for activations that are wanted."""
        raise NotImplementedError

    def activated(self, activation: Activation, post: Tensor, first_sample: int) -> None:
        """Reads a post-activation [s, ...]."""

    def weight(
        self,
        layer: Layer,
        inputs: list[Tensor],
        output_grads: list[Tensor],
        convolution: Convolution | None,
        operand: Tensor | None = None,
    ) -> None:
        """Reads the inputs [S, ..., I] and output gradients [S, ..., O] of every use of a weight."""

    def group_gradient(self, layer: Layer, gradient: Tensor) -> None:
        """Reads the gradient of the next group's mean loss."""

    def wants_outputs(self) -> bool:
        """Whether the outputs of layers are to be handed over."""
        return False

    def output(self, layer: Layer, output: Tensor, output_grad: Tensor, channel_axis: int) -> None:
        """Reads the output of one use of a layer and the gradient there."""
