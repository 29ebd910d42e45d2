from __future__ import annotations

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import CLASSES, IMAGE
from torch import Tensor, nn

import lswag_fast
from lswag_fast import reference

FUSED: dict[str, list[str]] = {
    "Attention": [
        "tokens.patch.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "mlp.0.weight",
        "mlp.2.weight",
        "head.weight",
    ],
    "SequenceFirst": ["tokens.patch.weight"]
    + [
        f"encoder.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    ]
    + ["head.weight"],
    "Tied": ["tokens.patch.weight", "weight", "head.weight"],
    "Repeated": ["tokens.patch.weight", "layer.weight", "head.weight"],
    "TokenMixing": ["tokens.patch.weight", "mix", "channel", "head.weight"],
    "Interleaved": ["tokens.patch.weight", "qkv", "wide", "head.weight"],
    "Windows": ["tokens.patch.weight", "window.weight", "inner.weight", "head.weight"],
    "Folded": ["tokens.patch.weight", "inner.weight", "head.weight"],
    "Unused": ["tokens.patch.weight", "aside.weight", "frozen.weight", "head.weight"],
    "Queries": ["tokens.patch.weight", "key.weight", "head.weight"],
    "RelativeTable": ["tokens.patch.weight", "value.weight", "head.weight"],
    "Cached": ["tokens.patch.weight", "head.weight"],
    "Convolutions": ["stem.weight", "depthwise.weight", "grouped.weight", "line.weight", "head.weight"],
}
SLOW: dict[str, list[str]] = {
    "Batched": ["heads", "out", "last"],
    "SharedTable": ["table.weight"],
    "Derived": [
        "masked",
        "wide",
        "normed.parametrizations.weight.original1",
        "up",
        "down",
        "first",
        "second",
    ],
    "Between": ["inner.weight"],
    "NoSampleAxis": ["bias_mlp.0.weight", "bias_mlp.2.weight"],
    "Convolutions": ["same.weight"],
    "Dilations": ["kernel"],
    "Recurrent": ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "cell.weight_ih", "cell.weight_hh"],
}
NAMES = sorted(FUSED.keys() | SLOW.keys())


def batch(samples: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, *IMAGE, generator=generator)
    return images, torch.randint(CLASSES, (samples,), generator=generator)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = getattr(networks, name)()
    return network


def assert_as_reference(model: nn.Module, groups: int, **options: object) -> lswag_fast.LswagResult:
    """Holds a float32 score to the float64 definitions, layer by layer, and returns it."""
    images, labels = batch()
    result = lswag_fast.score(model, images, labels, groups=groups, dtype="float32", **options)  # type: ignore[arg-type]
    names = [row.name for row in result.layers]
    expected = reference.lswag(model, images, labels, parameters=names, groups=groups, **options)  # type: ignore[arg-type]
    for row, moments in zip(result.layers, expected.moments, strict=True):
        if not row.in_window:
            continue
        assert row.dead == int(moments.dead.sum()), row.name
        assert row.log_sum_inverse_sigma == pytest.approx(moments.log_sum_inverse_sigma, abs=1e-5), row.name
        assert row.log_sum_mean_over_sigma == pytest.approx(moments.log_sum_mean_over_sigma, abs=1e-5), row.name
        assert row.mean_sigma == pytest.approx(float(moments.sigma.mean()), rel=1e-5, abs=1e-12), row.name
        assert row.mean_abs_gradient == pytest.approx(float(moments.mean_abs.mean()), rel=1e-5, abs=1e-12), row.name
    assert result.expressivity == expected.expressivity
    assert result.trainability == pytest.approx(expected.trainability, abs=1e-4)
    assert result.counts.positions == expected.positions
    assert result.uncovered == ()
    return result


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_found_and_scored_as_defined(name: str) -> None:
    result = assert_as_reference(build(name), groups=8)
    fused = [row.name for row in result.layers if row.slow is None]
    slow = [row.name for row in result.layers if row.slow is not None]
    if name in FUSED:
        assert fused == FUSED[name]
    assert sorted(slow) == sorted(SLOW.get(name, []))
    assert any("one forward and backward pass a group" in w for w in result.warnings) == bool(slow)


@pytest.mark.parametrize("name", ["Attention", "Convolutions", "Batched", "Windows"])
def test_groups_of_two_samples(name: str) -> None:
    assert_as_reference(build(name), groups=4)


@pytest.mark.parametrize("options", [
    {"window": (40, 80)},
    {"window": (50, 100), "pooling": "sum"},
    {"window": (40, 80), "patterns_inside_window": True},
    {"pattern_samples": 5},
    {"numerator": "mean"},
], ids=str)  # fmt: skip
def test_options_select_as_defined(options: dict[str, object]) -> None:
    assert_as_reference(build("Attention"), groups=8, **options)


def test_patterns_after_the_window_do_not_count() -> None:
    whole = assert_as_reference(build("SequenceFirst"), groups=8)
    early = assert_as_reference(build("SequenceFirst"), groups=8, window=(0, 50))
    assert early.counts.positions < whole.counts.positions


def test_dead_layer_is_reported() -> None:
    result = assert_as_reference(build("Unused"), groups=8)
    aside = next(row for row in result.layers if row.name == "aside.weight")
    assert aside.dead == aside.numel
    assert aside.log_sum_inverse_sigma is None
    assert any("aside.weight" in warning and "dead" in warning for warning in result.warnings)


