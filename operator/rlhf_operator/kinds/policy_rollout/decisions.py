"""Decisions about this rollout: bound to a digest, a stage, and the trial they were made in."""

from __future__ import annotations

from datetime import datetime

from rlhf_operator.api.decision import Action, Decision, readable
from rlhf_operator.kinds.policy_rollout.observe import View
from rlhf_operator.kinds.training.objects import moment


def decision_about(
    view: View, action: Action, digest: str, *, since: datetime | None, stage: int | None = None
) -> Decision | None:
    """The first decision in force of this kind. One made before `since` was about another trial and cannot be reused.

    Times of the API server have whole seconds, so one of the same second counts.
    """
    for decision in readable(view.observed.decisions, view.observed.now):
        made = moment({"metadata": decision.metadata}, "metadata", "creationTimestamp")
        if (
            decision.spec.action is action
            and decision.spec.digest == digest
            and (stage is None or decision.spec.stage == stage)
            and made is not None
            and (since is None or made >= since)
        ):
            return decision
    return None
