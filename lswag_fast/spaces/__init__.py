"""Search spaces: sample, encode, count and build candidate networks; they know nothing of proxies."""

from __future__ import annotations

from .autoformer import CHOICES, AutoFormerSpace, AutoFormerSupernet
from .autoformer_module import AutoFormer

__all__ = ["AutoFormer", "AutoFormerSpace", "AutoFormerSupernet", "get", "names"]


def names() -> tuple[str, ...]:
    """Returns the names that :func:`get` knows."""
    return tuple(CHOICES)


def get(name: str, *, image_size: int = 224, patch_size: int = 16, num_classes: int = 1000) -> AutoFormerSpace:
    """Returns a search space by its name.

    Args:
        name: one of :func:`names`.
        image_size: height and width of the images, pixels; a multiple of `patch_size`.
        patch_size: height and width of a patch, pixels.
        num_classes: logits of a candidate.

    Raises:
        InputError: the name is not known, or a size is not a positive integer or does not fit.
    """
    return AutoFormerSpace(name, image_size=image_size, patch_size=patch_size, num_classes=num_classes)
