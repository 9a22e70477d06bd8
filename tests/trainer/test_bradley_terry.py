"""Bradley-Terry losses, accuracy and temperature against hand values and conditions of their optimum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_trainer.algos.bradley_terry import accuracy, aspect_loss, fit_temperature, pair_losses, preference_loss


def test_loss_is_the_negative_log_likelihood() -> None:
    a, b = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])
    labels = torch.tensor([1.0, 0.0, 0.5])
    expected = (-math.log(1 / (1 + math.exp(-2))) - math.log(1 / (1 + math.exp(-1))) + math.log(2)) / 3
    assert float(preference_loss(a, b, labels)) == pytest.approx(expected, abs=1e-6)
    centred = float(preference_loss(a, b, labels, centering=0.1))
    assert centred == pytest.approx(expected + 0.1 * (4 + 1 + 4) / 3, abs=1e-6)


def test_loss_does_not_move_with_a_constant_but_its_centering_does() -> None:
    a, b, labels = torch.randn(9), torch.randn(9), torch.rand(9)
    assert float(preference_loss(a + 5, b + 5, labels)) == pytest.approx(float(preference_loss(a, b, labels)), abs=1e-5)
    assert preference_loss(a + 5, b + 5, labels, 0.01) > preference_loss(a, b, labels, 0.01)


def test_a_tie_pulls_scores_together() -> None:
    a = torch.tensor([1.0], requires_grad=True)
    torch.autograd.backward(preference_loss(a, torch.zeros(1), torch.tensor([0.5])))
    assert a.grad is not None
    assert float(a.grad) > 0


def _minimum(probability: float, margin: float) -> float:
    """The difference of scores at which the loss of one pair is least, by its gradient's zero."""
    low, high = -20.0, 20.0
    for _ in range(60):
        delta = torch.tensor([(low + high) / 2], requires_grad=True)
        loss = preference_loss(delta, torch.zeros(1), torch.tensor([probability]), 0.0, torch.tensor([margin]))
        torch.autograd.backward(loss)
        assert delta.grad is not None
        low, high = (float(delta.detach()), high) if float(delta.grad) < 0 else (low, float(delta.detach()))
    return (low + high) / 2


@pytest.mark.parametrize(("probability", "margin"), [(0.8, 0.0), (0.8, 1.5), (0.3, 2.0), (0.5, 2.0)])
def test_a_soft_label_with_margin_has_its_minimum_where_it_should(probability: float, margin: float) -> None:
    """At logit(p) + m(2p - 1): a tie asks for no margin, whatever its strength says."""
    expected = math.log(probability / (1 - probability)) + margin * (2 * probability - 1)
    assert _minimum(probability, margin) == pytest.approx(expected, abs=1e-3)


def test_a_hard_label_with_margin_is_the_published_loss() -> None:
    a, b, margin = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.7, 0.2])
    chosen_first = preference_loss(a, b, torch.tensor([1.0, 0.0]), 0.0, margin)
    published = -(torch.nn.functional.logsigmoid(torch.tensor([0.5 - 0.7, 3.0 - 0.2]))).mean()
    assert float(chosen_first) == pytest.approx(float(published), abs=1e-6)
    assert float(chosen_first) > float(preference_loss(a, b, torch.tensor([1.0, 0.0])))


def test_aspects_are_trained_on_the_pairs_that_order_them() -> None:
    """However the rows are cut: the gradient of the whole batch is the mean of its slices' gradients."""
    rng = torch.Generator().manual_seed(0)
    delta = torch.randn(2, 8, 3, generator=rng, requires_grad=True)
    labels = torch.tensor([0.0, 0.5, 1.0])[torch.randint(0, 3, (2, 8, 3), generator=rng)]
    ordered = (labels != 0.5).float()
    weight = ordered * (8 / ordered.sum(dim=1).clamp_min(1))[:, None, :]
    whole = aspect_loss(delta, labels, weight)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(delta, labels, reduction="none")
    by_hand = ((losses * ordered).sum(dim=1) / ordered.sum(dim=1)).mean()
    assert float(whole.detach()) == pytest.approx(float(by_hand.detach()), abs=1e-6)
    (gradient,) = torch.autograd.grad(whole, delta)
    halves = [aspect_loss(delta[:, part], labels[:, part], weight[:, part]) for part in (slice(0, 4), slice(4, 8))]
    (cut,) = torch.autograd.grad(torch.stack(halves).mean(), delta)
    torch.testing.assert_close(gradient, cut)
    assert not gradient[labels == 0.5].any(), "a pair that orders nothing pulls nowhere"


