"""Follows this rollout's own ConfigMap through the API, so that a new weight is in force as soon as it is written.

A mounted ConfigMap would lag by up to a minute. Whatever goes wrong here, the last good configuration stays in force:
traffic does not depend on the API server.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Protocol

from pydantic import ValidationError

from rlhf_gateway.kube import ApiError, KubeApi
from rlhf_gateway.wire import CONFIG_KEY, GatewayConfig

log = logging.getLogger(__name__)

WATCH_SECONDS = 60
BACKOFF_SECONDS = (0.1, 5.0)  # first and longest pause after a failure
REWATCH_SECONDS = 0.02  # between watches that ended well; events of the pause are not lost


class Target(Protocol):
    """Who is told."""

    def apply(self, config: GatewayConfig) -> None: ...

    def refuse(self, reason: str) -> None: ...


class ConfigError(ValueError):
    """A ConfigMap that holds no usable configuration; the message says what to do."""


def parse(config_map: dict[str, Any]) -> GatewayConfig:
    """The configuration in a ConfigMap. Raises ConfigError."""
    name = config_map.get("metadata", {}).get("name", "?")
    text = (config_map.get("data") or {}).get(CONFIG_KEY)
    if text is None:
        raise ConfigError(f"ConfigMap {name} has no key {CONFIG_KEY}: the operator writes it, leave it to the operator")
    try:
        return GatewayConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"ConfigMap {name}, key {CONFIG_KEY}: {place}: {first['msg']}") from error


class ConfigWatch:
    """List, then watch, forever."""

    def __init__(self, api: KubeApi, namespace: str, name: str, target: Target, draw: random.Random) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._target = target
        self._draw = draw

    async def run(self) -> None:
        """Never returns. The API's order is trusted: a generation that goes back is a restored backup, and in force."""
        pause, longest = BACKOFF_SECONDS
        while True:
            try:
                version = await self._relist()
                pause = BACKOFF_SECONDS[0]
                while True:
                    version = await self._follow(version)
                    await asyncio.sleep(REWATCH_SECONDS)
            except ApiError as error:
                if error.status == 410:  # too old a version: list again, at once
                    continue
                log.warning("following ConfigMap %s/%s: %s", self._namespace, self._name, error)
                if error.status in (401, 403):
                    self._target.refuse(f"may not read ConfigMap {self._name} (HTTP {error.status}): check its Role")
            await asyncio.sleep(pause * self._draw.uniform(0.5, 1.5))
            pause = min(pause * 2, longest)

    async def _relist(self) -> str:
        config_map, version = await self._api.list_config_map(self._namespace, self._name)
        if config_map is not None:
            self._take(config_map)
        return version

    async def _follow(self, version: str) -> str:
        """One watch, to its regular end; the version to go on from."""
        async for event in self._api.watch_config_map(self._namespace, self._name, version, WATCH_SECONDS):
            version = event["object"]["metadata"]["resourceVersion"]
            if event["type"] in ("ADDED", "MODIFIED"):
                self._take(event["object"])
            elif event["type"] == "DELETED":
                self._target.refuse(f"ConfigMap {self._name} was deleted: the operator will write it again")
        return version

    def _take(self, config_map: dict[str, Any]) -> None:
        try:
            self._target.apply(parse(config_map))
        except ConfigError as error:
            self._target.refuse(str(error))
