"""The kind RewardModelJob."""

from rlhf_operator.api.reward_model_job import RewardModelJob
from rlhf_operator.kinds.base import KindSpec
from rlhf_operator.kinds.reward_model_job.plan import plan
from rlhf_operator.kinds.training.table import CHILDREN, COLUMNS, OBSERVED_ONLY, RELATED, references

SPEC = KindSpec(
    model=RewardModelJob,
    kind="RewardModelJob",
    plural="rewardmodeljobs",
    singular="rewardmodeljob",
    short_names=("rmj",),
    plan=plan,
    children=CHILDREN,
    observed_only=OBSERVED_ONLY,
    references=references,
    related=RELATED,
    printer_columns=COLUMNS,
)
