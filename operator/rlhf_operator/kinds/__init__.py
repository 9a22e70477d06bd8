"""The table of kinds: watches, RBAC, CRDs, metrics and contract tests are derived from it.

A further kind is one folder and one line here.
"""

from __future__ import annotations

from rlhf_operator.kinds import policy_optimization_job, policy_rollout, reward_model_job
from rlhf_operator.kinds.base import KindSpec

KINDS: tuple[KindSpec, ...] = (reward_model_job.SPEC, policy_optimization_job.SPEC, policy_rollout.SPEC)
