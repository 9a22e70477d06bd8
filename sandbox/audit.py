"""kube-apiserver's audit log: the policy it is written by, and reading it, for instance to count writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

WRITE_VERBS = frozenset({"create", "update", "patch", "delete", "deletecollection"})

# Every request once, when it is answered; without bodies. Leases of components are kept: tests may want them.
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [{"level": "Metadata"}],
}


def render_policy() -> str:
    return json.dumps(POLICY, indent=1) + "\n"


def apiserver_flags(policy: Path, log: Path) -> list[str]:
    """Flags that make kube-apiserver write every answered request to `log`, one JSON object per line."""
    return [
        f"--audit-policy-file={policy}",
        f"--audit-log-path={log}",
        "--audit-log-maxsize=2000",  # MiB: beyond the default of 100 it would rotate under a reader
    ]


@dataclass(frozen=True)
class Request:
    """One answered request. `resource` is plural; `subresource` is empty or for instance `status`."""

    time: datetime
    user: str
    user_agent: str
    verb: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str
    code: int

    @property
    def is_write(self) -> bool:
        return self.verb in WRITE_VERBS


def parse(line: str) -> Request:
    event: dict[str, Any] = json.loads(line)
    target: dict[str, str] = event.get("objectRef") or {}
    return Request(
        time=datetime.fromisoformat(event["requestReceivedTimestamp"]),
        user=event["user"]["username"],
        user_agent=event.get("userAgent", ""),
        verb=event["verb"],
        group=target.get("apiGroup", ""),
        resource=target.get("resource", ""),
        subresource=target.get("subresource", ""),
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        code=int((event.get("responseStatus") or {}).get("code", 0)),
    )


def read(log: Path, *, since: datetime | None = None) -> Iterator[Request]:
    """Requests in the log, oldest first, those received at or after `since` (with a time zone) only.

    A watch is in the log once it ends. A last line that is still being written is left out.
    """
    with log.open() as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            request = parse(line)
            if since is None or request.time >= since:
                yield request
