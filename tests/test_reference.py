from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lswag_fast import reference


def small_images(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 4, (samples,), generator=generator)


def convnet(norm: type[nn.Module] = nn.Identity) -> nn.Sequential:
    torch.manual_seed(1)
    norms = [norm(5)] if norm is nn.BatchNorm2d else [norm()]
    body = [nn.Conv2d(3, 5, 3), *norms, nn.ReLU(), nn.Flatten(), nn.Linear(180, 8), nn.GELU(), nn.Linear(8, 4)]
    return nn.Sequential(*body)


def test_moments_of_worked_example():
    moments = reference.moments_of([torch.tensor([1.0, -2.0, 0.0]), torch.tensor([3.0, 2.0, 0.0])])
    assert moments.sigma.tolist() == [1.0, 0.0, 0.0]
    assert moments.mean_abs.tolist() == [2.0, 2.0, 0.0]
    assert moments.dead.tolist() == [False, True, True]
    assert moments.log_sum_inverse_sigma == 0.0
    assert moments.log_sum_mean_over_sigma == pytest.approx(math.log(2))


def test_layer_of_dead_weights_has_no_log_term():
    moments = reference.moments_of([torch.zeros(2, 3)] * 4)
    assert moments.log_sum_inverse_sigma is None
    assert moments.log_sum_mean_over_sigma is None


def test_rounding_alone_makes_a_dead_weight():
    g = torch.tensor([1.0], dtype=torch.float64)
    assert reference.moments_of([g, g * (1 + 2.0**-22)]).dead.item()
    assert not reference.moments_of([g, g * (1 + 2.0**-20)]).dead.item()


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_gradient_moments_are_those_of_autograd(groups: int):
    images, labels = small_images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.SiLU(), nn.Linear(7, 4)).double()
    inputs = images.double().flatten(1)
    hidden = model[1](inputs).detach().requires_grad_()
    loss = F.cross_entropy(model[3](model[2](hidden)), labels, reduction="sum")
    (output_grads,) = torch.autograd.grad(loss, hidden)
    gradients = reference.group_gradients(model, images, labels, groups, ["1.weight"])["1.weight"]
    expected = reference.moments_of(gradients)
    got = reference.gradient_moments(inputs[:, None], output_grads[:, None], groups)
    torch.testing.assert_close(got.sigma, expected.sigma, rtol=1e-10, atol=1e-14)
    assert got.log_sum_inverse_sigma == pytest.approx(expected.log_sum_inverse_sigma, rel=1e-9)


def test_group_gradient_is_that_of_the_mean_loss():
    images, labels = small_images()
    model = convnet()
    gradients = reference.group_gradients(model, images, labels, 2, ["0.weight"])["0.weight"]
    F.cross_entropy(model(images[3:]), labels[3:]).backward()
    torch.testing.assert_close(gradients[1].float(), model[0].weight.grad, rtol=1e-4, atol=1e-6)


def test_coupled_groups_run_a_pass_each():
    images, labels = small_images()
    model = convnet(nn.BatchNorm2d)
    assert reference.samples_are_coupled(model)
    gradients = reference.group_gradients(model, images, labels, 2, ["0.weight"])["0.weight"]
    F.cross_entropy(model(images[:3]), labels[:3]).backward()
    torch.testing.assert_close(gradients[0].float(), model[0].weight.grad, rtol=1e-3, atol=1e-5)
    assert len(reference.lswag(model, images, labels).moments) == 3
    assert not reference.samples_are_coupled(model.eval())


def test_patterns_of_a_worked_example():
    one = torch.tensor([[1.0, -0.0, 2.0, float("nan")], [0.0, 1e-40, 3.0, 1.0]])
    two = torch.tensor([[[1.0]], [[1.0]]])
    assert reference.pattern_words(one) == [b"\x01", b"\x02", b"\x03", b"\x02"]
    assert reference.activation_patterns([one, two]) == (3, (3, 1))
    assert reference.hamming_kernel([one, two]).tolist() == [[5, 2], [2, 5]]


def test_percentiles_and_window():
    assert [reference.percentile(layer, 7) for layer in range(8)] == [0, 10, 20, 40, 50, 70, 80, 100]
    assert reference.in_window(20, (20, 50))
    assert reference.in_window(50, (20, 50))
    assert not reference.in_window(70, (20, 50))


def test_score_is_the_sum_of_log_terms_times_the_patterns():
    images, labels = small_images()
    score = reference.lswag(convnet(), images, labels)
    assert score.parameters == ("0.weight", "4.weight", "6.weight")
    assert score.percentiles == (30, 60, 100)
    assert score.activation_percentiles == (30, 60)
    assert score.positions == 180 + 8
    assert score.trainability == pytest.approx(sum(m.log_sum_inverse_sigma or 0 for m in score.moments))
    assert score.lswag == score.trainability * score.expressivity
    assert max(score.patterns_by_activation) <= score.expressivity <= sum(score.patterns_by_activation)


def test_window_bounds_lambda_on_both_sides_and_psi_at_its_end():
    images, labels = small_images()
    whole = reference.lswag(convnet(), images, labels)
    part = reference.lswag(convnet(), images, labels, window=(60, 60))
    assert part.trainability == whole.moments[1].log_sum_inverse_sigma
    assert part.patterns_by_activation == whole.patterns_by_activation
    inside = reference.lswag(convnet(), images, labels, window=(60, 60), patterns_inside_window=True)
    assert inside.patterns_by_activation == whole.patterns_by_activation[1:]
    first = reference.lswag(convnet(), images, labels, window=(0, 30), pooling="sum", numerator="mean")
    assert first.trainability == whole.moments[0].log_sum_mean_over_sigma
    assert first.expressivity == whole.patterns_by_activation[0]


def test_fewer_pattern_samples():
    images, labels = small_images()
    assert reference.lswag(convnet(), images, labels, pattern_samples=2).expressivity <= 4


class Shared(nn.Module):
    """A tied weight used three ways, activations as functions, sequence-first attention, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.unused = nn.Linear(2, 2)
        self.mix = nn.Linear(8, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 4)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.mix.weight

    def forward(self, images: Tensor) -> Tensor:
        tokens = images[:, 0].transpose(0, 1)
        tokens = F.gelu(self.mix(tokens))
        tokens = torch.relu(tokens @ self.tied.weight.T)
        tokens = self.attention(tokens, tokens, tokens)[0]
        return self.head(F.hardswish(tokens).mean(0))


def test_functions_ties_and_sequence_first_tensors():
    images, labels = small_images()
    score = reference.lswag(Shared(), images, labels)
    assert score.parameters == ("mix.weight", "attention.out_proj.weight", "head.weight")
    names = ["mix.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    score = reference.lswag(Shared(), images, labels, parameters=names)
    assert score.activation_percentiles == (20, 20, 70)
    assert score.positions == 3 * 64
    assert all(m.log_sum_inverse_sigma is not None for m in score.moments)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Hardswish()])
def test_each_activation_is_seen_once(module: nn.Module):
    images, labels = small_images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), module, nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))
    assert reference.lswag(model, images, labels).activation_percentiles == (30,)


def test_model_is_left_as_it_was():
    images, labels = small_images()
    model = convnet(nn.BatchNorm2d)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference.lswag(model, images, labels)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_loss_of_the_callers_own():
    images, _ = small_images()
    targets = torch.randn(6, 4)
    score = reference.lswag(convnet(), images, targets, loss=lambda out, t: (out - t).square().sum(1))
    assert math.isfinite(score.lswag)
