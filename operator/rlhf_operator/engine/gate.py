"""Whether Decisions may be honoured: only while the admission policy that binds them to their author is in force."""

from __future__ import annotations

from rlhf_operator.api.decision import POLICY_NAME, enforced
from rlhf_operator.kinds.base import Object, Resource
from rlhf_operator.obs.metrics import Metrics

_GROUP = "admissionregistration.k8s.io"
POLICY = Resource(_GROUP, "v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies")
BINDING = Resource(_GROUP, "v1", "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings")
FIELDS = f"metadata.name={POLICY_NAME}"


class DecisionGate:
    """Closed until both objects have been seen to do their work, and again when one of them does not any more."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._live: dict[str, Object] = {}
        metrics.decisions_honoured.set(0)

    @property
    def open(self) -> bool:
        return enforced(self._live.get(POLICY.kind), self._live.get(BINDING.kind))

    def binds(self, decision: Object) -> bool:
        """Whether a Decision was made under the policy: nobody looked at the author of one that is older. Times are
        whole seconds, so one of the same second is not known to be younger."""
        made = decision["metadata"].get("creationTimestamp", "")
        return all(made > live["metadata"].get("creationTimestamp", "") for live in self._live.values())

    def put(self, kind: str, obj: Object | None) -> bool:
        """Takes in the live object, None: it is gone. True if the gate opened or closed."""
        if obj is not None and obj["metadata"]["name"] != POLICY_NAME:
            return False
        before = self.open
        if obj is None or "deletionTimestamp" in obj["metadata"]:
            self._live.pop(kind, None)
        else:
            self._live[kind] = obj
        self._metrics.decisions_honoured.set(self.open)
        return self.open != before
