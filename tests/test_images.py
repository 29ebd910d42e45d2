from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lswag_fast import images
from lswag_fast.errors import InputError

pillow = pytest.importorskip("PIL.Image")


def picture(path: Path, size: tuple[int, int] = (40, 30), colour: tuple[int, int, int] = (255, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.new("RGB", size, colour).save(path)


def test_noise_is_standard_normal_and_seeded() -> None:
    batch = images.load("noise", 8, image_size=48, seed=3, num_classes=10)
    assert batch.images.shape == (8, 3, 48, 48)
    assert batch.images.dtype == torch.float32
    assert abs(float(batch.images.mean())) < 0.02
    assert abs(float(batch.images.std()) - 1) < 0.02
    assert batch.labels.dtype == torch.int64
    assert 0 <= int(batch.labels.min()) <= int(batch.labels.max()) < 10
    again = images.load("noise", 8, image_size=48, seed=3, num_classes=10)
    assert torch.equal(batch.images, again.images)
    assert torch.equal(batch.labels, again.labels)
    assert not torch.equal(batch.images, images.load("noise", 8, image_size=48, seed=4, num_classes=10).images)


def test_drawing_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    images.load("noise", 2, image_size=4)
    assert torch.equal(before, torch.get_rng_state())


def test_photographs_are_cropped_and_seeded() -> None:
    pytest.importorskip("sklearn")
    batch = images.load("photos", 6, image_size=32, seed=1)
    again = images.load("photos", 6, image_size=32, seed=1)
    other = images.load("photos", 6, image_size=32, seed=2)
    assert batch.images.shape == (6, 3, 32, 32)
    assert torch.equal(batch.images, again.images)
    assert not torch.equal(batch.images, other.images)
    assert len({image.numpy().tobytes() for image in batch.images}) == 6
    low = (0 - max(images.IMAGENET_MEAN)) / min(images.IMAGENET_STD)
    assert low < float(batch.images.min()) < 0 < float(batch.images.max()) < (1 - 0.4) / min(images.IMAGENET_STD)


def test_class_folders_give_the_labels_in_sorted_order(tmp_path: Path) -> None:
    for index, name in enumerate(("cat", "dog", "emu")):
        picture(tmp_path / name / "deep" / "a.png", colour=(100 * index, 0, 0))
    batch = images.load(tmp_path, 3, image_size=8, num_classes=3)
    red = (batch.images[:, 0, 4, 4] * images.IMAGENET_STD[0] + images.IMAGENET_MEAN[0]) * 255
    assert torch.equal(batch.labels, (red / 100).round().long())
    assert "3 class folders" in batch.description
    with pytest.raises(InputError, match="3 class folders, but num_classes is 2"):
        images.load(tmp_path, 3, num_classes=2)


def test_flat_folder_has_random_labels_and_a_seeded_choice(tmp_path: Path) -> None:
    for n in range(12):
        picture(tmp_path / f"{n}.jpg", colour=(20 * n, 0, 0))
    (tmp_path / "notes.txt").write_text("no image")
    picture(tmp_path / ".hidden.png")
    first, again = (images.load(tmp_path, 4, image_size=8, seed=5) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, images.load(tmp_path, 4, image_size=8, seed=6).images)
    assert "4 of 12 files" in first.description
    assert "random labels" in first.description


def test_centre_of_any_shape_and_mode_is_taken(tmp_path: Path) -> None:
    wide = np.zeros((20, 60), dtype=np.uint8)
    wide[:, 22:38] = 255
    pillow.fromarray(wide).save(tmp_path / "grey.png")
    pillow.fromarray(np.stack([wide.T] * 4, axis=-1)).save(tmp_path / "tall_with_alpha.png")
    batch = images.load(tmp_path, 2, image_size=10)
    white = (1 - torch.tensor(images.IMAGENET_MEAN)) / torch.tensor(images.IMAGENET_STD)
    for image in batch.images:
        assert torch.allclose(image[:, 5, 5], white)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"cannot read image .*torn\.png .*repair or remove it"):
        images.load(tmp_path, 2)
    (tmp_path / "torn.png").write_text("text")
    with pytest.raises(InputError, match=r"torn\.png"):
        images.load(tmp_path, 2)


def test_missing_and_empty_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="noise, photos or a folder"):
        images.load(tmp_path / "absent", 2)
    with pytest.raises(InputError, match=r"holds no images .* 2 are asked for"):
        images.load(tmp_path, 2)
    picture(tmp_path / "one.png")
    with pytest.raises(InputError, match="holds 1 images"):
        images.load(tmp_path, 2)


def test_links_are_followed_once(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "one.png")
    picture(tmp_path / "b" / "two.png")
    (tmp_path / "b" / "back").symlink_to(tmp_path, target_is_directory=True)
    assert "2 of 2 files" in images.load(tmp_path, 2, image_size=8).description


@pytest.mark.parametrize("name", ["samples", "image_size", "num_classes"])
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be 1 or more, got 0"):
        images.load("noise", **{"samples": 2, name: 0})


@pytest.mark.parametrize(("module", "message"), [("PIL", "needs Pillow"), ("sklearn.datasets", "needs scikit-learn")])
def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, module: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{message}.*pip install 'lswag-fast\[photos\]'"):
        images.load("photos", 2)
