"""Proxies with passes of their own, against lswag_fast/reference_proxies.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import proxy_networks as networks
import pytest
import torch
from networks import Cached
from proxy_networks import CLASSES, evidence_of, unavailable
from torch import Tensor, nn

import lswag_fast
from lswag_fast import reference_proxies as reference
from lswag_fast.proxies import registry
from lswag_fast.proxies.dss import Dss
from lswag_fast.proxies.epe_nas import EpeNas
from lswag_fast.proxies.evidence import Evidence
from lswag_fast.proxies.grasp import Grasp
from lswag_fast.proxies.jacov import Jacov
from lswag_fast.proxies.proxy import Proxy
from lswag_fast.proxies.synflow import Synflow
from lswag_fast.proxies.zen import Zen

ALL = (Jacov(), EpeNas(), Synflow(), Grasp(), Zen(), Dss())
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "convnet": (networks.convnet, networks.SIZE),
    "convnet in training": (lambda: networks.convnet(training=True), networks.SIZE),
    "plain": (networks.plain, networks.SIZE),
    "transformer": (networks.transformer, networks.SIZE),
    "autoformer": (networks.autoformer, 32),
}


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    make, size = CASES[request.param]
    return make(), *networks.batch(size=size)


def names_of(evidence: Evidence) -> list[str]:
    return [layer.name for layer in evidence.layers]


def test_names_and_sources():
    for proxy in ALL:
        assert registry.get(proxy.name) is type(proxy)
        assert proxy.source
        assert proxy.to_dict()["name"] == proxy.name


def test_jacobian(case: tuple[nn.Module, Tensor, Tensor]):
    model, images, labels = case
    with evidence_of(model, images, labels) as evidence:
        jacobian = evidence.network.input_jacobian
    expected = reference.input_jacobian(model, images)
    assert jacobian.dtype is torch.float32
    assert (jacobian - expected).norm() < 1e-5 * expected.norm()


def test_jacov(case: tuple[nn.Module, Tensor, Tensor]):
    model, images, labels = case
    with evidence_of(model, images, labels) as evidence:
        value, jacobian = Jacov().value(evidence), evidence.network.input_jacobian
        conditioning = Jacov().details(evidence)["conditioning"]
    assert value == pytest.approx(reference.jacov(jacobian), rel=1e-9)
    assert value == pytest.approx(reference.jacov(reference.input_jacobian(model, images)), rel=1e-4)
    assert 1 <= conditioning < len(images) * 1e5


@pytest.mark.parametrize("classes", [CLASSES, 101])
def test_epe_nas(classes: int):
    torch.manual_seed(4)
    model = networks.ConvNet(classes).eval()
    images, _ = networks.batch(9)
    labels = torch.tensor([0, 2, 0, 2, 2, 1, 0, 3, 3])
    with evidence_of(model, images, labels) as evidence:
        value, jacobian = EpeNas().value(evidence), evidence.network.input_jacobian
    assert value == pytest.approx(reference.epe_nas(jacobian, labels, classes), rel=1e-9)
    expected = reference.epe_nas(reference.input_jacobian(model, images), labels, classes)
    assert value == pytest.approx(expected, rel=1e-4)


def test_epe_nas_of_networks(case: tuple[nn.Module, Tensor, Tensor]):
    model, images, labels = case
    with evidence_of(model, images, labels) as evidence:
        value = EpeNas().value(evidence)
    expected = reference.epe_nas(reference.input_jacobian(model, images), labels, CLASSES)
    assert value == pytest.approx(expected, rel=1e-4)


def test_synflow(case: tuple[nn.Module, Tensor, Tensor]):
    model, images, labels = case
    with evidence_of(model, images, labels) as evidence:
        value = Synflow().value(evidence)
        expected = reference.synflow(model, images.shape[1:], names_of(evidence))
    assert value == pytest.approx(expected, rel=1e-12)


def test_synflow_of_a_linear_network_is_conserved():
    """Without biases every layer has the sum R, which is the product of the absolute matrices with ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(n, m, bias=False) for n, m in ((12, 7), (7, 9), (9, 3))))
    images = torch.randn(4, 3, 2, 2)
    flow = torch.ones(12, dtype=torch.float64)
    for layer in list(model)[1:]:
        flow = layer.weight.detach().double().abs() @ flow
    with evidence_of(model, images, torch.zeros(4, dtype=torch.long)) as evidence:
        assert Synflow().value(evidence) == pytest.approx(math.log(3 * float(flow.sum())), rel=1e-12)


