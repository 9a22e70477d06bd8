"""The columns and children that both training kinds have in the table of kinds."""

from rlhf_operator.kinds.base import CONFIG_MAP, JOB, PERSISTENT_VOLUME_CLAIM, POD, SERVICE, PrinterColumn

CHILDREN = (JOB, SERVICE, CONFIG_MAP)
OBSERVED_ONLY = (POD,)
RELATED = (PERSISTENT_VOLUME_CLAIM,)

COLUMNS = (
    PrinterColumn("Phase", "string", ".status.phase"),
    PrinterColumn("Step", "integer", ".status.progress.step"),
    PrinterColumn("Of", "integer", ".status.progress.totalSteps"),
    PrinterColumn("Attempt", "integer", ".status.attempt"),
    PrinterColumn("Restarts", "integer", ".status.restarts"),
    PrinterColumn("Validated", "string", '.status.conditions[?(@.type=="Validated")].status'),
    PrinterColumn("Age", "date", ".metadata.creationTimestamp"),
    PrinterColumn("Reason", "string", '.status.conditions[?(@.type=="Progressing")].reason', priority=1),
    PrinterColumn("Artifact", "string", ".status.artifact.digest", priority=1),
    PrinterColumn("GPU-s", "number", ".status.usage.gpuSeconds", priority=1),
)
