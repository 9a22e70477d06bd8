"""What every part of a user's configuration is built from."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Spec(BaseModel):
    """Base of everything a user writes: camelCase on the wire, unknown fields refused, immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_enum_values=False
    )


PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Seed = Annotated[
    int,
    Field(
        ge=0,
        le=2**31 - 1,
        description="Of all randomness; the same seed, world size and inputs give the same artifact.",
    ),
]

_CLAIM = r"pvc://[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(/[A-Za-z0-9_][A-Za-z0-9._-]*)*"
_STORED = r"s3://[a-z0-9][-a-z0-9]*([.][a-z0-9][-a-z0-9]*)*(/[A-Za-z0-9_][A-Za-z0-9._=-]*)+"
PVC_URI = f"^{_CLAIM}$"
INPUT_URI = f"^({_CLAIM}|{_STORED})$"
PinnedUri = Annotated[
    str, Field(pattern=INPUT_URI, max_length=512, description="pvc://<claim>/<path> or s3://<bucket>/<key>")
]
PinnedDigest = Annotated[
    str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71, description="sha256:<64 hex digits>")
]


class DeepSpeed(Spec):
    """The sharding of the one DeepSpeed engine."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(2, description="ZeRO stage: 0 (none) to 3 (parameters too).")


class Precision(StrEnum):
    """auto: bfloat16 where the accelerator has it, float32 elsewhere."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Lora(Spec):
    """Low-rank adapters (Hu et al. 2021) instead of all weights; the reference is the model without them."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank r of every adapter.")
    alpha: Annotated[float, Field(gt=0.0, le=8192.0)] = Field(32.0, description="Scale: alpha / r times the update.")
    target_modules: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=32)] = Field(
        default_factory=list, description="Names of the linear layers that get adapters; none named: all but the head."
    )