def test_grasp(case: tuple[nn.Module, Tensor, Tensor]):
    model, images, labels = case
    with evidence_of(model, images, labels) as evidence:
        value, conditioning = Grasp().value(evidence), Grasp().details(evidence)["conditioning"]
        names = names_of(evidence)
        weights = {n: p.requires_grad_() for n, p in evidence.network.parameters().items() if n in names}
        loss = evidence.network.losses(evidence.network.run(images, weights)).mean()
        found = torch.autograd.grad(loss, list(weights.values()))
        for weight in weights.values():
            weight.requires_grad_(False)
    gradients = dict(zip(weights, found, strict=True))
    model = model if model.training else model.eval()
    expected = reference.grasp(model, images, labels, gradients)
    assert value == pytest.approx(expected, rel=1e-4)
    assert conditioning >= 1
    exact = reference.weight_gradients(model, images, labels, names)
    assert value == pytest.approx(reference.grasp(model, images, labels, exact), rel=1e-4)


def test_grasp_of_a_quadratic_loss():
    """With loss |w x|^2 / 2, H g is known: g = w X, H g = w X X, with X the mean of x x^T."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    images = torch.randn(6, 1, 2, 2)
    x = images.flatten(1).double()
    w, second = model[1].weight.detach().double(), x.T @ x / len(x)
    with evidence_of(model, images, torch.zeros(6), loss=lambda y, _: y.square().sum(1) / 2) as evidence:
        assert Grasp().value(evidence) == pytest.approx(-float((w * (w @ second @ second)).sum()), rel=1e-5)


def test_grasp_writes_no_gradient_to_leaves_of_others():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(CLASSES))
            self.unreached = nn.Parameter(torch.ones(CLASSES))
            self.unreached.grad = torch.full((CLASSES,), 3.0)

        def forward(self, output: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output * self.scale, labels, reduction="none")

    model, loss, (images, labels) = networks.plain(), Scaled(), networks.batch()
    result = lswag_fast.score(model, images, labels, loss=loss, dtype="float32", proxies=("grasp",))
    assert math.isfinite(result.proxies["grasp"])
    assert loss.scale.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(loss.unreached.grad, torch.full((CLASSES,), 3.0))


def test_grasp_divides_the_logits_by_the_temperature():
    images, labels = networks.batch()
    model, cooled = networks.plain(), networks.plain()
    with torch.no_grad():
        cooled.head.weight /= 3
        cooled.head.bias /= 3
    with evidence_of(model, images, labels) as evidence:
        names = names_of(evidence)
        value = Grasp(temperature=3).value(evidence)
        assert Grasp().value(evidence) != pytest.approx(value, rel=0.1)
    # The same function of the weights, but that the head's is divided: so is its g, and each side of its H.
    gradients = reference.weight_gradients(cooled, images, labels, names)
    gradients["head.weight"] /= 9
    assert value == pytest.approx(reference.grasp(cooled, images, labels, gradients), rel=1e-4)


def test_dss_of_a_transformer():
    model, (images, labels) = networks.transformer(), networks.batch()
    with evidence_of(model, images, labels) as evidence:
        value, parts = Dss().value(evidence), Dss().details(evidence)
    expected = reference.dss(model, images.shape[1:], model.attention, model.other_matrices)
    assert value == pytest.approx(expected, rel=1e-9)
    assert parts["diversity"] == pytest.approx(reference.dss(model, images.shape[1:], model.attention, ()), rel=1e-9)


def test_dss_of_an_autoformer():
    model, (images, labels) = networks.autoformer(), networks.batch(size=32)
    names = [name for name, p in model.named_parameters() if name.endswith("weight") and p.dim() == 2]
    attention = [name for name in names if ".attn." in name]
    others = [name for name in names if name not in attention]
    assert len(attention) == 2 * len(model.blocks)
    assert len(others) == 2 * len(model.blocks) + 1
    with evidence_of(model, images, labels) as evidence:
        value = Dss().value(evidence)
    assert value == pytest.approx(reference.dss(model, images.shape[1:], attention, others), rel=1e-9)


def test_dss_needs_attention():
    images, labels = networks.batch()
    with (
        evidence_of(networks.convnet(), images, labels) as evidence,
        unavailable("transformers"),
    ):
        Dss().value(evidence)


@pytest.mark.parametrize("proxy", ALL, ids=lambda p: p.name)
def test_the_first_of_several_outputs_is_scored(proxy: Proxy):
    images, labels = networks.batch()
    model = networks.transformer() if isinstance(proxy, Dss) else networks.convnet()
    values = []
    for network in (model, networks.Named(model)):
        with evidence_of(network, images, labels) as evidence:
            values.append(proxy.value(evidence))
    assert values[0] == values[1]


@pytest.mark.parametrize("proxy", ALL, ids=lambda p: p.name)
def test_a_proxy_leaves_no_trace_and_repeats_its_bits(proxy: Proxy):
    images, labels = networks.batch()
    model = networks.transformer() if isinstance(proxy, Dss) else networks.convnet(training=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = []
    for _ in range(2):
        with evidence_of(model, images, labels) as evidence:
            values.append(proxy.value(evidence))
            assert not evidence.network.images.requires_grad
            assert not any(p.requires_grad for p in evidence.network.parameters().values())
    assert values[0] == values[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("proxy", ALL, ids=lambda p: p.name)
def test_weights_that_are_not_finite(proxy: Proxy):
    images, labels = networks.batch()
    model = networks.transformer() if isinstance(proxy, Dss) else networks.convnet()
    with torch.no_grad():
        next(model.parameters()).flatten()[0] = math.nan
    with evidence_of(model, images, labels) as evidence:
        if isinstance(proxy, Zen):
            assert math.isfinite(proxy.value(evidence))
            return
        with unavailable("finite"):
            proxy.value(evidence)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_values_in_bfloat16_are_those_of_the_rounded_images(dtype: torch.dtype):
    images, labels = networks.batch()
    images = images.to(dtype).float()
    for proxy in ALL[:5]:
        values = []
        for kind in (torch.float32, dtype):
            with evidence_of(networks.convnet(), images, labels, dtype=kind) as evidence:
                values.append(proxy.value(evidence))
        assert values[0] == values[1], proxy.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_what_their_first_pass_computed(dtype: torch.dtype):
    images, labels = networks.batch()
    torch.manual_seed(0)
    with evidence_of(Cached(), images, labels, dtype=dtype) as evidence:
        for proxy in ALL[:5]:
            assert math.isfinite(proxy.value(evidence)), proxy.name


def test_labels_of_one_class():
    images, _ = networks.batch()
    model = networks.convnet()
    with evidence_of(model, images, torch.zeros(8, dtype=torch.long)) as evidence:
        expected = reference.epe_nas(evidence.network.input_jacobian, evidence.network.labels, CLASSES)
        assert EpeNas().value(evidence) == pytest.approx(expected, rel=1e-9)
    torch.manual_seed(0)
    with (
        evidence_of(networks.ConvNet(101).eval(), images, torch.zeros(8, dtype=torch.long)) as evidence,
        unavailable("only one such"),
    ):
        EpeNas().value(evidence)


def test_two_samples():
    images, _ = networks.batch(2)
    with evidence_of(networks.convnet(), images, torch.zeros(2, dtype=torch.long)) as evidence:
        r = float(reference.input_jacobian(networks.convnet(), images).corrcoef()[0, 1])
        expected = -sum(math.log(v + 1e-5) + 1 / (v + 1e-5) for v in (1 - r, 1 + r))
        assert Jacov().value(evidence) == pytest.approx(expected, rel=1e-4)
        assert EpeNas().value(evidence) == pytest.approx(abs(2 * math.log(abs(r) + 1e-5)), rel=1e-3)


def test_no_class_with_two_samples():
    images, _ = networks.batch(4)
    with (
        evidence_of(networks.convnet(), images, torch.arange(4)) as evidence,
        unavailable("no class has two"),
    ):
        EpeNas().value(evidence)


def test_constant_images_have_equal_rows():
    """All correlations are 1: one eigenvalue is S, the others are 0."""
    images = torch.full((6, 3, 8, 8), 0.5)
    with evidence_of(networks.convnet(), images, torch.arange(6) % 2) as evidence:
        expected = -(math.log(6 + 1e-5) + 1 / (6 + 1e-5)) - 5 * (math.log(1e-5) + 1e5)
        assert Jacov().value(evidence) == pytest.approx(expected, rel=1e-6)
        assert EpeNas().value(evidence) == pytest.approx(2 * 9 * math.log(1 + 1e-5), rel=1e-3)


def test_images_that_do_not_matter():
    model = networks.convnet()
    with torch.no_grad():
        model.stem[1].bias.fill_(-100)
        model.body[1].bias.fill_(-100)
    images, labels = networks.batch()
    with evidence_of(model, images, labels) as evidence:
        for proxy in (Jacov(), EpeNas()):
            with unavailable("same at every value"):
                proxy.value(evidence)


def test_outputs_without_logits():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images).relu()

    images, _ = networks.batch()
    with evidence_of(Decoder(), images, images, loss=lambda y, x: (y - x).square().flatten(1).mean(1)) as evidence:
        for proxy in (Jacov(), EpeNas(), Grasp(temperature=2)):
            with unavailable(r"logits|labels"):
                proxy.value(evidence)
        assert math.isfinite(Grasp().value(evidence))
        assert Synflow().value(evidence) == pytest.approx(
            reference.synflow(evidence.network.model, (3, 8, 8), ["conv.weight"]), rel=1e-12
        )


def test_networks_that_cannot_be_differentiated_twice():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return 2 * grad

    class Model(networks.Plain):
        def forward(self, images: Tensor) -> Tensor:
            return Once.apply(super().forward(images))

    images, labels = networks.batch()
    with (
        evidence_of(Model(), images, labels) as evidence,
        unavailable("differentiated twice"),
    ):
        Grasp().value(evidence)


def test_networks_that_do_not_run_in_float64():
    class Model(networks.Plain):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.float())

    images, labels = networks.batch()
    with evidence_of(Model(), images, labels) as evidence, unavailable("float64"):
        Synflow().value(evidence)
