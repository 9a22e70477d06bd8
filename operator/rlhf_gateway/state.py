"""What this pod does now: the configuration in force and what hangs on it. Lives on one event loop."""

from __future__ import annotations

import logging

from rlhf_gateway.evidence import Ledger
from rlhf_gateway.flights import Flights
from rlhf_gateway.health import HealthTable
from rlhf_gateway.metrics import Metrics
from rlhf_gateway.safety import FilterSlot
from rlhf_gateway.wire import Backend, DataPlaneState, GatewayConfig

log = logging.getLogger(__name__)


class State:
    """Mutable heart of the gateway; everything else reads it afresh for every request."""

    def __init__(self, ledger: Ledger, metrics: Metrics, safety: FilterSlot) -> None:
        self.ledger = ledger
        self.metrics = metrics
        self.safety = safety
        self.flights = Flights()
        self.health = HealthTable(on_change=self._health_changed)
        self.config: GatewayConfig | None = None
        self.config_error: str | None = None
        self.draining = False

    def apply(self, config: GatewayConfig) -> None:
        """Put a configuration in force, at once: the next request is answered by it.

        Requests in flight finish on the arm they began, unless it is a canary that lost its traffic in mode sever.
        """
        before, self.config, self.config_error = self.config, config, None
        if before is not None and before.canary is not None and config.rollback_mode == "sever":
            canary = before.canary.revision
            if canary in serving(before) - serving(config):  # a promoted canary serves on, and is not cut
                log.warning("severed %d answers in flight on revision %s", self.flights.sever(canary), canary)
        if before is None or before.generation != config.generation:
            log.info(
                "generation %d in force: stage %d, canary %s at %g %%",
                config.generation,
                config.stage,
                config.canary.revision if config.canary else "none",
                config.canary_weight_percent,
            )

    def refuse(self, reason: str) -> None:
        """A configuration that cannot be used: the last good one stays in force, and /state says why."""
        if reason != self.config_error:
            log.error("configuration refused, generation %s stays in force: %s", self.generation, reason)
        self.config_error = reason

    @property
    def generation(self) -> int:
        return self.config.generation if self.config is not None else -1

    @property
    def ready(self) -> bool:
        return self.config is not None and not self.draining

    def backends(self) -> tuple[Backend, ...]:
        """The revisions in the configuration in force."""
        config = self.config
        return tuple(b for b in (config.stable, config.canary) if b is not None) if config is not None else ()

    def report(self) -> DataPlaneState:
        """What /state answers."""
        return DataPlaneState(
            pod_uid=self.ledger.pod_uid,
            epoch=self.ledger.epoch,
            generation=self.generation,
            canary_weight_percent=self.config.canary_weight_percent if self.config is not None else 0.0,
            ejected=self.health.all_ejected(),
            in_flight=self.flights.counts(),
            safety_filter=self.safety.digest,
            errors=tuple(error for error in (self.config_error, self.safety.error) if error),
        )

    def _health_changed(self, revision: str, ejected: bool) -> None:
        log.warning("revision %s %s", revision, "ejected: no live endpoint" if ejected else "answers again")


def serving(config: GatewayConfig) -> frozenset[str]:
    """Revisions whose answers may reach users under this configuration."""
    served = {config.stable.revision} if config.stable is not None else set()
    if config.canary is not None and config.canary_weight_percent > 0:
        served.add(config.canary.revision)
    return frozenset(served)
