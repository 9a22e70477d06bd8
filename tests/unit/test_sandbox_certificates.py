"""Certificates: what openssl is asked for, and what it makes of it."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest

from sandbox.certificates import ADMIN_GROUP, Authority, Subject, request_config, subject_alternative_names
from sandbox.errors import SandboxError


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.ensure(tmp_path_factory.mktemp("pki"))


def _text(certificate: Path) -> str:
    shown = ["openssl", "x509", "-noout", "-subject", "-ext", "subjectAltName,extendedKeyUsage", "-in", certificate]
    return subprocess.run(shown, check=True, capture_output=True, text=True).stdout


def test_an_address_is_an_ip_entry_and_a_name_a_dns_entry() -> None:
    names = subject_alternative_names(["10.97.0.2", "::1", "localhost", "kubernetes.default.svc", "2.example.org"])

    assert names == "IP:10.97.0.2,IP:::1,DNS:localhost,DNS:kubernetes.default.svc,DNS:2.example.org"


def test_user_and_groups_become_common_name_and_organisations(authority: Authority) -> None:
    certificate, _ = authority.issue("alice", Subject("alice@example.com", groups=("ml-engineers", ADMIN_GROUP)))

    shown = _text(certificate)

    assert "CN = alice@example.com" in shown
    assert "O = ml-engineers" in shown
    assert "O = system:masters" in shown
    assert "TLS Web Client Authentication" in shown


def test_a_server_certificate_is_for_its_hosts_and_verifies_against_the_authority(authority: Authority) -> None:
    certificate, _ = authority.issue("server", Subject("server", hosts=("127.0.0.1", "localhost")))

    shown = _text(certificate)
    verified = subprocess.run(
        ["openssl", "verify", "-purpose", "sslserver", "-CAfile", authority.certificate, certificate],
        capture_output=True,
        check=False,
    )

    assert "IP Address:127.0.0.1" in shown
    assert "DNS:localhost" in shown
    assert "TLS Web Server Authentication" in shown
    assert verified.returncode == 0


def test_the_same_request_is_answered_with_the_same_certificate_and_a_new_one_with_a_new(authority: Authority) -> None:
    subject = Subject("bob")
    first = authority.issue("bob", subject)[0].read_bytes()

    assert authority.issue("bob", subject)[0].read_bytes() == first
    assert authority.issue("bob", Subject("bob", groups=("admins",)))[0].read_bytes() != first


def test_an_interrupted_signing_is_repeated(authority: Authority) -> None:
    subject = Subject("carol")
    certificate, _ = authority.issue("carol", subject)
    certificate.write_text("cut o")
    (authority.folder / "carol.cnf").unlink()

    assert "CN = carol" in _text(authority.issue("carol", subject)[0])


def test_a_kubeconfig_holds_everything_and_is_readable_by_its_owner_only(authority: Authority) -> None:
    path = authority.kubeconfig("dora", Subject("dora"), server="https://127.0.0.1:6443")

    config = json.loads(path.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]

    assert cluster["server"] == "https://127.0.0.1:6443"
    assert base64.b64decode(cluster["certificate-authority-data"]) == authority.certificate.read_bytes()
    assert user["name"] == "dora"
    assert b"PRIVATE KEY" in base64.b64decode(user["user"]["client-key-data"])
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["", "a\nO = system:masters", "$ENV::HOME", "a#b", "a\\b", " a"])
def test_a_name_that_openssl_could_misread_is_refused(name: str) -> None:
    with pytest.raises(SandboxError, match="cannot be a user, group or host"):
        request_config(Subject(name))
