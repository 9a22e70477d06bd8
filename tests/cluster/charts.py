"""Renders the charts with the pinned Helm."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from sandbox import binaries, paths
from sandbox.progress import Progress

HELM = Path(__file__).resolve().parents[2] / "helm"
Body = dict[str, Any]


class ChartError(Exception):
    """What Helm said."""


class Rendered:
    """The objects of one rendering."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.objects: list[Body] = [body for body in yaml.safe_load_all(text) if body]

    def of(self, kind: str) -> list[Body]:
        return [body for body in self.objects if body["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Body:
        found = [body for body in self.of(kind) if name in (None, body["metadata"]["name"])]
        assert len(found) == 1, f"{len(found)} of {kind} {name or ''}"
        return found[0]


class Charts:
    """`render(chart, values)`; starting Helm takes a moment, so equal renderings are done once."""

    def __init__(self) -> None:
        self._command = binaries.from_environment(paths.from_environment(), Progress()).command("helm")
        self._done: dict[str, Rendered] = {}

    def render(
        self, chart: str, values: Body | None = None, *, release: str = "rlhf-operator", namespace: str = "rlhf-system"
    ) -> Rendered:
        key = json.dumps([chart, values, release, namespace])
        if key not in self._done:
            words = ["template", release, str(HELM / chart), "--namespace", namespace, "--values", "-"]
            done = subprocess.run(
                [*self._command, *words], input=json.dumps(values or {}), capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise ChartError(done.stderr)
            self._done[key] = Rendered(done.stdout)
        return self._done[key]


def helm(kubeconfig: Path, *words: str) -> str:
    """Runs Helm against a cluster; raises ChartError with what it says."""
    command = binaries.from_environment(paths.from_environment(), Progress()).command("helm")
    done = subprocess.run(
        [*command, "--kubeconfig", str(kubeconfig), *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ChartError(done.stderr)
    return done.stdout
