"""Published models, held to the float64 definitions; each test is skipped where its package is absent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lswag_fast
from lswag_fast import reference

SAMPLES = 6
# A weight behind a ReLU may see a gradient in a few samples only; float32 rounding then decides how small its sigma is.
LOG_TOLERANCE = 1e-2


def torchvision_model(name: str, **settings: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = pytest.importorskip("torchvision.models")
        model: nn.Module = getattr(models, name)(num_classes=10, **settings)
        return model

    return build


def timm_model(name: str, **settings: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = pytest.importorskip("timm").create_model(name, num_classes=10, **settings)
        return model

    return build


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def torchvision_vit() -> nn.Module:
    settings = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}
    model: nn.Module = pytest.importorskip("torchvision.models").VisionTransformer(num_classes=10, **settings)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # zero at first, which leaves every other layer no gradient
    return model


TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
MODELS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "torchvision resnet18": (torchvision_model("resnet18"), 64, "eval"),
    "torchvision resnet18 training": (torchvision_model("resnet18"), 64, "train"),
    "torchvision vit": (torchvision_vit, 32, "eval"),
    "torchvision swin_t": (torchvision_model("swin_t"), 64, "train"),
    "torchvision swin_v2_t": (torchvision_model("swin_v2_t"), 64, "eval"),
    "torchvision mobilenet_v3_small": (torchvision_model("mobilenet_v3_small"), 32, "eval"),
    "timm vit": (timm_model("vit_tiny_patch16_224", **TIMM_VIT), 32, "train"),
    "timm deit": (timm_model("deit_tiny_patch16_224", **TIMM_VIT), 32, "eval"),
    "timm swin": (
        timm_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1, 2, 1)),
        64,
        "eval",
    ),
    "transformers ViT": (transformers_vit, 32, "train"),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_models_score_as_defined(name: str) -> None:
    build, size, mode = MODELS[name]
    torch.manual_seed(0)
    model = build().train(mode == "train")
    images = torch.randn(SAMPLES, 3, size, size)
    labels = torch.arange(SAMPLES)
    result = lswag_fast.score(model, images, labels, dtype="float32")
    assert result.uncovered == ()
    names = [row.name for row in result.layers]
    parameters = dict(model.named_parameters())
    modules = (nn.Linear, nn.Conv2d)
    expected_names = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, modules)}
    expected_names |= {n for n in parameters if n.endswith("in_proj_weight")}
    assert set(names) == expected_names
    groups = result.options["groups"]

    def loss(output: object, target: torch.Tensor) -> torch.Tensor:
        logits = getattr(output, "logits", output)
        assert isinstance(logits, torch.Tensor)
        return nn.functional.cross_entropy(logits, target, reduction="none")

    expected = reference.lswag(model, images, labels, parameters=names, groups=groups, loss=loss)
    for row, moments in zip(result.layers, expected.moments, strict=True):
        if groups >= 4:
            assert row.log_sum_inverse_sigma == pytest.approx(moments.log_sum_inverse_sigma, abs=LOG_TOLERANCE), (
                row.name
            )
        assert row.mean_sigma == pytest.approx(float(moments.sigma.mean()), rel=1e-3, abs=1e-12), row.name
    assert result.counts.positions == expected.positions
    assert result.expressivity == pytest.approx(expected.expressivity, rel=2e-3)
    slow = {row.name for row in result.layers if row.slow is not None}
    if mode == "train" and "resnet" in name:
        assert slow == set(names)
    else:
        assert all("cpb_mlp" in n for n in slow)


def test_a_resnet_in_training_takes_two_groups() -> None:
    torch.manual_seed(0)
    model = torchvision_model("resnet18")().train()
    result = lswag_fast.score(model, torch.randn(4, 3, 64, 64))
    assert result.options["groups"] == 2
    assert any("bn1" in warning for warning in result.warnings)
