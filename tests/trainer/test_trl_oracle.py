"""Our losses, gradients and advantages equal TRL's on recorded batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer import trl_oracle as oracle
from tests.trainer.training_world import TinyWorld


def assert_equal(ours: Tensor, theirs: Tensor, name: str = "", tolerance: float = 2e-5) -> None:
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(
        ours / scale, theirs / scale, atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}"
    )
    assert theirs.abs().max() > 1e-3, f"{name}: nothing to compare"


@pytest.mark.parametrize(("centering", "margin"), [(0.0, None), (0.05, None), (0.05, [0.5, 0.0, 2.0])])
def test_reward_model(tiny_world: TinyWorld, tmp_path: Path, centering: float, margin: list[float] | None) -> None:
    ours, theirs = oracle.reward_losses(tiny_world.base, tmp_path, centering, margin)
    for name, own, other in zip(("loss", "gradient"), ours, theirs, strict=True):
        assert_equal(own, other, name)


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_preferences(tiny_world: TinyWorld, tmp_path: Path, loss: str, smoothing: float) -> None:
    ours, theirs = oracle.preference_losses(tiny_world.base, tmp_path, loss, smoothing)
    for name, own, other in zip(("loss", "gradient"), ours, theirs, strict=True):
        assert_equal(own, other, name)


@pytest.mark.parametrize(("loss_type", "scale"), [("grpo", "group"), ("dapo", "batch"), ("dr_grpo", "none")])
def test_grpo(tiny_world: TinyWorld, tmp_path: Path, loss_type: str, scale: str) -> None:
    for name, (own, other) in oracle.grpo(tiny_world.base, tmp_path, loss_type, scale).items():
        assert_equal(own, other, name)


def test_rloo(tiny_world: TinyWorld, tmp_path: Path) -> None:
    for name, (own, other) in oracle.rloo(tiny_world.base, tmp_path).items():
        assert_equal(own, other, name)


def test_another_normalisation_would_not_pass(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Negative control: the mean over tokens is not the mean over replies."""
    per_reply = oracle.grpo(tiny_world.base, tmp_path, "grpo", "group")["loss"]
    per_token = oracle.grpo(tiny_world.base, tmp_path, "dapo", "group")["loss"]
    assert abs(float(per_reply[0] - per_token[1])) > 1e-4
