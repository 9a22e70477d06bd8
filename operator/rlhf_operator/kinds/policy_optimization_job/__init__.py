"""The kind PolicyOptimizationJob."""

from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJob
from rlhf_operator.kinds.base import KindSpec
from rlhf_operator.kinds.policy_optimization_job.plan import plan, references
from rlhf_operator.kinds.training.claims import claims_named
from rlhf_operator.kinds.training.table import CHILDREN, COLUMNS, OBSERVED_ONLY, RELATED

SPEC = KindSpec(
    model=PolicyOptimizationJob,
    kind="PolicyOptimizationJob",
    plural="policyoptimizationjobs",
    singular="policyoptimizationjob",
    short_names=("poj",),
    plan=plan,
    children=CHILDREN,
    observed_only=OBSERVED_ONLY,
    references=lambda primary: references(primary) | claims_named(primary),
    related=RELATED,
    printer_columns=COLUMNS,
)