def test_batch_normalisation_in_training_couples_the_samples() -> None:
    torch.manual_seed(0)
    model = networks.Convolutions(norm=True)
    images, labels = batch()
    result = lswag_fast.score(model, images, labels, dtype="float32")
    assert result.options["groups"] == 2
    assert any("coupled by norm" in warning and "groups=2 was chosen" in warning for warning in result.warnings)
    with pytest.raises(lswag_fast.InputError, match="coupled"):
        lswag_fast.score(model, images, labels, groups=8, dtype="float32")
    assert_as_reference(model, groups=4)


def test_batch_normalisation_in_evaluation_does_not() -> None:
    torch.manual_seed(0)
    result = assert_as_reference(networks.Convolutions(norm=True).eval(), groups=8)
    assert [row.name for row in result.layers if row.slow] == ["same.weight"]


def test_extra_parameters_are_scored_as_layers() -> None:
    model = build("Attention")
    images, labels = batch()
    extra = ("position", "norm.weight", "head.bias")
    result = lswag_fast.score(model, images, labels, dtype="float32", extra_parameters=extra)
    names = [row.name for row in result.layers]
    assert names[-3:] == list(extra)
    gradients = reference.group_gradients(model, images, labels, 8, extra)
    for name in extra:
        expected = reference.moments_of(gradients[name]).log_sum_inverse_sigma
        assert result.layers[names.index(name)].log_sum_inverse_sigma == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["Attention", "Convolutions", "Windows", "SequenceFirst", "Tied"])
def test_bfloat16_is_close_to_float32(name: str) -> None:
    model = build(name)
    images, labels = batch(16)
    exact = lswag_fast.score(model, images, labels, dtype="float32")
    rounded = lswag_fast.score(model, images, labels, dtype="bfloat16")
    assert rounded.options["dtype"] == "bfloat16"
    for a, b in zip(exact.layers, rounded.layers, strict=True):
        # bf16 keeps 8 bits; a handful of nearly dead weights in such small layers moves a sum by some percent.
        assert b.log_sum_inverse_sigma == pytest.approx(a.log_sum_inverse_sigma, abs=0.2), a.name


def test_same_bits_again() -> None:
    model = build("Attention")
    images, labels = batch()
    first = lswag_fast.score(model, images, labels)
    lswag_fast.score(build("Convolutions"), images, labels)
    again = lswag_fast.score(model, images, labels)
    assert first.layers == again.layers
    assert first.lswag == again.lswag


def test_a_custom_loss_and_structured_outputs() -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("Attention")

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.inner(images)}

    model = Structured()
    images, labels = batch()
    plain = lswag_fast.score(model.inner, images, labels, dtype="float32")
    assert lswag_fast.score(model, images, labels, dtype="float32").lswag == plain.lswag

    def margin(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return (output["logits"] - target[:, None]).square().mean(1)

    targets = labels.float()
    scored = lswag_fast.score(model, images, targets, loss=margin, dtype="float32")
    expected = reference.lswag(
        model, images, targets, loss=margin, groups=8, parameters=[row.name for row in scored.layers]
    )
    assert scored.trainability == pytest.approx(expected.trainability, abs=1e-4)


def test_a_loss_may_use_products_and_activations_of_its_own() -> None:
    def smooth(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        centred = output @ (torch.eye(CLASSES, dtype=output.dtype, device=output.device) - 1 / CLASSES)
        return nn.functional.gelu(centred * target[:, None]).square().sum(1)

    images, labels = batch()
    model, targets = build("Attention"), labels.float()
    scored = lswag_fast.score(model, images, targets, loss=smooth, dtype="float32")
    names = [row.name for row in scored.layers]
    terms = reference.group_gradients(model, images, targets, 8, names, smooth)
    for row in scored.layers:
        expected = reference.moments_of(terms[row.name]).log_sum_inverse_sigma
        assert row.log_sum_inverse_sigma == pytest.approx(expected, abs=1e-5), row.name


def test_weights_that_nothing_covers_are_named_once() -> None:

    class Opaque(networks.Base):
        def __init__(self) -> None:
            super().__init__()
            self.secret = nn.Parameter(torch.randn(12, 12))

        def body(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                gate = (x @ self.secret).sigmoid()
            return x.relu() * gate

    images, labels = batch()
    with pytest.warns(UserWarning, match="secret") as caught:
        result = lswag_fast.score(Opaque(), images, labels)
    assert result.uncovered == ("secret",)
    assert len(caught) == 1


class Named(networks.Base):
    """Attention and a product of activations, their operands by name or by place."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.named = named

    def body(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if not self.named:
            return F.gelu(torch.bmm(F.scaled_dot_product_attention(q, k, v), x.transpose(1, 2)) @ x)
        attended = F.scaled_dot_product_attention(query=q, key=k, value=v)
        return F.gelu(torch.bmm(input=attended, mat2=x.transpose(1, 2)) @ x)


def test_an_activation_whose_samples_are_not_known_is_left_out() -> None:
    images, labels = batch()
    result = lswag_fast.score(build("BetweenActivation"), images, labels, dtype="float32")
    assert result.counts.positions == 16 * 12
    assert any("1 activations are not counted in Psi" in warning for warning in result.warnings)


def test_operands_may_be_given_by_name() -> None:
    images, labels = torch.randn(6, *IMAGE), torch.arange(6) % CLASSES
    found = []
    for named in (False, True):
        torch.manual_seed(0)
        model = Named(named)
        found.append(lswag_fast.score(model, images, labels, dtype="float32", proxies=("lambda", "flops", "dss")))
    assert found[0].proxies == found[1].proxies
