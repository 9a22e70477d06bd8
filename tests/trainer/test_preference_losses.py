"""DPO, cDPO, IPO and KTO against hand values and their closed-form optima, with negative controls.

Under Bradley-Terry labels of a reward r, DPO's optimum is pi* ∝ pi_ref exp(r / beta), whatever responses were
compared. cDPO's and IPO's on the same labels have no closed form and are solved for. All are played through a real
language model whose every token is a whole reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_trainer.algos.kto import kto_losses, mismatched, reference_point
from rlhf_trainer.algos.preference import dpo_losses, ipo_losses, margins
from rlhf_trainer.config import DPO, PreferenceLoss
from rlhf_trainer.loops.preference import pair_losses
from rlhf_trainer.models.policy import score_tokens
from tests.trainer.bandit import ARMS, EVERY_ARM, REWARDS, language_model, log_policy

BETA, PAIRS, STEPS = 0.5, 40_000, 250
ONE, HALF = torch.ones(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)


def slope(loss: Callable[[Tensor], Tensor], at: float) -> float:
    margin = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(margin).sum(), margin)
    return float(gradient)


def test_the_margin_is_the_difference_of_log_ratios() -> None:
    chosen, rejected, of_chosen, of_rejected = (torch.tensor([value]) for value in (-1.0, -2.0, -1.5, -1.0))
    assert float(margins(chosen, rejected, of_chosen, of_rejected)) == pytest.approx(0.5 + 1.0)


@pytest.mark.parametrize("h", [-3.0, 0.0, 0.7, 5.0])
def test_dpo_values_and_slopes(h: float) -> None:
    sigmoid = 1 / (1 + math.exp(-0.4 * h))
    margin = torch.tensor([h], dtype=torch.float64)
    assert float(dpo_losses(margin, ONE, beta=0.4)) == pytest.approx(-math.log(sigmoid))
    assert slope(lambda m: dpo_losses(m, ONE, beta=0.4), h) == pytest.approx(-0.4 * (1 - sigmoid))
    smoothed = float(dpo_losses(margin, ONE, beta=0.4, label_smoothing=0.2))
    assert smoothed == pytest.approx(-0.8 * math.log(sigmoid) - 0.2 * math.log(1 - sigmoid))
    # A tie pulls the margin to zero from either side.
    assert slope(lambda m: dpo_losses(m, HALF, beta=0.4), h) == pytest.approx(0.4 * (sigmoid - 0.5), abs=1e-12)


def test_smoothing_leaves_a_tie_a_tie_and_shrinks_a_soft_label() -> None:
    """Each pair has its own loss; a flip rate of 0.1 makes 0.7 of a label 0.7 * 0.9 + 0.3 * 0.1."""
    margin = torch.tensor([1.0, -2.0], dtype=torch.float64)
    losses = dpo_losses(margin, torch.tensor([0.5, 0.7], dtype=torch.float64), beta=1.0, label_smoothing=0.1)
    up, down = torch.nn.functional.logsigmoid(margin), torch.nn.functional.logsigmoid(-margin)
    q = torch.tensor([0.5, 0.66], dtype=torch.float64)
    torch.testing.assert_close(losses, -(q * up + (1 - q) * down))


@pytest.mark.parametrize("h", [-3.0, 0.0, 2.5])
def test_ipo_values_and_slopes(h: float) -> None:
    margin = torch.tensor([h], dtype=torch.float64)
    assert float(ipo_losses(margin, ONE, tau=0.2)) == pytest.approx((h - 2.5) ** 2)
    assert float(ipo_losses(margin, 1 - ONE, tau=0.2)) == pytest.approx((h + 2.5) ** 2)
    assert slope(lambda m: ipo_losses(m, HALF, tau=0.2), h) == pytest.approx(2 * h)


def settle(loss: Callable[[Tensor], Tensor], steps: int) -> float:
    """The margin of one pair after ``steps`` of Adam on the logits of its two responses."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss((logits[0] - logits[1])[None]).sum())
        optimizer.step()
    return float((logits[0] - logits[1]).detach())