def test_each_pair_has_its_loss_in_float32() -> None:
    """Half-precision scores are not subtracted in half precision: 300 and 299.9 are the same number there."""
    a, b = torch.tensor([300.0, 0.0], dtype=torch.bfloat16), torch.tensor([299.0, 0.0], dtype=torch.bfloat16)
    losses = pair_losses(a, b, torch.tensor([1.0, 0.5]))
    delta = float(a[0]) - float(b[0])
    assert losses.dtype is torch.float32
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-delta)), math.log(2)])


def test_accuracy_is_the_share_of_decided_pairs_ranked_as_labelled() -> None:
    delta = torch.tensor([0.2, -0.2, 0.3, -0.4, 2.0])
    assert accuracy(delta, torch.tensor([0.9, 0.1, 0.4, 0.6, 0.5])) == (0.5, 4)
    assert accuracy(delta, torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])) == (1.0, 5)
    assert accuracy(delta, torch.full((5,), 0.5)) == (0.0, 0)


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_a_model_that_ranks_nothing_is_right_by_half(label: float) -> None:
    """Whichever side the better texts stand on: scores that are all equal must not look like knowledge."""
    assert accuracy(torch.zeros(4), torch.full((4,), label)) == (0.5, 4)


def noisy(scale: float, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Differences over-confident by ``scale``, and labels drawn from the truth."""
    draws = torch.Generator().manual_seed(1)
    delta = 1.5 * torch.randn(count, generator=draws, dtype=torch.float64)
    return delta * scale, (torch.rand(count, generator=draws, dtype=torch.float64) < torch.sigmoid(delta)).double()


@pytest.mark.parametrize("scale", [0.05, 0.25, 1.0, 3.0, 20.0, 400.0])
def test_a_known_temperature_is_recovered_and_is_the_likeliest(scale: float) -> None:
    """At the maximum the slope of the likelihood in 1/T is 0, and on either side it falls."""
    delta, labels = noisy(scale)
    found = fit_temperature(delta.float(), labels.float())
    assert found == pytest.approx(scale, rel=0.1)
    inverse = torch.tensor(1 / found, dtype=torch.float64)
    slope = ((torch.sigmoid(inverse * delta.float().double()) - labels) * delta).mean() / delta.abs().mean()
    assert abs(float(slope)) < 1e-9


def test_newton_settles_whatever_the_scores_are_like() -> None:
    """Heavy tails, few pairs, scales over six powers of ten: at the optimum, or at the bound beyond which it lies."""
    draws = torch.Generator().manual_seed(0)
    for _ in range(200):
        count = int(torch.randint(3, 40, (1,), generator=draws))
        size = 10 ** (6 * torch.rand(1, generator=draws, dtype=torch.float64) - 3)
        noise = torch.randn(2, count, generator=draws, dtype=torch.float64)
        delta = size * noise[0] * torch.exp(2 * noise[1])
        labels = (torch.rand(count, generator=draws, dtype=torch.float64) < torch.sigmoid(delta / size)).double()
        found = fit_temperature(delta, labels)
        slope = float(((torch.sigmoid(delta / found) - labels) * delta).mean() / delta.abs().mean())
        beyond = (found < 1.001e-3 and slope < 0) or (found > 999 and slope > 0)
        assert abs(slope) < 1e-6 or beyond, (found, slope)


def test_a_temperature_stays_within_its_bounds() -> None:
    delta = torch.linspace(-2, 2, 50)
    assert fit_temperature(delta, torch.full((50,), 0.5)) == pytest.approx(1000.0)
    assert fit_temperature(delta / 1e6, (delta > 0).float(), iterations=200) == pytest.approx(1e-3)
    assert fit_temperature(-delta, (delta > 0).float()) == pytest.approx(1000.0)


def test_accuracy_leaves_ties_out() -> None:
    share, count = accuracy(torch.tensor([1.0, -1.0, 3.0]), torch.tensor([1.0, 1.0, 0.5]))
    assert (share, count) == (0.5, 2)


def test_temperature_of_useless_and_of_separable_scores_is_finite() -> None:
    delta = torch.linspace(-2, 2, 50)
    assert fit_temperature(delta, torch.full((50,), 0.5)) >= 500
    assert 0 < fit_temperature(delta, (delta > 0).float()) < 0.1
    assert math.isfinite(fit_temperature(torch.zeros(5), torch.ones(5)))
