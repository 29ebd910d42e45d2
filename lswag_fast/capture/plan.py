"""What the shape-only run found: the layers, the activations, and what to do at each call of the real run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .functions import Kind
from .samples import SampleAxis


@dataclass(frozen=True)
class Use:
    """One use of a weight that the fused path covers, at one call of the forward pass."""

    call: int
    layer: int  # position in Plan.layers
    axis: SampleAxis  # of the input of the product
    swapped: bool = False  # the operand is the transpose of the layer's first use: inputs and gradients change places
    weight_on_right: bool = True  # of a matrix product


@dataclass
class Layer:
    """A Parameter used as the matrix or kernel of a linear map or convolution."""

    name: str
    numel: int
    first_call: int
    calls: list[int] = field(default_factory=list)
    slow_reason: str | None = None  # None: the fused path covers every use
    kept: bool = True

    @property
    def fused(self) -> bool:
        """Whether every use is covered in the one forward and backward pass."""
        return self.slow_reason is None


@dataclass(frozen=True)
class Activation:
    """One call of an activation function."""

    call: int
    kind: str
    last_layer: int  # number (from 1) of the last layer used before it; 0: none
    positions: int  # of one sample
    axis: SampleAxis | None


@dataclass
class Plan:
    """The plan of a real run. `actions` holds, per call that capture looks at, a Use, an Activation or None."""

    layers: list[Layer]
    activations: list[Activation]
    kinds: list[Kind]
    actions: list[Use | Activation | None]
    coupled: str | None  # the layer that couples the samples
    uncovered: tuple[str, ...]
    multiply_adds: int  # of one image
    parameters: int
    observed: dict[int, Use] = field(default_factory=dict)
    """Calls of layers on the slow path whose samples are known: their outputs can be read, their gradients are not."""

    def copy(self) -> Plan:
        """Returns a plan of its own layers, which changes to this one leave alone."""
        return replace(self, layers=[replace(layer) for layer in self.layers], actions=list(self.actions))

    def restrict(self, keep: Callable[[int], bool]) -> None:
        """Leaves the layers (by position) for which `keep` is false to torch: nothing of them is captured.

        The backward pass then ends at the first layer that is kept.
        """
        for position, layer in enumerate(self.layers):
            layer.kept = keep(position)
        self.drop_uses(lambda layer: not layer.kept)

    def drop_uses(self, drop: Callable[[Layer], bool]) -> None:
        """Takes the uses of some layers out of the fused path."""
        self.actions = [
            None if isinstance(action, Use) and drop(self.layers[action.layer]) else action for action in self.actions
        ]