def test_ipo_stops_at_its_margin_where_dpo_runs_away() -> None:
    """On separable data: 1 / (2 tau) against no optimum at all."""
    assert settle(lambda m: ipo_losses(m, ONE, tau=0.2), 800) == pytest.approx(2.5, abs=1e-3)
    early, late = (settle(lambda m: dpo_losses(m, ONE, beta=0.2), steps) for steps in (400, 1600))
    assert late > early + 10 > 20


def test_cdpo_stops_where_its_flip_rate_says() -> None:
    found = settle(lambda m: dpo_losses(m, ONE, beta=0.5, label_smoothing=0.1), 1500)
    assert found == pytest.approx(math.log(0.9 / 0.1) / 0.5, abs=1e-3)


def bradley_terry_shares() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, count, share of a's wins) of every pair of arms, from PAIRS sampled comparisons."""
    draws = torch.Generator().manual_seed(5)
    a, b = (torch.randint(ARMS, (PAIRS,), generator=draws) for _ in range(2))
    wins = torch.rand(PAIRS, generator=draws) < torch.sigmoid(REWARDS[a] - REWARDS[b])
    cell = a * ARMS + b
    count = torch.bincount(cell, minlength=ARMS**2).float()
    won = torch.bincount(cell, weights=wins.float(), minlength=ARMS**2).float()
    seen = torch.nonzero(count)[:, 0]
    return seen // ARMS, seen % ARMS, count[seen], (won / count.clamp_min(1))[seen]


def trained(dpo: DPO, *, anchored: bool = True, steps: int = STEPS) -> Tensor:
    """log pi of every arm after training on the sampled pairs."""
    policy, reference = language_model(), language_model().requires_grad_(False)
    anchor = log_policy(reference) if anchored else torch.zeros(ARMS)
    a, b, count, share = bradley_terry_shares()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, max(1, steps))
    for _ in range(steps):
        optimizer.zero_grad()
        now = score_tokens(policy, EVERY_ARM, 1.0).logprobs.sum(dim=1)
        losses = pair_losses(margins(now[a], now[b], anchor[a], anchor[b]), share, dpo)
        torch.autograd.backward((losses * count).sum() / count.sum())
        optimizer.step()
        schedule.step()
    return log_policy(policy)


def distance(now: Tensor, log_ratio: Tensor) -> float:
    """KL(pi‖pi*) with pi* ∝ pi_ref exp(log_ratio)"""
    best = torch.log_softmax(log_policy(language_model()) + log_ratio, -1)
    return float((now.exp() * (now - best)).sum())


def distance_after_dpo(*, beta: float = BETA, anchored: bool = True, steps: int = STEPS) -> float:
    """From the optimum for BETA."""
    return distance(trained(DPO(beta=beta), anchored=anchored, steps=steps), REWARDS / BETA)


def test_dpo_on_sampled_preferences_reaches_the_closed_form_optimum() -> None:
    assert distance_after_dpo(steps=0) > 0.05  # there is something to learn
    assert distance_after_dpo() < 0.005


@pytest.mark.parametrize("wrong", [{"anchored": False}, {"beta": 0.2}], ids=["no reference", "another beta"])
def test_without_its_reference_or_with_another_beta_it_ends_elsewhere(wrong: dict[str, float]) -> None:
    assert distance_after_dpo(**wrong) > 0.05  # type: ignore[arg-type]


