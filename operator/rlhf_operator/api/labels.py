"""Labels and names shared by everything the operator creates."""

from __future__ import annotations

GROUP = "rlhf.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
FIELD_MANAGER = "rlhf-operator"

MANAGED_BY = "rlhf.dev/managed-by"  # = FIELD_MANAGER on every child, and on the pods of children
OWNER_KIND = "rlhf.dev/kind"
OWNER_NAME = "rlhf.dev/name"
OWNER_UID = "rlhf.dev/uid"
ATTEMPT = "rlhf.dev/attempt"
REVISION = "rlhf.dev/revision"
COMPONENT = "rlhf.dev/component"  # trainer | reporter | gateway | policy-server
DESIRED_HASH = "rlhf.dev/desired-hash"  # annotation: hash of the object that was last applied
