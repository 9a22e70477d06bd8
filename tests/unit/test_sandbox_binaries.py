"""Finding programs: named ones first, then those on PATH at the right version, then built and cached."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from sandbox import binaries, paths
from sandbox.binaries import KUBE, PAUSE, PROGRAMS, Binaries, content_key
from sandbox.errors import SandboxError
from sandbox.progress import Progress


def _program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def quiet() -> Progress:
    return Progress(quiet=True)


@pytest.fixture
def cached_kube(tmp_path: Path) -> Path:
    """A cache in which the build of `kube` is there already."""
    import platform

    key = content_key(KUBE.sources, KUBE.flags, f"{platform.system()}-{platform.machine()}")
    return _program(tmp_path / "cache" / "bin" / f"kube-{key}" / "kube", "built")


def test_the_key_changes_with_content_name_flags_and_target(tmp_path: Path) -> None:
    source = tmp_path / "main.go"
    source.write_text("package main")
    original = content_key(tmp_path, ["-trimpath"], "Linux-x86_64")

    assert content_key(tmp_path, ["-trimpath"], "Linux-x86_64") == original
    assert content_key(tmp_path, [], "Linux-x86_64") != original
    assert content_key(tmp_path, ["-trimpath"], "Linux-aarch64") != original
    source.write_text("package  main")
    assert content_key(tmp_path, ["-trimpath"], "Linux-x86_64") != original
    source.write_text("package main")
    source.rename(tmp_path / "other.go")
    assert content_key(tmp_path, ["-trimpath"], "Linux-x86_64") != original


def test_a_named_program_is_used_whatever_its_version(tmp_path: Path, quiet: Progress, cached_kube: Path) -> None:
    named = _program(tmp_path / "mine" / "etcd", "etcd Version: 2.0.0")
    programs = Binaries(tmp_path / "cache", quiet, bin_dirs=(named.parent,), search_path="")

    assert programs.command("etcd") == [str(named)]
    assert programs.command("helm") == [str(cached_kube), "helm"]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("etcd", "etcd Version: 3.6.5", "etcd Version: 3.5.21"),
        ("kube-apiserver", "Kubernetes v1.35.4", "Kubernetes v1.35.40"),
        ("kubectl", "Client Version: v1.34.9", "Client Version: v1.32.4-dispatcher"),
        ("helm", "v4.1.4+gabc", "v3.19.0+gabc"),
        ("coredns", "CoreDNS-1.12.3", "CoreDNS-1.13.0"),
    ],
)
def test_a_program_on_path_is_used_at_the_right_version_only(
    name: str, right: str, wrong: str, tmp_path: Path, quiet: Progress, cached_kube: Path
) -> None:
    on_path = _program(tmp_path / "path" / name, right)
    good = Binaries(tmp_path / "cache", quiet, search_path=str(on_path.parent))
    assert good.command(name) == [str(on_path)]

    _program(on_path, wrong)
    bad = Binaries(tmp_path / "cache", quiet, search_path=str(on_path.parent))
    assert bad.command(name) == [str(cached_kube), name]


def test_without_go_the_message_says_what_to_install_or_name(
    tmp_path: Path, quiet: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(SandboxError, match=r"Install Go 1\.26.*RLHF_SANDBOX_BIN=FOLDER"):
        Binaries(tmp_path / "cache", quiet).command("etcd")


def test_a_failed_build_leaves_nothing_that_looks_built(
    tmp_path: Path, quiet: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = _program(tmp_path / "path" / "go", "")
    go.write_text('#!/bin/sh\necho "no such module" >&2\nexit 1\n')
    monkeypatch.setenv("PATH", f"{go.parent}:/usr/bin:/bin")

    with pytest.raises(SandboxError, match="no such module"):
        Binaries(tmp_path / "cache", quiet).command("pause")

    assert [entry.name for entry in (tmp_path / "cache" / "bin").iterdir()] == [f"{PAUSE.name}.lock"]


def test_a_named_folder_that_does_not_exist_is_an_error(tmp_path: Path, quiet: Progress) -> None:
    places = paths.from_environment({"RLHF_SANDBOX_CACHE": str(tmp_path)})

    with pytest.raises(SandboxError, match="does not exist"):
        binaries.from_environment(places, quiet, environment={"RLHF_SANDBOX_BIN": str(tmp_path / "none")})


def test_kubernetes_is_pinned_once() -> None:
    module = (KUBE.sources / "go.mod").read_text()

    assert f"k8s.io/kubernetes v{binaries.KUBERNETES_VERSION}\n" in module
    assert f"gitVersion=v{binaries.KUBERNETES_VERSION}" in " ".join(KUBE.flags)
    assert "go.etcd.io/etcd/server/v3 v3.6." in module
    assert "helm.sh/helm/v4 v4.1." in module
    assert "github.com/coredns/coredns v1.12." in module


def test_every_program_of_the_one_binary_is_in_its_table() -> None:
    source = (KUBE.sources / "main.go").read_text()

    for program in PROGRAMS.values():
        if program.module is KUBE:
            assert f'"{program.name}":' in source


def test_the_cache_outlives_the_checkout_and_the_state_does_not() -> None:
    places = paths.from_environment({"XDG_CACHE_HOME": "/home/user/.cache"})

    assert places.cache == Path("/home/user/.cache/rlhf-operator")
    assert places.state == paths.CHECKOUT / ".sandbox"
    assert paths.from_environment({"RLHF_SANDBOX_DIR": "/data/sandbox"}).state == Path("/data/sandbox")


def test_progress_shows_elapsed_times_and_is_silent_when_asked() -> None:
    times = iter([0.0, 3.25, 125.0])
    stream = io.StringIO()
    progress = Progress(stream, clock=lambda: next(times))

    progress.say("one")
    progress.say("two")

    assert stream.getvalue() == "[  3.2s] one\n[ 2m05s] two\n"
    silent = io.StringIO()
    Progress(silent, quiet=True).say("nothing")
    assert silent.getvalue() == ""
