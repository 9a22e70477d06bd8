"""A certificate authority of its own for each cluster, and kubeconfigs with client certificates.

Kubernetes takes a client's user name from the certificate's common name and its groups from the
organisations. Signing is openssl's (3.0 or newer); what it is asked for is rendered by pure functions here.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox import processes
from sandbox.errors import SandboxError

DAYS = "3650"
ADMIN_GROUP = "system:masters"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9:@._/-]*[A-Za-z0-9])?")
_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Subject:
    """Who a certificate is for. With `hosts` (DNS names and IP addresses) it is a server's, else a client's."""

    common_name: str
    groups: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    authority: bool = False


ADMIN = Subject("admin", groups=(ADMIN_GROUP,))


def subject_alternative_names(hosts: Sequence[str]) -> str:
    """`IP:10.0.0.1,DNS:localhost`: an address must be an IP entry, or clients refuse the certificate."""
    address = re.compile(r"[0-9.]+|[0-9a-fA-F]*:[0-9a-fA-F:.]*")
    return ",".join(f"{'IP' if address.fullmatch(host) else 'DNS'}:{host}" for host in hosts)


def request_config(subject: Subject) -> str:
    """openssl's configuration for one certificate. Raises SandboxError for a name it could misread."""
    for name in (subject.common_name, *subject.groups, *subject.hosts):
        if not _NAME.fullmatch(name):
            raise SandboxError(
                f"{name!r} cannot be a user, group or host of a certificate: use letters, digits and : @ . _ / -,"
                " beginning and ending with a letter or digit"
            )
    lines = ["[req]", "prompt = no", "distinguished_name = name", "x509_extensions = extensions", "[name]"]
    lines += [f"{number}.O = {group}" for number, group in enumerate(subject.groups)]
    lines += [f"CN = {subject.common_name}", "[extensions]", "subjectKeyIdentifier = hash"]
    if subject.authority:
        lines += ["basicConstraints = critical,CA:TRUE", "keyUsage = critical,keyCertSign,cRLSign"]
    else:
        usage = "serverAuth" if subject.hosts else "clientAuth"
        lines += [f"extendedKeyUsage = {usage}", "authorityKeyIdentifier = keyid"]
    if subject.hosts:
        lines.append(f"subjectAltName = {subject_alternative_names(subject.hosts)}")
    return "\n".join(lines) + "\n"


def render_kubeconfig(*, server: str, user: str, authority: bytes, certificate: bytes, key: bytes) -> str:
    """A kubeconfig with everything embedded, as JSON (which is YAML)."""

    def encoded(content: bytes) -> str:
        return base64.b64encode(content).decode()

    credentials = {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "sandbox", "cluster": {"server": server, "certificate-authority-data": encoded(authority)}}
        ],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": "sandbox", "context": {"cluster": "sandbox", "user": user}}],
        "current-context": "sandbox",
    }
    return json.dumps(config, indent=1) + "\n"


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a folder: `ca.crt`, `ca.key`, and `NAME.crt`, `NAME.key` of what it issued."""

    folder: Path

    @classmethod
    def ensure(cls, folder: Path) -> Authority:
        """The authority of this folder, made on first use with the key of the ServiceAccount tokens."""
        authority = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        if not (folder / "complete").exists():
            authority._sign("ca", Subject("rlhf-sandbox-ca", authority=True))
            authority._sign("service-account", Subject("service-account", authority=True))
            (folder / "complete").touch()
        return authority

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        return self.folder / "ca.key"

    @property
    def service_account_key(self) -> Path:
        """What ServiceAccount tokens are signed with."""
        return self.folder / "service-account.key"

    @property
    def service_account_certificate(self) -> Path:
        """What ServiceAccount tokens are verified with (kube-apiserver takes no PKCS #8 key for that)."""
        return self.folder / "service-account.crt"

    def issue(self, name: str, subject: Subject) -> tuple[Path, Path]:
        """Certificate and key of `subject`; the same ones when asked again with the same subject."""
        request = self.folder / f"{name}.cnf"
        certificate, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        wanted = request_config(subject)
        # The request is written last: an interrupted signing is repeated.
        if not request.exists() or request.read_text() != wanted:
            self._sign(name, subject)
        return certificate, key

    def kubeconfig(self, name: str, subject: Subject, *, server: str, to: Path | None = None) -> Path:
        """Writes a kubeconfig that acts as `subject`, readable by its owner only, and returns its path."""
        certificate, key = self.issue(name, subject)
        path = to or self.folder / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(
            render_kubeconfig(
                server=server,
                user=subject.common_name,
                authority=self.certificate.read_bytes(),
                certificate=certificate.read_bytes(),
                key=key.read_bytes(),
            )
        )
        return path

    def _sign(self, name: str, subject: Subject) -> None:
        request = self.folder / f"{name}.cnf.new"
        request.write_text(request_config(subject))
        signer = () if subject.authority else ("-CA", self.certificate, "-CAkey", self.key)
        outputs = ("-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.crt")
        processes.run(["openssl", "req", "-x509", *_EC, "-days", DAYS, "-config", request, *signer, *outputs])
        request.rename(self.folder / f"{name}.cnf")
