"""The outputs of a network's blocks in one forward pass, and which axis of each holds the channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..capture import functions as fn
from ..capture.functions import Kind
from .network import Network
from .proxy import UnavailableError

_CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Feature:
    """The output of a block, on the graph of the pass."""

    name: str
    output: Tensor
    channel_axis: int  # from 0


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of a model's blocks: transformer blocks, residual blocks, cells.

    A block is a member of a ModuleList or Sequential that has modules of its own and is not such a container itself;
    one inside another block is part of it. Where there are fewer than two (a plain stack of layers), the members with
    a matrix or kernel of the ModuleList or Sequential that has most members.
    """
    found = tuple(_blocks(model, "", isinstance(model, _CONTAINERS)))
    if len(found) > 1:
        return found
    containers = [(n, m) for n, m in model.named_modules() if isinstance(m, _CONTAINERS)]
    if not containers:
        return found
    prefix, longest = max(containers, key=lambda named: len(list(named[1].children())))
    members = ((f"{prefix}.{name}".lstrip("."), member) for name, member in longest.named_children())
    return tuple(name for name, member in members if any(p.dim() > 1 for p in member.parameters()))


def _blocks(module: nn.Module, prefix: str, contained: bool) -> Iterator[str]:
    for name, child in module.named_children():
        container = isinstance(child, _CONTAINERS)
        if contained and not container and any(True for _ in child.children()):
            yield prefix + name
        else:
            yield from _blocks(child, f"{prefix}{name}.", container)


def block_features(network: Network, images: Tensor, names: tuple[str, ...]) -> list[Feature]:
    """Returns the input of the first block called, and the output of every call of a block, in order.

    The input is left out where no linear map or convolution has come before it: it is then the images. Of several
    outputs the first tensor is taken. Where some features have positions (three axes or more), those without are left
    out. The network goes on with copies, so that nothing it does in place changes a feature.

    The channels are on the axis as long as the output of the linear map or convolution called last before; of several
    such axes, or none, on the one where it puts them (1 for a convolution, else the last).

    Raises:
        UnavailableError: a name is no module of the model.
    """
    modules = dict(network.model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise UnavailableError(f"blocks names {', '.join(unknown)}, which the model does not have")
    watch = _Watch()
    hooks = [modules[name].register_forward_pre_hook(watch.before) for name in names]
    hooks += [modules[name].register_forward_hook(watch.after(name)) for name in names]
    try:
        with watch:
            network.run(images.clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    if any(f.output.dim() > 2 for f in watch.features):
        return [f for f in watch.features if f.output.dim() > 2]
    return watch.features


class _Watch(TorchFunctionMode):
    """Notes the last product called, and the features."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Feature] = []
        self._axis = 1
        self._width = 0  # no product yet

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func`, noting where a linear map or convolution puts its channels."""
        kwargs = kwargs or {}
        kind = fn.kind_of(func, args, kwargs)
        if kind is Kind.COMPOSITE:
            with self:
                return fn.run_body(func, args, kwargs)
        out = func(*args, **kwargs)
        if kind in (Kind.LINEAR, Kind.CONVOLUTION):
            self._axis = -1 if kind is Kind.LINEAR else 1
            self._width = out.shape[self._axis]
        return out

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keeps the input of the first block; hands the block a copy of it."""
        if self.features or not self._width or not args or not isinstance(args[0], Tensor):
            return None
        return (self._keep("input", args[0]), *args[1:])

    def after(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        """Returns a hook that keeps a block's output and hands on a copy of it."""

        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return self._keep(name, output)
            if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
                return (self._keep(name, output[0]), *output[1:])
            raise UnavailableError(f"block {name} returns a {type(output).__name__}, not a tensor or a tuple of them")

        return keep

    def _keep(self, name: str, output: Tensor) -> Tensor:
        if output.dim() < 2 or not output.is_floating_point():
            raise UnavailableError(f"block {name} gives a tensor {list(output.shape)} of {output.dtype}")
        natural = self._axis % output.dim()
        fitting = [axis for axis in range(1, output.dim()) if output.shape[axis] == self._width]
        axis = natural if natural in fitting or not fitting else fitting[0]
        self.features.append(Feature(name, output, axis))
        return output.clone()
