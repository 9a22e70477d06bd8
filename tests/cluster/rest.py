"""Plain HTTPS to the API server, for tests with many requests: starting kubectl for each would take minutes."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

Body = dict[str, Any]
PLURALS = {
    "Job": "jobs",
    "RewardModelJob": "rewardmodeljobs",
    "PolicyOptimizationJob": "policyoptimizationjobs",
    "PolicyRollout": "policyrollouts",
    "Decision": "decisions",
}


class Rest:
    """Requests as the user of a kubeconfig."""

    def __init__(self, kubeconfig: Path, scratch: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        pair = scratch / "client.pem"
        pair.write_bytes(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
        self._server = cluster["server"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=authority)
        self._tls.load_cert_chain(pair)

    def create(self, body: Body, namespace: str = "default") -> str:
        """A strict dry run, as `kubectl create --dry-run=server` makes it: what the server objects to, else ""."""
        return self._send("POST", _path(body, namespace), body, "application/json", {})

    def apply(self, body: Body, namespace: str, manager: str = "kubectl") -> str:
        """A strict dry run of a server-side apply: what the server objects to, else ""."""
        path = f"{_path(body, namespace)}/{body['metadata']['name']}"
        return self._send("PATCH", path, body, "application/apply-patch+yaml", {"fieldManager": manager})

    def allowed(self, user: str, verb: str, resource: str, namespace: str) -> bool:
        """Whether RBAC lets that user; `resource` is plural[/subresource][.group][:name]."""
        resource, _, name = resource.partition(":")
        path, _, group = resource.partition(".")
        plural, _, subresource = path.partition("/")
        about = {"verb": verb, "group": group, "resource": plural, "subresource": subresource, "name": name}
        attributes = {**about, "namespace": namespace}
        kind, version = "SubjectAccessReview", "authorization.k8s.io/v1"
        body = {"apiVersion": version, "kind": kind, "spec": {"user": user, "resourceAttributes": attributes}}
        answer = self._request("POST", f"/apis/{version}/subjectaccessreviews", body, "application/json")
        return bool(answer["status"]["allowed"])

    def _send(self, method: str, path: str, body: Body, content: str, query: dict[str, str]) -> str:
        words = urllib.parse.urlencode({"dryRun": "All", "fieldValidation": "Strict", **query})
        try:
            self._request(method, f"{path}?{words}", body, content)
        except urllib.error.HTTPError as error:
            return str(json.loads(error.read())["message"])
        return ""

    def _request(self, method: str, path: str, body: Body, content: str) -> Body:
        request = urllib.request.Request(
            self._server + path, json.dumps(body).encode(), {"Content-Type": content}, method=method
        )
        with urllib.request.urlopen(request, context=self._tls) as answer:
            found: Body = json.load(answer)
            return found


def _path(body: Body, namespace: str) -> str:
    return f"/apis/{body['apiVersion']}/namespaces/{namespace}/{PLURALS[body['kind']]}"
