"""Search spaces: sample, encode, count and build candidate networks; they know nothing of proxies."""

from __future__ import annotations

from typing import Literal, overload

from ..errors import InputError
from .autoformer import CHOICES, AutoFormerSpace, AutoFormerSupernet
from .autoformer_module import AutoFormer
from .nasbench201 import NAME, NASBench201Space
from .nasbench201_module import NASBench201

__all__ = [
    "AutoFormer",
    "AutoFormerSpace",
    "AutoFormerSupernet",
    "NASBench201",
    "NASBench201Space",
    "get",
    "names",
]


def names() -> tuple[str, ...]:
    """Returns the names that :func:`get` knows."""
    return (*CHOICES, NAME)


@overload
def get(
    name: Literal["autoformer-tiny", "autoformer-small", "autoformer-base"],
    *,
    image_size: int = 224,
    patch_size: int = 16,
    num_classes: int = 1000,
) -> AutoFormerSpace: ...


@overload
def get(name: Literal["nasbench201"], *, image_size: int = 32, num_classes: int = 10) -> NASBench201Space: ...


@overload
def get(name: str, **options: int) -> AutoFormerSpace | NASBench201Space: ...


def get(name: str, **options: int) -> AutoFormerSpace | NASBench201Space:
    """Returns a search space by its name.

    Args:
        name: one of :func:`names`.
        options: `image_size`, height and width of the images in pixels: a multiple of `patch_size` (224 by default), or
            of 4 for nasbench201 (32 by default; its authors take 16 for ImageNet16-120). `patch_size`, height and width
            of a patch in pixels, for AutoFormer spaces alone (16). `num_classes`, logits of a candidate (1000; 10
            for nasbench201).

    Raises:
        InputError: the name or an option is not known, or a size is not a positive integer or does not fit.
    """
    if name not in names():
        raise InputError(f"no search space is called {name!r}; there are {', '.join(names())}")
    accepted = ("image_size", "num_classes") if name == NAME else ("image_size", "patch_size", "num_classes")
    unknown = sorted(options.keys() - set(accepted))
    if unknown:
        raise InputError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(accepted)}")
    return NASBench201Space(**options) if name == NAME else AutoFormerSpace(name, **options)
