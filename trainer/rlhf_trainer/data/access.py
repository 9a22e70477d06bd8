"""Where data lies: local paths and ``file://`` (a mounted claim is one) and ``s3://``.

Credentials come from the environment alone (the AWS_* names that every S3 client knows, those of a cloud's workload
identity among them: the client reads them itself), never from an address, which ends up in statuses and logs.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf_trainer.exits import Invalid

SCHEMES = ("file", "s3")
_TIMEOUT_SECONDS = 20
_AGAIN = ("408", "429")  # beside 5xx: what a store answers that has no time now
# What answers of 400 and 403 say in that case; a service of temporary credentials throttles by 400.
_BUSY_CODES = ("Throttling", "RequestTimeout", "RequestLimitExceeded", "SlowDown", "IDPCommunicationError")


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises Invalid, naming the address and what to check."""
    scheme = scheme_of(uri)
    try:
        if scheme == "file":
            return Path(_path(uri)).read_bytes()
        store, key = _s3(uri)
        return bytes(store.get(key).bytes())
    except Exception as error:  # every store has errors of its own
        raise _refusal(uri, "read", error) from error


def write_bytes(uri: str, content: bytes) -> None:
    """Writes the whole object; a local file appears complete or not at all. Raises Invalid."""
    scheme = scheme_of(uri)
    try:
        if scheme == "file":
            _replace(_path(uri), content)
        else:
            store, key = _s3(uri)
            store.put(key, content)
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


def _path(uri: str) -> str:
    return uri.removeprefix("file://")


def open_bucket(name: str, timeout: float, retries: int = 0) -> Any:
    """obstore's client of one bucket. Unless told, it does not try again: the caller knows for how long that is worth
    it. A process that has used an ``_async`` method of it must end by ``os._exit``: threads of the client may still
    hold Python objects, and abort the process when they let go of them while the interpreter shuts down."""
    try:
        store = importlib.import_module("obstore.store").S3Store
    except ImportError as error:
        raise Invalid("s3:// needs the package obstore; install rlhf-operator[s3]") from error
    return store(name, **_options(timeout, retries))


def _s3(uri: str) -> tuple[Any, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return open_bucket(bucket, _TIMEOUT_SECONDS, retries=2), key


def _options(timeout: float, retries: int) -> dict[str, Any]:
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return {
        "client_options": {"allow_http": plain, "timeout": f"{timeout:.0f}s"},
        "retry_config": {"max_retries": retries},
    }


_CODE = re.compile(r"<Code>(\w+)</Code>")


def why(error: Exception) -> str:
    """A store's error in one line; the document that S3 sends with it has the code, and parts of the request."""
    text = str(error)
    first = getattr(error, "strerror", None) or next(iter(text.splitlines()), "") or type(error).__name__
    code = _CODE.search(text)
    return first.split(": <?xml")[0].rstrip(": ")[:300] + (f": {code[1]}" if code else "")


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed in a moment: unless the store has said what is wrong with it."""
    if isinstance(error, FileNotFoundError | ValueError):
        return False
    text = str(error)
    code, status = _CODE.search(text), re.search(r"status code: (\d{3})", text)
    if code is not None and code[1].startswith(_BUSY_CODES):
        return True
    if status is None:
        return "configured region" not in text  # the store sends to another region, without a status of its own
    return status[1].startswith("5") or status[1] in _AGAIN


def refuses(error: BaseException) -> bool:
    """Whether the store knows the request and will not serve it to these credentials."""
    return re.search(r"status code: (400|401|403)", str(error)) is not None


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
    check = "the bucket, AWS_ENDPOINT_URL and the AWS_* credentials" if uri.startswith("s3:") else "path and mount"
    return Invalid(f"{uri}: cannot be {verb} ({why(error)}); check {check}")
