"""The cluster the demo plays on, through kubectl and helm alone: what a user would type, the demo types."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

# A stream ends after this and is reopened: a reader that waits with a deadline looks at the clock at least that often.
WATCH_LIMIT = "--request-timeout=20s"


class CommandError(RuntimeError):
    """A kubectl or helm call that the demo cannot go on without; carries what the tool printed."""


@dataclass(frozen=True)
class Cluster:
    """`kubectl` and `helm` are argument prefixes, so that the sandbox's own binaries serve as well as the user's."""

    kubectl_command: tuple[str, ...]
    helm_command: tuple[str, ...]
    environment: Mapping[str, str]
    namespace: str

    def kubectl(self, *args: str, stdin: str | None = None, check: bool = True) -> str:
        return self._run((*self.kubectl_command, "-n", self.namespace, *args), stdin, check)

    def helm(self, *args: str) -> str:
        return self._run((*self.helm_command, *args), None, True)

    def _run(self, argv: Sequence[str], stdin: str | None, check: bool) -> str:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, env={**os.environ, **self.environment}, check=False
        )
        if check and done.returncode:
            raise CommandError(f"{' '.join(argv[-8:])}: exit {done.returncode}\n{done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: Object) -> None:
        for item in objects:
            self.kubectl("apply", "--server-side", "--field-manager=demo", "-f", "-", stdin=json.dumps(item))

    def get(self, resource: str, name: str) -> Object | None:
        text = self.kubectl("get", resource, name, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def list(self, resource: str, selector: str = "") -> list[Object]:
        args = ("get", resource, "-o", "json") + (("-l", selector) if selector else ())
        items: list[Object] = json.loads(self.kubectl(*args))["items"]
        return items

    def watch(self, resource: str, name: str) -> Iterator[Object]:
        """Yields the object now and after every change; a stream that ends is reopened while the caller reads."""
        while True:
            process = subprocess.Popen(
                (
                    *self.kubectl_command,
                    "-n",
                    self.namespace,
                    "get",
                    resource,
                    name,
                    "--watch",
                    "-o",
                    "json",
                    WATCH_LIMIT,
                ),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **self.environment},
            )
            try:
                assert process.stdout is not None
                yield from decode_stream(iter(process.stdout.readline, ""))
            finally:
                process.kill()
                _, errors = process.communicate()
            if "NotFound" in errors:
                raise CommandError(f"{resource}/{name} does not exist: {errors.strip()}")


def decode_stream(lines: Iterator[str]) -> Iterator[Object]:
    """Splits the concatenated, indented JSON documents that `kubectl get --watch -o json` prints."""
    buffer: list[str] = []
    for line in lines:
        buffer.append(line)
        if line.startswith("}"):
            yield json.loads("".join(buffer))
            buffer.clear()
