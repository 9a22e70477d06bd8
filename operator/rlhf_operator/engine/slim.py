"""What of a watched object is worth its memory.

Kept is what plans read and what "desired is a subset of live" compares; dropped are managedFields, the copy that
`kubectl apply` keeps in an annotation, the pod templates of Jobs, which are immutable and never compared, and of
claims, which are everybody's, all but a few fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_operator.kinds.base import JOB, PERSISTENT_VOLUME_CLAIM, POD, Object

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_POD_SPEC = ("nodeName", "schedulingGates", "priorityClassName", "terminationGracePeriodSeconds")
_CONTAINER = ("name", "image", "resources")
_METADATA = ("namespace", "name", "uid", "resourceVersion", "deletionTimestamp")


def slim(raw: Object) -> dict[str, Any]:
    """A new object; `raw` is not changed, but the two share what is kept."""
    if raw.get("kind") == PERSISTENT_VOLUME_CLAIM.kind:
        return _claim(raw)
    kept = {key: value for key, value in raw.items() if key != "metadata"}
    kept["metadata"] = _metadata(raw["metadata"])
    if raw.get("kind") == POD.kind:
        kept["spec"] = _pod_spec(raw.get("spec") or {})
    elif raw.get("kind") == JOB.kind:
        kept["spec"] = _job_spec(raw.get("spec") or {})
    return kept


def _claim(raw: Mapping[str, Any]) -> dict[str, Any]:
    """All claims of the cluster are watched: kept is what one is called and who may mount it."""
    metadata = {key: raw["metadata"][key] for key in _METADATA if key in raw["metadata"]}
    modes = (raw.get("spec") or {}).get("accessModes") or []
    return {"apiVersion": raw["apiVersion"], "kind": raw["kind"], "metadata": metadata, "spec": {"accessModes": modes}}


def _metadata(raw: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in raw.items() if key not in ("managedFields", "selfLink")}
    if _LAST_APPLIED in (kept.get("annotations") or {}):
        kept["annotations"] = {k: v for k, v in kept["annotations"].items() if k != _LAST_APPLIED}
    return kept


def _pod_spec(raw: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: raw[key] for key in _POD_SPEC if key in raw}
    for field in ("containers", "initContainers"):
        if field in raw:
            kept[field] = [{k: c[k] for k in _CONTAINER if k in c} for c in raw[field]]
    return kept


def _job_spec(raw: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in raw.items() if key != "template"}
    template = raw.get("template") or {}
    kept["template"] = {"metadata": template.get("metadata") or {}}
    return kept
