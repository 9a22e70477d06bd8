"""Where the s3:// inputs of a training job are, and which Secret opens them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from rlhf_operator.api.meta import ApiSpec, Cel, Form

ENDPOINT, REGION = "AWS_ENDPOINT_URL", "AWS_REGION"
# Keys of the Secret, and names of the variables; the last one is there for temporary credentials only.
ACCESS_KEY, SECRET_KEY, SESSION_TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"


class SecretRef(ApiSpec):
    """A Secret in the same namespace. The operator never reads it: pods get single keys of it from the kubelet."""

    name: Annotated[
        str,
        Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253, description="Name of the Secret."),
        Form("must be the name of a Secret in the same namespace: a-z, 0-9, '-' and '.'"),
    ]


class ObjectStore(ApiSpec):
    """Of every s3:// input. Without it pods use what their environment gives them, such as the role of the service
    account that podTemplate names (IRSA and other workload identities)."""

    endpoint: (
        Annotated[
            str,
            Field(pattern=r"^https?://[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?$", max_length=256),
            Form("must be http(s)://<host>[:<port>], without credentials and without a path"),
        ]
        | None
    ) = Field(None, description="http(s)://<host>[:<port>]; default: that of AWS in the region.")
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$", max_length=64)] | None = Field(
        None, description="Default: us-east-1."
    )
    secret_ref: SecretRef | None = Field(
        None,
        description=f"A Secret with the keys {ACCESS_KEY} and {SECRET_KEY}, and {SESSION_TOKEN} if they are temporary.",
    )

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "has(self.endpoint) || has(self.region) || has(self.secretRef)",
            "objectStore says nothing: name an endpoint, a region or a secretRef, or remove it",
        ),
    )

    def variables(self) -> tuple[str, ...]:
        """The environment variables that it sets."""
        given = {"endpoint": self.endpoint, "region": self.region, "secretRef": self.secret_ref}
        return tuple(name for field, value in given.items() if value is not None for name in _BY_FIELD[field])


_BY_FIELD = {"endpoint": (ENDPOINT,), "region": (REGION,), "secretRef": (ACCESS_KEY, SECRET_KEY, SESSION_TOKEN)}
SET_ONCE = Cel(
    "!has(self.objectStore) || !has(self.trainer.env) || self.trainer.env.all(e, "
    + " && ".join(
        f"!(has(self.objectStore.{field}) && e.name in {list(names)!r})" for field, names in _BY_FIELD.items()
    )
    + ")",
    "trainer.env sets a variable that objectStore sets: remove it from one of them",
    field_path=".trainer.env",
)


def read_by(*inputs: str) -> Cel:
    """An objectStore that no input is in: a typo in a uri, most likely."""
    return Cel(
        "!has(self.objectStore) || " + " || ".join(_in_store(path) for path in inputs),
        "objectStore is for s3:// inputs, and this job has none: name one by an s3:// uri, or remove objectStore",
        field_path=".objectStore",
    )


def _in_store(path: str) -> str:
    """`validation.humanScores`: that it, its parents and its uri are there, and the uri is of an object store."""
    parts = [*path.split("."), "uri"]
    there = [f"has(self.{'.'.join(parts[:length])})" for length in range(1, len(parts) + 1)]
    return f"({' && '.join(there)} && self.{'.'.join(parts)}.startsWith('s3://'))"
