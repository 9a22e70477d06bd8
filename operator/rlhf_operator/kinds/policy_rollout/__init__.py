"""PolicyRollout: serves a policy and moves to the next one on evidence."""

from __future__ import annotations

from rlhf_operator.api.policy_rollout import PolicyRollout
from rlhf_operator.kinds.base import (
    CONFIG_MAP,
    DEPLOYMENT,
    ENDPOINT_SLICE,
    POD,
    ROLE,
    ROLE_BINDING,
    SERVICE,
    SERVICE_ACCOUNT,
    Key,
    KindSpec,
    Object,
    PrinterColumn,
)
from rlhf_operator.kinds.policy_rollout.course import UPSTREAM
from rlhf_operator.kinds.policy_rollout.plan import plan
from rlhf_operator.kinds.training.objects import text


def references(primary: Object) -> frozenset[Key]:
    """The job whose policy this rollout serves."""
    name = text(primary, "spec", "policy", "jobRef", "name")
    return frozenset({Key(UPSTREAM, text(primary, "metadata", "namespace"), name)}) if name else frozenset()


SPEC = KindSpec(
    model=PolicyRollout,
    kind="PolicyRollout",
    plural="policyrollouts",
    singular="policyrollout",
    short_names=("pr",),
    plan=plan,
    children=(CONFIG_MAP, SERVICE_ACCOUNT, ROLE, ROLE_BINDING, SERVICE, DEPLOYMENT),
    observed_only=(POD, ENDPOINT_SLICE),
    references=references,
    printer_columns=(
        PrinterColumn("Phase", "string", ".status.phase"),
        PrinterColumn("Stage", "integer", ".status.stage"),
        PrinterColumn("Weight", "number", ".status.weights.written"),
        PrinterColumn("Samples", "integer", ".status.stageSamples"),
        PrinterColumn("Reason", "string", ".status.conditions[?(@.type=='Progressing')].reason"),
        PrinterColumn("Message", "string", ".status.conditions[?(@.type=='Progressing')].message", priority=1),
    ),
    serves_users=True,
    error_condition="Ready",
)
