from __future__ import annotations

import csv
import gzip
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lswag_fast import Scorer, reference, score, spaces
from lswag_fast.errors import InputError

TABLES = Path(__file__).parents[3] / "shared/data/zero_cost_tables"
NAMES = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
EVERY_OPERATION = (2, 0, 3, 4, 2, 1)
PUBLISHED_FORM = "|nor_conv_3x3~0|+|skip_connect~0|avg_pool_3x3~1|+|nor_conv_1x1~0|nor_conv_3x3~1|none~2|"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def space() -> spaces.NASBench201Space:
    return spaces.get("nasbench201")


@pytest.mark.parametrize("form", [PUBLISHED_FORM, "|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|"])
def test_logits_and_gradients_are_those_of_the_published_definition(form: str) -> None:
    space = spaces.get("nasbench201", image_size=8, num_classes=5)
    network = space.build(form, seed=3).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():  # norms that are not 1 and 0
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    expected = published_logits(form, parameters, images)
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)
    F.cross_entropy(network(images), torch.tensor([0, 1, 4, 2])).backward()
    F.cross_entropy(expected, torch.tensor([0, 1, 4, 2])).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-8, atol=1e-10)


def published_logits(form: str, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The network of the NAS-Bench-201 paper, section 2.1, as a function of its parameters by published name."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(x, None, None, parameters[f"{name}.weight"], parameters[f"{name}.bias"], training=True)

    def relu_conv_norm(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = parameters[f"{name}.op.1.weight"]
        return norm(F.conv2d(F.relu(x), kernel, stride=stride, padding=kernel.shape[-1] // 2), f"{name}.op.2")

    def cell(x: Tensor, name: str) -> Tensor:
        nodes, layer = [x], 0
        for node in form.split("+"):
            total = torch.zeros_like(x)
            for operation, start in re.findall(r"(\w+)~(\d)", node):
                source = nodes[int(start)]
                if operation == "skip_connect":
                    total = total + source
                elif operation == "avg_pool_3x3":
                    total = total + F.avg_pool2d(source, 3, 1, 1, count_include_pad=False)
                elif operation == "none":
                    total = total + 0 * source
                else:
                    total = total + relu_conv_norm(source, f"{name}.layers.{layer}")
                layer += 1
            nodes.append(total)
        return nodes[3]

    x = norm(F.conv2d(images, parameters["stem.0.weight"], padding=1), "stem.1")
    for index in range(17):
        name = f"cells.{index}"
        if index in (5, 11):
            main = relu_conv_norm(relu_conv_norm(x, f"{name}.conv_a", stride=2), f"{name}.conv_b")
            x = F.conv2d(F.avg_pool2d(x, 2), parameters[f"{name}.downsample.1.weight"]) + main
        else:
            x = cell(x, name)
    pooled = F.relu(norm(x, "lastact.0")).mean(dim=(2, 3))
    return F.linear(pooled, parameters["classifier.weight"], parameters["classifier.bias"])


def test_weights_are_those_that_a_seeded_plain_constructor_draws(space: spaces.NASBench201Space) -> None:
    before = torch.get_rng_state()
    network = space.build(EVERY_OPERATION, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training
    torch.manual_seed(7)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            plain = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, bias=False)
            assert torch.equal(module.weight, plain.weight)
    plain_linear = nn.Linear(64, 10)
    assert torch.equal(network.classifier.weight, plain_linear.weight)
    assert torch.equal(network.classifier.bias, plain_linear.bias)
    assert not torch.equal(space.build(EVERY_OPERATION, seed=8).classifier.weight, plain_linear.weight)
    torch.set_rng_state(before)


@pytest.mark.parametrize("sizes", [{}, {"image_size": 16, "num_classes": 120}])
def test_params_and_macs_are_those_of_the_built_module(sizes: dict[str, int]) -> None:
    space = spaces.get("nasbench201", **sizes)
    for arch in [EVERY_OPERATION, (2,) * 6, *space.sample(3, seed=9)]:
        candidate = space.build(arch)
        assert space.params(arch) == sum(parameter.numel() for parameter in candidate.parameters())
        size = space.options["image_size"]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            candidate(torch.zeros(1, 3, size, size))
        assert 2 * space.macs(arch) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("task", "classes", "size"), [("cifar10", 10, 32), ("cifar100", 100, 32), ("ImageNet16-120", 120, 16)]
)
def test_params_and_macs_are_the_published_ones(task: str, classes: int, size: int) -> None:
    """Published flops add to the multiply-adds a fixed count for each ReLU, batch normalisation and pooling."""
    table = TABLES / f"nasbench201-{task}.csv.gz"
    if not table.exists():
        pytest.skip("the published zero-cost tables are not beside this checkout")
    with gzip.open(table, "rt") as file:
        rows = list(csv.DictReader(file))
    space = spaces.get("nasbench201", image_size=size, num_classes=classes)
    assert len(rows) > 700
    places = [16 * size**2, 32 * (size // 2) ** 2, 64 * (size // 4) ** 2]
    stem_and_end = 2 * places[0] + 3 * places[2] + 64 * (size // 4 + 1) ** 2
    blocks = 2 * places[0] + 7 * places[1] + 5 * places[2]
    for row in rows:
        operations = space.canonical(row["arch"])["ops"]
        convolutions, poolings = operations.count(2) + operations.count(3), operations.count(4)
        elementwise = stem_and_end + blocks + 5 * sum(places) * (3 * convolutions + 9 * poolings)
        assert round(float(row["params"]) * 1e6) == space.params(row["arch"])
        assert round(float(row["flops"]) * 1e6) == space.macs(row["arch"]) + elementwise


def test_cells_without_a_path_are_those_that_learned_nothing(shared_data: Path, space: spaces.NASBench201Space) -> None:
    """Counts know neither skips from zeros nor one edge from another; accuracies above chance do."""
    table = shared_data / "nasbench201_accuracy.csv.gz"
    if not table.exists():
        pytest.skip(f"the published table {table.name} is not there")
    with gzip.open(table, "rt", newline="") as file:
        learned = {row["arch"]: float(row["cifar10"]) > 15 for row in csv.DictReader(file)}
    assert list(learned) == [space.encode(arch) for arch in space]
    for arch, above_chance in learned.items():
        reached = {0}
        for node in re.sub(r"^\||\|$", "", space.published_form(arch)).split("|+|"):
            operations = [(name, int(start)) for name, start in re.findall(r"(\w+)~(\d)", node)]
            if any(name != "none" and start in reached for name, start in operations):
                reached.add(len(operations))
        assert above_chance == (3 in reached), arch


def test_every_spelling_is_the_same_candidate(space: spaces.NASBench201Space) -> None:
    text = "(2, 0, 3, 4, 2, 1)"
    spellings: list[Any] = [EVERY_OPERATION, list(EVERY_OPERATION), text, "[2,0,3,4,2,1]", PUBLISHED_FORM]
    for spelling in [*spellings, {"ops": list(EVERY_OPERATION)}, {"ops": text}]:
        assert space.canonical(spelling) == {"ops": list(EVERY_OPERATION)}
        assert space.encode(spelling) == text
        assert space.published_form(spelling) == PUBLISHED_FORM
    for encoded in (text, PUBLISHED_FORM, "[2, 0, 3, 4, 2, 1]\n", '{"ops": [2, 0, 3, 4, 2, 1]}', f'"{text}"'):
        assert space.decode(encoded) == {"ops": list(EVERY_OPERATION)}
    for arch in space.sample(50, seed=1):
        assert space.canonical(space.published_form(arch)) == arch == space.decode(space.encode(arch))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ((2, 0, 3, 4, 2), "six operation indices"),
        ((2, 0, 3, 4, 2, 5), r"edge \(2, 3\) of nasbench201 must be one of 0 skip_connect, .*; got 5"),
        ((2, 0, 3, True, 2, 1), r"edge \(1, 2\) .* got True"),
        ("(2, 0, 3)", "six operation indices"),
        ("resnet", "got 'resnet'"),
        (PUBLISHED_FORM.replace("none", "max_pool_3x3"), "got 'max_pool_3x3'"),
        (PUBLISHED_FORM.replace("~2", "~1"), "six operation indices"),
        ({"operations": [0] * 6}, "dict with ops alone, got operations"),
        (7, "got 7"),
    ],
)
def test_a_bad_arch_is_an_input_error(space: spaces.NASBench201Space, arch: Any, message: str) -> None:
    for call in (space.canonical, space.encode, space.params, space.macs, space.build):
        with pytest.raises(InputError, match=message):
            call(arch)


def test_a_bad_line_or_space_is_an_input_error(space: spaces.NASBench201Space) -> None:
    with pytest.raises(InputError, match="or JSON of it"):
        space.decode("{2, 0")
    with pytest.raises(InputError, match="nasbench201 has no option patch_size; it has image_size, num_classes"):
        spaces.get("nasbench201", patch_size=16)
    with pytest.raises(InputError, match="multiple of 4"):
        spaces.get("nasbench201", image_size=30)
    with pytest.raises(InputError, match="num_classes must be a positive integer, got 0"):
        spaces.get("nasbench201", num_classes=0)
    with pytest.raises(InputError, match=r"expected images \[S, 3, 32, 32\], got \[2, 3, 16, 16\]"):
        space.build((0,) * 6)(torch.zeros(2, 3, 16, 16))
    assert spaces.get(**space.options).options == {"name": "nasbench201", "image_size": 32, "num_classes": 10}


def test_all_candidates_are_streamed_in_order_and_sampled_without_repeats(space: spaces.NASBench201Space) -> None:
    everything = [tuple(arch["ops"]) for arch in space]
    assert len(everything) == space.size == 15_625
    assert everything == sorted(set(everything))
    drawn = [tuple(arch["ops"]) for arch in space.sample(space.size, seed=4)]
    assert drawn != everything
    assert sorted(drawn) == everything
    assert drawn[:100] == [tuple(arch["ops"]) for arch in space.sample(100, seed=4)]
    assert drawn[:100] != [tuple(arch["ops"]) for arch in space.sample(100, seed=5)]
    for edge in range(6):
        counts = Counter(ops[edge] for ops in drawn[:2000])
        assert all(abs(counts[operation] - 400) < 100 for operation in range(5))
    with pytest.raises(InputError, match="holds 15625 candidates"):
        space.sample(space.size + 1)


def test_a_score_is_that_of_the_definition() -> None:
    space = spaces.get("nasbench201", image_size=16)
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 10
    result = score(space.build(EVERY_OPERATION), images, labels, groups=4, dtype="float32")
    expected = reference.lswag(space.build(EVERY_OPERATION), images, labels, groups=4)
    assert result.expressivity == expected.expressivity
    assert result.trainability == pytest.approx(expected.trainability, rel=1e-4)
    assert result.counts.parameters == space.params(EVERY_OPERATION)
    assert result.counts.multiply_adds == space.macs(EVERY_OPERATION)


def test_degenerate_cells_are_scored_with_two_groups_by_default() -> None:
    space = spaces.get("nasbench201", image_size=8)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    degenerate = [(1,) * 6, (0,) * 6, (4,) * 6, (2, 1, 1, 1, 1, 1), (1, 1, 2, 1, 1, 1)]
    with Scorer(space, images, device="cpu", dtype="float32") as scorer:
        records = {space.encode(record.arch): record for record in scorer.score(degenerate)}
    assert scorer.options.groups == 2
    for arch in degenerate:
        record = records[str(arch)]
        assert (record.status, record.error) == ("ok", None)
        assert record.counts is not None
        assert record.counts.parameters == space.params(arch)
    unreached = [row for row in records["(2, 1, 1, 1, 1, 1)"].layers if row.name.startswith("cells.0.")]
    assert [row.dead for row in unreached] == [unreached[0].numel]
