"""The demo as a user runs it: the whole chain, and the outcomes it is there to show."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from sandbox.cluster import Cluster
from sandbox.paths import CHECKOUT

OUT = CHECKOUT / ".demo"


@pytest.fixture(scope="module")
def story(cluster_with_operator: Cluster) -> dict[str, Any]:
    """Plays the demo once; its own words are shown when it stops short."""
    assert cluster_with_operator.status().ready
    (OUT / "story.json").unlink(missing_ok=True)
    played = subprocess.run(
        [sys.executable, "-m", "demo"], cwd=CHECKOUT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert played.returncode == 0, played.stdout[-8000:] + played.stderr[-2000:]
    told: dict[str, Any] = json.loads((OUT / "story.json").read_text())
    return told


def outcome(story: dict[str, Any], what: str) -> str:
    return next(str(entry["outcome"]) for entry in story["entries"] if what in entry["what"])


def test_the_chain_decides_on_evidence(story: dict[str, Any]) -> None:
    assert outcome(story, "helpful-rm") == "Succeeded"
    assert outcome(story, "helpful-ppo") == "Succeeded"
    assert outcome(story, "helpful-ppo promoted") == "Healthy"
    assert outcome(story, "careless-rm") == "Failed"
    assert outcome(story, "careless-ppo") == "never started"
    assert outcome(story, "desk-leaky rolled back") == "RolledBack"


def test_the_policy_is_better_by_the_oracle_that_no_gate_has_seen(story: dict[str, Any]) -> None:
    assert story["win_rates"]["hidden oracle"]["lower"] > 0.5


def test_users_lost_no_request(story: dict[str, Any]) -> None:
    for served in story["served"].values():
        assert served["requests"] > 0
        assert served["failures"] == 0


def test_charts_are_drawn(story: dict[str, Any]) -> None:
    assert story["training"]["helpful-ppo"], "no metrics.jsonl rows were read"
    drawn = {path.name for path in (OUT / "charts").glob("*.png")}
    assert {"training-helpful-ppo.png", "win-rate.png", "rollout-promotion.png", "rollout-leak.png"} <= drawn
