"""Where data lies: local paths and ``file://`` (a mounted claim is one) and ``s3://``, all through fsspec.

Credentials come from the environment alone (the AWS_* names that every S3 client knows), never from an address, which
ends up in statuses and logs.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

import fsspec  # type: ignore[import-untyped]

from rlhf_trainer.exits import Invalid

SCHEMES = ("file", "s3")
_S3_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "access_key_id",
    "AWS_SECRET_ACCESS_KEY": "secret_access_key",
    "AWS_SESSION_TOKEN": "session_token",
    "AWS_REGION": "region",
    "AWS_ENDPOINT_URL": "endpoint",
}
_RETRY_SECONDS = 20


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises Invalid, naming the address and what to check."""
    filesystem, path = _locate(uri)
    try:
        return bytes(filesystem.cat_file(path))
    except Exception as error:  # every store has errors of its own
        raise _refusal(uri, "read", error) from error


def write_bytes(uri: str, content: bytes) -> None:
    """Writes the whole object; a local file appears complete or not at all. Raises Invalid."""
    filesystem, path = _locate(uri)
    try:
        if filesystem.protocol[0] == "file":
            _replace(path, content)
        else:
            filesystem.pipe_file(path, content)
    except Exception as error:  # every store has errors of its own
        raise _refusal(uri, "written", error) from error


def scheme_of(uri: str) -> str:
    """``file`` for a plain path. Raises Invalid for what is not accepted."""
    scheme = uri.split("://", 1)[0] if "://" in uri else "file"
    if scheme == "pvc":
        raise Invalid(f"{uri}: a claim is only known inside the cluster; give the path where it is mounted")
    if scheme not in SCHEMES:
        raise Invalid(f"{uri}: scheme '{scheme}' is not accepted; use a path, file:// or s3://bucket/key")
    if "://" not in uri:
        return scheme
    parts = urlsplit(uri)
    # The address is not repeated here: it holds a secret.
    if "@" in parts.netloc:
        raise Invalid(
            f"{scheme}://…: the address holds credentials; give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if parts.query or parts.fragment:
        raise Invalid(f"{scheme}://{parts.netloc}{parts.path}: an address has no '?' or '#'; leave them out")
    if ".." in parts.path.split("/"):
        raise Invalid(f"{uri}: an address must not hold '..'; write the path out")
    if scheme == "s3" and (not parts.netloc or not parts.path.strip("/")):
        raise Invalid(f"{uri}: an object is s3://<bucket>/<key>; name both")
    return scheme


def _locate(uri: str) -> tuple[Any, str]:
    if scheme_of(uri) == "s3":
        return _s3(), uri.removeprefix("s3://")
    return fsspec.filesystem("file"), uri.removeprefix("file://")


def _s3() -> Any:
    try:
        from obstore.fsspec import FsspecStore
    except ImportError as error:
        raise Invalid("s3:// needs the package obstore; install rlhf-operator[s3]") from error
    options: dict[str, Any] = {
        name: os.environ[variable] for variable, name in _S3_VARIABLES.items() if os.environ.get(variable)
    }
    plain = options.get("endpoint", "").startswith("http://")
    store: Any = FsspecStore
    return store(
        "s3",
        config=options,
        client_options={"allow_http": plain, "timeout": f"{_RETRY_SECONDS}s"},
        retry_config={"max_retries": 2},
    )


def _replace(path: str, content: bytes) -> None:
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    partial = f"{path}.partial-{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _refusal(uri: str, verb: str, error: Exception) -> Invalid:
    why = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "") or type(error).__name__
    why = why.split(": <?xml")[0]
    check = "the bucket, AWS_ENDPOINT_URL and the AWS_* credentials" if uri.startswith("s3:") else "path and mount"
    return Invalid(f"{uri}: cannot be {verb} ({why[:300]}); check {check}")
