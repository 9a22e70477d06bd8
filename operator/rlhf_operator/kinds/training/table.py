"""What both training kinds have in the table of kinds: children, what their specs name, columns."""

from rlhf_operator.kinds.base import (
    CONFIG_MAP,
    JOB,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SERVICE,
    Key,
    Object,
    PrinterColumn,
)
from rlhf_operator.kinds.training import upstream
from rlhf_operator.kinds.training.claims import claims_named

CHILDREN = (JOB, SERVICE, CONFIG_MAP)
OBSERVED_ONLY = (POD,)
RELATED = (PERSISTENT_VOLUME_CLAIM,)


def references(primary: Object) -> frozenset[Key]:
    """The upstream jobs and the claims that a job names."""
    return upstream.references(primary) | claims_named(primary)


COLUMNS = (
    PrinterColumn("Phase", "string", ".status.phase"),
    PrinterColumn("Step", "integer", ".status.progress.step"),
    PrinterColumn("Of", "integer", ".status.progress.totalSteps"),
    PrinterColumn("Attempt", "integer", ".status.attempt"),
    PrinterColumn("Restarts", "integer", ".status.restarts"),
    PrinterColumn("Validated", "string", '.status.conditions[?(@.type=="Validated")].status'),
    PrinterColumn("Age", "date", ".metadata.creationTimestamp"),
    PrinterColumn("Reason", "string", '.status.conditions[?(@.type=="Progressing")].reason', priority=1),
    PrinterColumn("Ends", "string", ".status.progress.expectedEndAt", priority=1),
    PrinterColumn("Artifact", "string", ".status.artifact.digest", priority=1),
    PrinterColumn("GPU-s", "number", ".status.usage.gpuSeconds", priority=1),
)
