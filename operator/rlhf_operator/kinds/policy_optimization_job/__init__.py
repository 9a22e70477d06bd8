"""The kind PolicyOptimizationJob."""

from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJob
from rlhf_operator.kinds.base import KindSpec
from rlhf_operator.kinds.policy_optimization_job.plan import plan
from rlhf_operator.kinds.training.table import CHILDREN, COLUMNS, OBSERVED_ONLY, RELATED, references

SPEC = KindSpec(
    model=PolicyOptimizationJob,
    kind="PolicyOptimizationJob",
    plural="policyoptimizationjobs",
    singular="policyoptimizationjob",
    short_names=("poj",),
    plan=plan,
    children=CHILDREN,
    observed_only=OBSERVED_ONLY,
    references=references,
    related=RELATED,
    printer_columns=COLUMNS,
)