def solved(slope: Callable[[Tensor, Tensor], Tensor], curvature: Callable[[Tensor], Tensor]) -> Tensor:
    """Log-ratio of every arm where a loss of the sampled pairs is least, by Newton's method on the ratios themselves.

    ``slope`` (margins, shares) and ``curvature`` (margins) of the loss of one pair are given by hand.
    """
    a, b, count, share = (each.double() for each in bradley_terry_shares())
    arms = torch.eye(ARMS, dtype=torch.float64)
    difference = arms[a.long()] - arms[b.long()]
    found = torch.zeros(ARMS, dtype=torch.float64)
    for _ in range(12):
        margin = difference @ found
        hessian = difference.T @ ((count * curvature(margin))[:, None] * difference)
        found = found - torch.linalg.pinv(hessian) @ (difference.T @ (count * slope(margin, share)))
    return found.float()


CDPO, IPO = DPO(beta=BETA, label_smoothing=0.1), DPO(loss=PreferenceLoss.IPO, beta=BETA)


def own_optimum(dpo: DPO) -> Tensor:
    """cDPO believes a tenth of the labels flipped; IPO draws each pair to (2 p - 1) / (2 tau)."""
    if dpo is IPO:
        return solved(lambda h, p: 2 * (h - (2 * p - 1) / (2 * BETA)), lambda h: torch.full_like(h, 2.0))
    return solved(
        lambda h, p: BETA * (torch.sigmoid(BETA * h) - (0.9 * p + 0.1 * (1 - p))),
        lambda h: BETA**2 * torch.sigmoid(BETA * h) * torch.sigmoid(-BETA * h),
    )


@pytest.mark.parametrize("dpo", [CDPO, IPO], ids=["cDPO", "IPO"])
def test_cdpo_and_ipo_on_sampled_preferences_reach_their_own_optima(dpo: DPO) -> None:
    found = trained(dpo, steps=100)
    assert distance(found, own_optimum(dpo)) < 1e-4
    assert distance(found, REWARDS / BETA) > 0.005  # which is DPO's


GOOD_AND_BAD = torch.tensor([True, False])


def test_kto_values() -> None:
    """Both rows lie 2 beyond the reference point of 0.5; lambda_D 1, lambda_U 1.5."""
    losses = kto_losses(
        torch.tensor([2.5, 2.5]), GOOD_AND_BAD, reference=0.5, beta=0.5, desirable_weight=1.0, undesirable_weight=1.5
    )
    sigmoid = 1 / (1 + math.exp(-1.0))
    assert losses.tolist() == pytest.approx([1 - sigmoid, 1.5 * sigmoid])


def test_kto_saturates_in_gains_and_losses() -> None:
    ratio = torch.tensor([0.5, 0.5, 60.0, 60.0, -60.0, -60.0], dtype=torch.float64, requires_grad=True)
    losses = kto_losses(ratio, GOOD_AND_BAD.repeat(3), reference=0.5, beta=0.5)
    (slopes,) = torch.autograd.grad(losses.sum(), ratio)
    assert slopes[:2].tolist() == pytest.approx([-0.125, 0.125])  # beta / 4 at the reference point
    assert float(slopes[2:].abs().max()) < 1e-9


def test_the_reference_point_is_the_mean_and_never_negative() -> None:
    assert reference_point(6.0, 4) == 1.5
    assert reference_point(-6.0, 4) == 0.0


def test_a_mismatched_row_borrows_from_the_next_other_prompt() -> None:
    assert mismatched(["x", "x", "y", "x"]) == [2, 2, 3, 2]
    assert mismatched(["x", "x", "x"]) == [1, 2, 0]


def test_kto_prefers_the_good_arm_through_a_language_model() -> None:
    policy, reference = language_model(), language_model().requires_grad_(False)
    anchor = log_policy(reference)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        log_ratio = score_tokens(policy, EVERY_ARM, 1.0).logprobs.sum(dim=1) - anchor
        losses = kto_losses(log_ratio[[3, 7]], GOOD_AND_BAD, reference=0.0, beta=0.5)
        torch.autograd.backward(losses.mean())
        optimizer.step()
    moved = log_policy(policy) - anchor
    assert moved[3] > 0.5
    assert moved[7] < -0.5
