"""Reading from the API server without starting a kubectl: what `up` and `status` ask many times."""

from __future__ import annotations

import json
import ssl
import urllib.request
from dataclasses import dataclass
from typing import Any

from sandbox.certificates import Authority, Subject


@dataclass(frozen=True)
class ApiReader:
    """GET requests as the administrator. Errors are OSErrors (urllib's)."""

    server: str
    authority: Authority
    subject: Subject

    def text(self, path: str) -> str:
        certificate, key = self.authority.issue("admin", self.subject)
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(certificate, key)
        # An environment's proxy must not be asked for an address on this very machine.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(f"{self.server}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def object(self, path: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.text(path))
        return content

    def is_ready(self) -> bool:
        return self.text("/readyz") == "ok"

    def node_is_ready(self, name: str) -> bool:
        conditions = self.object(f"/api/v1/nodes/{name}").get("status", {}).get("conditions", [])
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
