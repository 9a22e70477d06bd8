"""The operator's configuration: a YAML file, which the chart renders, and a few flags that override it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from rlhf_operator.kinds.base import Prices, Settings

DEFAULT_PATH = Path("/etc/rlhf-operator/config.yaml")
Seconds = Annotated[float, Field(gt=0)]


class ConfigError(Exception):
    """The configuration cannot be used; the message says where and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class PriceList(_Part):
    per_hour: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Money per hour of one unit of a resource: nvidia.com/gpu, cpu, memory (GiB)."
    )


class Log(_Part):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"


class Http(_Part):
    """Where /livez, /readyz and /metrics are served."""

    host: str = "0.0.0.0"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080


class LeaderElection(_Part):
    enabled: bool = True
    name: str = "rlhf-operator"
    lease_duration_seconds: Seconds = 15.0
    renew_deadline_seconds: Seconds = 10.0
    retry_period_seconds: Seconds = 2.0

    @model_validator(mode="after")
    def _ordered(self) -> LeaderElection:
        if not self.retry_period_seconds < self.renew_deadline_seconds < self.lease_duration_seconds:
            raise ValueError("retryPeriodSeconds < renewDeadlineSeconds < leaseDurationSeconds must hold")
        return self


class MetricsConfig(_Part):
    per_object: bool = Field(True, description="Also export facts about single objects, with their names as labels.")


class ApiConfig(_Part):
    max_in_flight: Annotated[int, Field(ge=1)] = 32
    timeout_seconds: Seconds = 30.0


class Config(_Part):
    """All of it. Unknown fields are refused: a misspelt one must not be silently ignored."""

    trainer_image: str
    gateway_image: str
    operator_namespace: str = "rlhf-system"
    operator_service_account: str = "rlhf-operator"
    cluster_domain: str = "cluster.local"
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    prices: PriceList = PriceList()
    namespaces: tuple[str, ...] = Field((), description="Namespaces to serve; empty: the whole cluster.")
    workers: Annotated[int, Field(ge=1, le=256)] = 8
    relist_seconds: Seconds = 600.0
    drain_seconds: Seconds = 15.0
    log: Log = Log()
    http: Http = Http()
    leader_election: LeaderElection = LeaderElection()
    metrics: MetricsConfig = MetricsConfig()
    api: ApiConfig = ApiConfig()

    def settings(self) -> Settings:
        """What plans see of it."""
        return Settings(
            trainer_image=self.trainer_image,
            gateway_image=self.gateway_image,
            operator_namespace=self.operator_namespace,
            operator_service_account=self.operator_service_account,
            cluster_domain=self.cluster_domain,
            image_pull_policy=self.image_pull_policy,
            prices=Prices(self.prices.per_hour),
        )


def load(path: Path, **overrides: Any) -> Config:
    """Reads and checks `path`; `overrides` (by field name) win, those that are None do not count."""
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}; name another with --config"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping, with at least trainerImage and gatewayImage")
    try:
        return Config.model_validate({**raw, **{k: v for k, v in overrides.items() if v is not None}})
    except ValidationError as error:
        problems = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path} is not a valid configuration:\n{problems}") from error
