"""The batch of images that candidates are scored on: Gaussian noise, crops of photographs, or a folder of images."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_PHOTOGRAPHS = ("china.jpg", "flower.jpg")
_INSTALL = "install the extra that reads images: pip install 'lswag-fast[photos]'"


@dataclass(frozen=True)
class ImageBatch:
    """Images and labels ready for :func:`lswag_fast.score`."""

    images: Tensor  # [S, 3, H, W] float32
    labels: Tensor  # [S] int64
    description: str


def load(
    source: str | os.PathLike[str], samples: int, *, image_size: int = 224, seed: int = 0, num_classes: int = 1000
) -> ImageBatch:
    """Returns `samples` images of `image_size` x `image_size` pixels, the same for the same arguments.

    Args:
        source: "noise" for standard normal values; "photos" for random square crops, mirrored half the time, of the two
            photographs that scikit-learn carries (no download); else a folder, searched with its subfolders. Of a
            folder, `samples` files are drawn; each has its shorter side resized to 8/7 of `image_size` and is cropped
            at its centre. Photographs are normalised with the mean and standard deviation of ImageNet.
        samples: S, 1 or more.
        image_size: height and width, pixels.
        seed: draws noise, files, crops and random labels, always on the CPU.
        num_classes: labels are from 0 to num_classes - 1. Two or more class folders directly in a folder give the
            labels, in sorted order; everywhere else labels are random.

    Raises:
        InputError: the source does not exist or has too few images, too many classes or an unreadable image (which is
            named), or the packages that read images are missing.
    """
    for name, value in (("samples", samples), ("image_size", image_size), ("num_classes", num_classes)):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (samples,), generator=generator)
    if source == "noise":
        images = torch.randn((samples, 3, image_size, image_size), generator=generator)
        return ImageBatch(images, labels, f"noise, seed {seed}")
    if source == "photos":
        crops = _crops(_photographs(), samples, image_size, random.Random(seed))
        return ImageBatch(_normalised(crops), labels, f"crops of {', '.join(_PHOTOGRAPHS)}, seed {seed}")
    batch = _folder(Path(source), labels, image_size, random.Random(seed), num_classes)
    return replace(batch, description=f"{batch.description}, seed {seed}")


def _photographs() -> list[Image]:
    pillow = _pillow()
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise InputError(f"images 'photos' needs scikit-learn, which is not installed; {_INSTALL}") from error
    return [pillow.fromarray(load_sample_image(name)) for name in _PHOTOGRAPHS]


def _crops(photographs: Sequence[Image], samples: int, size: int, draw: random.Random) -> Iterator[Image]:
    """Squares with a side of a quarter to all of the shorter side, the photographs in turn."""
    pillow = _pillow()
    for sample in range(samples):
        photograph = photographs[sample % len(photographs)]
        side = round(draw.uniform(0.25, 1.0) * min(photograph.size))
        left = draw.randint(0, photograph.width - side)
        top = draw.randint(0, photograph.height - side)
        box = (left, top, left + side, top + side)
        crop = photograph.resize((size, size), pillow.Resampling.BICUBIC, box=box)
        yield crop.transpose(pillow.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else crop


def _folder(folder: Path, labels: Tensor, size: int, draw: random.Random, num_classes: int) -> ImageBatch:
    if not folder.is_dir():
        raise InputError(f"images must be noise, photos or a folder of images; there is no folder {str(folder)!r}")
    _pillow()
    samples = len(labels)
    files = sorted(_image_files(folder))
    if len(files) < samples:
        raise InputError(
            f"{folder} holds {len(files) or 'no'} images ({', '.join(sorted(SUFFIXES))}), {samples} are asked for; "
            f"add some, or ask for fewer samples"
        )
    chosen = draw.sample(files, samples)
    classes = sorted({file.parts[0] for file in files})
    by_class = len(classes) > 1 and all(len(file.parts) > 1 for file in files)
    if by_class and len(classes) > num_classes:
        raise InputError(f"{folder} holds {len(classes)} class folders, but num_classes is {num_classes}; raise it")
    if by_class:
        labels = torch.tensor([classes.index(file.parts[0]) for file in chosen])
    images = _normalised(_centre(_read(folder / file), size) for file in chosen)
    origin = f"labels from {len(classes)} class folders" if by_class else "random labels"
    return ImageBatch(images, labels, f"{samples} of {len(files)} files of {folder.name}, {origin}")


def _image_files(folder: Path) -> Iterator[Path]:
    """Yields the images below `folder` by their path in it; follows links, but enters no folder twice."""
    entered: set[str] = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(parent))
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in entered
        ]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(parent, name).relative_to(folder)


def _read(file: Path) -> Image:
    pillow = _pillow()
    from PIL import ImageOps

    try:
        with pillow.open(file) as image:
            upright: Image = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise InputError(f"cannot read image {file} ({error}); repair or remove it") from error
    return upright


def _centre(image: Image, size: int) -> Image:
    """The central square of 7/8 of the shorter side, the usual evaluation crop."""
    pillow = _pillow()
    side = min(image.size) * 7 / 8
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), pillow.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _normalised(images: Iterator[Image]) -> Tensor:
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    unit = pixels.permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((unit - mean) / std).contiguous()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(f"reading images needs Pillow, which is not installed; {_INSTALL}") from error
    return Image
