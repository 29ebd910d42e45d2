from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from original_autoformer import original_candidate, original_supernet
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lswag_fast import spaces
from lswag_fast.errors import InputError
from lswag_fast.spaces.autoformer_module import MAX_DISTANCE

PUBLISHED = Path(__file__).parents[3] / "shared/data/vit/autoformer_tiny_accuracy.jsonl"
NAMES = ("autoformer-tiny", "autoformer-small", "autoformer-base")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small() -> spaces.AutoFormerSpace:
    return spaces.get("autoformer-tiny", image_size=64, num_classes=10)


def lively_supernet(space: spaces.AutoFormerSpace, dtype: torch.dtype) -> spaces.AutoFormerSupernet:
    """A supernet whose every parameter matters: larger weights, biases and norms that are not 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    state = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in space.supernet(seed=2).state_dict().items()
    }
    return space.supernet(state_dict=state).cast(dtype)


def images_for(space: spaces.AutoFormerSpace, samples: int, dtype: torch.dtype) -> Tensor:
    size = space.options["image_size"]
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


# A grid of 18 x 18 patches has distances up to 17, beyond the clip at 14.
SIZES = [("autoformer-tiny", 64, 16), ("autoformer-tiny", 96, 16), ("autoformer-small", 64, 16)]
CLIPPED = ("autoformer-tiny", 72, 4)


@pytest.mark.parametrize(("name", "image_size", "patch_size"), [*SIZES, ("autoformer-base", 32, 16), CLIPPED])
def test_subnet_gives_the_logits_and_gradients_of_the_original(name: str, image_size: int, patch_size: int) -> None:
    space = spaces.get(name, image_size=image_size, patch_size=patch_size, num_classes=7)
    supernet = lively_supernet(space, torch.float64)
    original = original_supernet(space, supernet.state_dict())
    images = images_for(space, 2, torch.float64)
    labels = torch.tensor([1, 4])
    for arch in space.sample(3 if name == "autoformer-tiny" and patch_size == 16 else 1, seed=5):
        subnet = supernet.subnet(arch)
        original.set_sample_config(arch)
        original.zero_grad()
        logits, expected = subnet(images), original(images)
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        assert expected.std() > 0.1
        F.cross_entropy(logits, labels).backward()
        F.cross_entropy(expected, labels).backward()
        full_grads = {parameter: value.grad for parameter, value in original.named_parameters()}
        for parameter, value in subnet.named_parameters():
            full = full_grads[parameter]
            assert full is not None
            assert value.grad is not None
            ours = value.grad
            theirs = full[tuple(slice(0, width) for width in ours.shape)]
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=lambda m, p=parameter: f"{p}: {m}")
            assert full.abs().sum() == pytest.approx(theirs.abs().sum().item(), rel=1e-12), parameter


@pytest.mark.parametrize("name", NAMES)
def test_subnet_gives_the_logits_of_the_original_to_float32_rounding(name: str) -> None:
    space = spaces.get(name, image_size=96, num_classes=10)
    supernet = space.supernet(seed=1)
    original = original_supernet(space, supernet.state_dict())
    images = images_for(space, 2, torch.float32)
    for arch in space.sample(2, seed=6):
        original.set_sample_config(arch)
        with torch.no_grad():
            torch.testing.assert_close(supernet.subnet(arch)(images), original(images), rtol=1e-4, atol=2e-6)


def test_a_built_candidate_equals_the_original_alone_at_its_own_size(small: spaces.AutoFormerSpace) -> None:
    arch = next(small.sample(1, seed=8))
    candidate = small.build(arch, seed=4).double()
    original = original_candidate(small, arch, candidate.state_dict())
    images = images_for(small, 2, torch.float64)
    torch.testing.assert_close(candidate(images), original(images), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_params_and_macs_are_those_of_the_built_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lswag_fast.spaces.autoformer_module.relative_attention", countable_attention)
    space = spaces.get(name, image_size=48, num_classes=11)
    for arch in space.sample(3, seed=9):
        candidate = space.build(arch)
        assert space.params(arch) == sum(parameter.numel() for parameter in candidate.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            candidate(torch.zeros(1, 3, 48, 48))
        assert 2 * space.macs(arch) == counter.get_total_flops()


def countable_attention(
    qkv: Tensor,
    key_tables: tuple[Tensor, Tensor],
    value_tables: tuple[Tensor, Tensor],
    *,
    heads: int,
    grid: tuple[int, int],
) -> Tensor:
    """The attention's arithmetic in matrix products that torch's counter sees; gathers and scatters count nothing."""
    samples, tokens, _ = qkv.shape
    q, k, v = qkv.reshape(samples, tokens, 3, heads, 64).permute(2, 0, 3, 1, 4)
    patches = torch.arange(tokens - 1)
    logits, outputs = q @ k.transpose(2, 3), []
    indices = []
    for axis, table in zip((patches // grid[1], patches % grid[1]), key_tables, strict=True):
        offsets = (axis[None, :] - axis[:, None]).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE + 1
        indices.append(F.pad(offsets, (1, 0, 1, 0)).expand(samples, heads, tokens, tokens))
        logits = logits + (q @ table.T).gather(3, indices[-1])
    probabilities = (logits / 8).softmax(3)
    outputs.append(probabilities @ v)
    for index, table in zip(indices, value_tables, strict=True):
        by_offset = torch.zeros(samples, heads, tokens, len(table)).scatter_add(3, index, probabilities)
        outputs.append(by_offset @ table)
    return torch.stack(outputs).sum(0).transpose(1, 2).flatten(2)


def test_counts_agree_with_those_published_for_the_tiny_model() -> None:
    """Depth 13, width 192: 5.7 M parameters and 1.3 G multiply-adds (ICCV 2021, the ImageNet table)."""
    arch = {"embed_dim": 192, "depth": 13, "num_heads": [3] * 13, "mlp_ratio": [3.5] * 13}
    space = spaces.get("autoformer-tiny")
    assert space.params(arch) == pytest.approx(5.7e6, rel=0.02)
    assert space.macs(arch) == pytest.approx(1.3e9, rel=0.02)


def test_subnet_parameters_are_views_of_the_supernet(small: spaces.AutoFormerSpace) -> None:
    supernet = small.supernet()
    arch = next(small.sample(1))
    subnet = supernet.subnet(arch)
    for name, parameter in subnet.named_parameters():
        full = supernet.state_dict()[name]
        assert parameter.untyped_storage().data_ptr() == full.untyped_storage().data_ptr(), name
        assert parameter.data_ptr() == full.data_ptr(), name
        assert parameter.requires_grad
        torch.testing.assert_close(parameter.data, full[tuple(slice(0, width) for width in parameter.shape)])
    supernet.state_dict()["norm.weight"].mul_(2)
    assert torch.equal(subnet.norm.weight, torch.full((arch["embed_dim"],), 2.0))


def test_build_copies_the_slices_of_a_supernet(small: spaces.AutoFormerSpace) -> None:
    supernet = small.supernet(seed=3)
    arch = next(small.sample(1))
    candidate, subnet = small.build(arch, supernet=supernet), supernet.subnet(arch)
    storages = {value.untyped_storage().data_ptr() for value in supernet.state_dict().values()}
    for (name, parameter), view in zip(candidate.named_parameters(), subnet.parameters(), strict=True):
        assert torch.equal(parameter, view), name
        assert parameter.untyped_storage().data_ptr() not in storages, name
        assert parameter.is_contiguous(), name
    images = images_for(small, 1, torch.float32)
    torch.testing.assert_close(candidate(images), subnet(images), rtol=1e-4, atol=1e-6)


def test_build_is_a_fresh_reproducible_draw_that_leaves_the_global_generator_alone(
    small: spaces.AutoFormerSpace,
) -> None:
    arch = next(small.sample(1))
    before = torch.get_rng_state()
    first, again, other = (small.build(arch, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        constant = name.endswith("norm.weight") or (name.endswith("bias") and "patch_embed" not in name)
        assert torch.equal(parameter, other.get_parameter(name)) == constant, name
        if constant:
            assert torch.all(parameter == float(name.endswith("weight"))), name
        elif "patch_embed" in name:
            bound = (3 * 16 * 16) ** -0.5
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name


def test_a_candidate_is_a_plain_module(small: spaces.AutoFormerSpace) -> None:
    candidate = small.supernet().subnet(next(small.sample(1)))
    assert sum(isinstance(module, torch.nn.GELU) for module in candidate.modules()) == candidate.arch["depth"]
    images = images_for(small, 2, torch.float32)
    clone = copy.deepcopy(candidate)
    torch.testing.assert_close(clone(images), candidate(images), rtol=1e-4, atol=1e-6)
    assert clone.norm.weight.data_ptr() != candidate.norm.weight.data_ptr()
    with pytest.raises(InputError, match=r"expected images \[S, 3, 64, 64\], got \[2, 3, 32, 32\]"):
        candidate(torch.zeros(2, 3, 32, 32))


def test_supernet_state_dict_round_trips_in_both_published_forms(small: spaces.AutoFormerSpace) -> None:
    supernet = small.supernet(seed=7)
    original = original_supernet(small, supernet.state_dict())
    assert original.state_dict().keys() == supernet.state_dict().keys()
    for form in (original.state_dict(), {"model": original.state_dict(), "epoch": 499}):
        loaded = small.supernet(state_dict=form)
        assert loaded.digest() == supernet.digest()
        for name, value in loaded.state_dict().items():
            assert value.data_ptr() != original.state_dict()[name].data_ptr()
            assert not value.requires_grad


def test_digest_follows_every_value_and_the_dtype(small: spaces.AutoFormerSpace) -> None:
    supernet = small.supernet(seed=7)
    first = supernet.digest()
    assert len(first) == 64
    assert small.supernet(seed=7).digest() == first
    assert small.supernet(seed=8).digest() != first
    assert supernet.cast(torch.bfloat16).digest() not in (first, supernet.cast(torch.float64).digest())
    supernet.state_dict()["blocks.3.fc1.bias"][5] += 1e-3
    assert supernet.digest() != first


def test_cast_leaves_the_supernet_as_it_is(small: spaces.AutoFormerSpace) -> None:
    supernet = small.supernet()
    cast = supernet.cast(torch.bfloat16)
    arch = next(small.sample(1))
    assert {value.dtype for value in cast.subnet(arch).parameters()} == {torch.bfloat16}
    assert {value.dtype for value in supernet.subnet(arch).parameters()} == {torch.float32}
    assert cast.subnet(arch)(images_for(small, 2, torch.bfloat16)).dtype == torch.bfloat16
    assert {value.device.type for value in supernet.to("meta").subnet(arch).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), "missing head.bias; unexpected none"),
        (lambda state: state.update(extra=torch.zeros(1)), "missing none; unexpected extra"),
        (lambda state: state.update({"norm.bias": torch.zeros(3)}), r"norm.bias \[3\] \(expected \[256\]\)"),
        (lambda state: state.update({"norm.bias": 3}), "maps names to tensors"),
        (lambda state: state.clear(), "missing patch_embed_super.proj.weight, .* and 228 more"),
    ],
)
def test_a_wrong_state_dict_is_an_input_error(small: spaces.AutoFormerSpace, change: Any, message: str) -> None:
    state = small.supernet().state_dict()
    change(state)
    with pytest.raises(InputError, match=message):
        small.supernet(state_dict=state)


def test_a_supernet_of_another_space_is_an_input_error(small: spaces.AutoFormerSpace) -> None:
    other = spaces.get("autoformer-tiny", image_size=96, num_classes=10).supernet()
    with pytest.raises(InputError, match="'image_size': 96"):
        small.build(next(small.sample(1)), supernet=other)


def test_encoding_is_canonical_and_round_trips(small: spaces.AutoFormerSpace) -> None:
    for arch in small.sample(20, seed=2):
        text = small.encode(arch)
        assert "\n" not in text
        assert small.decode(text) == arch
        published = {"num_heads": tuple(arch["num_heads"]), "hidden_dim": float(arch["embed_dim"])}
        published |= {"mlp_ratio": [*arch["mlp_ratio"], 99], "depth": arch["depth"]}
        assert small.encode(published) == text
        canonical = small.canonical(published)
        assert type(canonical["embed_dim"]) is int
        assert {type(ratio) for ratio in canonical["mlp_ratio"]} == {float}
    with pytest.raises(InputError, match="one JSON object"):
        small.decode("{")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 200}, "embed_dim of autoformer-tiny must be one of 192, 216, 240, got 200"),
        ({"depth": 11}, "depth of autoformer-tiny must be one of 12, 13, 14, got 11"),
        ({"num_heads": [3] * 11 + [5]}, r"num_heads\[11\] of autoformer-tiny must be one of 3, 4, got 5"),
        ({"mlp_ratio": [3.5] * 2 + ["4"] * 10}, r"mlp_ratio\[2\] of autoformer-tiny must be one of 3.5, 4.0, got '4'"),
        ({"num_heads": [3] * 11}, "num_heads needs one entry a layer: depth is 12, got 11 entries"),
        ({"num_heads": 3}, r"num_heads must be a list with one entry a layer \(12\), got 3"),
        ({"hidden_dim": 192}, "both embed_dim and hidden_dim"),
        ({"heads": 3}, "missing: none; unknown: heads"),
        ({"depth": None}, "depth of autoformer-tiny must be one of 12, 13, 14, got None"),
    ],
)
def test_a_bad_arch_is_an_input_error(small: spaces.AutoFormerSpace, change: dict[str, Any], message: str) -> None:
    arch = {"embed_dim": 192, "depth": 12, "num_heads": [3] * 12, "mlp_ratio": [4.0] * 12}
    small.canonical(arch)
    for call in (small.canonical, small.encode, small.params, small.macs, small.build):
        with pytest.raises(InputError, match=message):
            call({**arch, **change})


def test_an_arch_that_lacks_fields_or_is_no_dict_is_an_input_error(small: spaces.AutoFormerSpace) -> None:
    with pytest.raises(InputError, match="missing: embed_dim, mlp_ratio, num_heads; unknown: none"):
        small.canonical({"depth": 12})
    with pytest.raises(InputError, match="got str"):
        small.canonical("autoformer")  # type: ignore[arg-type]


def test_a_bad_space_is_an_input_error() -> None:
    with pytest.raises(InputError, match="'autoformer'; there are autoformer-tiny, autoformer-small, autoformer-base"):
        spaces.get("autoformer")
    with pytest.raises(InputError, match=r"multiple of patch_size \(16\), got 100"):
        spaces.get("autoformer-tiny", image_size=100)
    with pytest.raises(InputError, match="num_classes must be a positive integer, got 0"):
        spaces.get("autoformer-tiny", num_classes=0)


def test_options_name_the_space_completely() -> None:
    space = spaces.get("autoformer-base", image_size=96, patch_size=8, num_classes=3)
    assert space.options == {"name": "autoformer-base", "image_size": 96, "patch_size": 8, "num_classes": 3}
    assert spaces.get(**space.options).options == space.options
    assert space.coupled is False


def test_published_tables_can_be_read() -> None:
    if not PUBLISHED.exists():
        pytest.skip("the published AutoFormer-Tiny accuracies are not beside this checkout")
    space = spaces.get("autoformer-tiny")
    archs = [space.canonical(json.loads(line)["arch"]) for line in PUBLISHED.read_text().splitlines()]
    assert len(archs) == 100
    assert len({space.encode(arch) for arch in archs}) == 100
    assert all(5e6 < space.params(arch) < 11e6 for arch in archs)
