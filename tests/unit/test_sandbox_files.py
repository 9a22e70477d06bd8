"""Rendered configuration, the audit log's lines, volumes, images' keys and the check for leftovers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox import (
    audit,
    base_image,
    binaries,
    cgroups,
    cluster,
    components,
    config_files,
    control_plane,
    debian,
    leftovers,
    namespaces,
    network,
    processes,
    volumes,
)
from sandbox.errors import SandboxError
from sandbox.images import IMAGES, build_secrets, content_key, source_files
from sandbox.network import NODE_IP, POD_CIDR
from sandbox.paths import CHECKOUT, Paths
from sandbox.progress import Progress

PLACES = Paths(state=Path("/state"), cache=Path("/cache"))


def test_containerd_keeps_images_in_the_state_and_lets_runc_start_without_sys_resource() -> None:
    config = tomllib.loads(config_files.containerd(PLACES, Path("/usr/lib/cni")))

    cri = config["plugins"]["io.containerd.grpc.v1.cri"]
    assert config["root"] == "/state/cluster/containerd"
    assert cri["restrict_oom_score_adj"] is True
    assert cri["cni"]["bin_dir"] == "/usr/lib/cni"
    assert cri["sandbox_image"] == config_files.PAUSE_IMAGE


def test_image_builds_use_the_kubelets_image_store_and_the_hosts_network() -> None:
    config = tomllib.loads(config_files.buildkitd(PLACES))

    worker = config["worker"]["containerd"]
    assert worker["namespace"] == config_files.IMAGE_NAMESPACE
    assert worker["runtime"]["options"]["BinaryName"] == str(config_files.build_runtime_path(PLACES))
    assert "nsenter --net=/run/hostnet runc" in config_files.build_runtime()


def test_the_kubelet_runs_on_cgroup_v1_and_v2_below_the_sandboxes_group() -> None:
    config = json.loads(config_files.kubelet(PLACES))

    assert config["failCgroupV1"] is False
    assert config["cgroupRoot"] == f"/{cgroups.NAME}"
    assert config["clusterDNS"] == [NODE_IP]
    assert config["authentication"]["anonymous"]["enabled"] is False


def test_pods_get_addresses_of_the_pod_range() -> None:
    [plugin] = json.loads(config_files.cni())["plugins"]

    assert plugin["ipam"]["ranges"] == [[{"subnet": POD_CIDR}]]
    assert json.loads(config_files.kube_proxy(PLACES))["clusterCIDR"] == POD_CIDR


def test_the_apiserver_logs_requests_only_when_asked() -> None:
    plain = components.arguments("kube-apiserver", PLACES, audited=False)
    audited = components.arguments("kube-apiserver", PLACES, audited=True)

    assert not [flag for flag in plain if "audit" in flag]
    assert f"--audit-log-path={PLACES.audit_log}" in audited


def test_every_component_has_arguments_and_an_unknown_one_is_named() -> None:
    assert all(components.arguments(name, PLACES, audited=False) for name in components.NAMES)
    with pytest.raises(SandboxError, match="no component is called 'dns'; there are: etcd"):
        components.arguments("dns", PLACES, audited=False)


def test_an_audit_line_becomes_a_request() -> None:
    line = json.dumps(
        {
            "requestReceivedTimestamp": "2026-01-02T03:04:05.678901Z",
            "user": {"username": "system:serviceaccount:rlhf:operator"},
            "userAgent": "python",
            "verb": "patch",
            "objectRef": {
                "apiGroup": "rlhf.dev",
                "resource": "rewardmodeljobs",
                "subresource": "status",
                "namespace": "team",
                "name": "rm",
            },
            "responseStatus": {"code": 409},
        }
    )

    request = audit.parse(line)

    assert request.is_write
    assert (request.group, request.resource, request.subresource) == ("rlhf.dev", "rewardmodeljobs", "status")
    assert (request.namespace, request.name, request.code) == ("team", "rm", 409)
    assert request.time == datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def test_reading_stops_before_a_line_that_is_still_written(tmp_path: Path) -> None:
    event = {"requestReceivedTimestamp": "2026-01-02T03:04:05Z", "user": {"username": "u"}, "verb": "get"}
    log = tmp_path / "audit.jsonl"
    log.write_text(json.dumps(event) + "\n" + json.dumps(event)[:20])

    assert [request.verb for request in audit.read(log)] == ["get"]


def test_a_volume_and_its_claim_are_bound_to_each_other_only() -> None:
    _, volume, claim = json.loads(volumes.manifest("team", "data", Path("/state/v")))["items"]

    assert volume["spec"]["claimRef"] == {"namespace": "team", "name": "data"}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert claim["spec"]["storageClassName"] == volume["spec"]["storageClassName"] == ""
    assert volume["spec"]["hostPath"]["path"] == "/state/v"
    assert volumes.volume_name("a-b", "c") != volumes.volume_name("a", "b-c")


@pytest.mark.parametrize("name", ["data", "team/", "/data", "team/data/x", "Team/data", "../x", "team/.."])
def test_a_name_that_is_no_volume_is_refused(name: str) -> None:
    with pytest.raises(SandboxError, match="write NAMESPACE/NAME"):
        volumes.parse(name)


def _checkout(folder: Path) -> Path:
    for image in IMAGES.values():
        for source in (image.dockerfile, ".dockerignore", *image.sources):
            path = folder / source
            if "." in path.name or path.name.startswith("Dockerfile"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(source)
            else:
                path.mkdir(parents=True, exist_ok=True)
                (path / "__init__.py").write_text(source)
    return folder


def test_an_image_is_built_anew_when_and_only_when_one_of_its_files_changes(tmp_path: Path) -> None:
    checkout = _checkout(tmp_path)
    before = {name: content_key(image, checkout) for name, image in IMAGES.items()}

    cache = checkout / "operator" / "rlhf_operator" / "__pycache__"
    cache.mkdir()
    (cache / "x.pyc").write_text("")
    (checkout / "README.md").write_text("new")
    assert {name: content_key(image, checkout) for name, image in IMAGES.items()} == before

    (checkout / "operator" / "rlhf_operator" / "__init__.py").write_text("changed")
    assert content_key(IMAGES["operator"], checkout) != before["operator"]
    assert content_key(IMAGES["trainer"], checkout) == before["trainer"]


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"Dockerfile\.trainer needs pyproject\.toml"):
        source_files(IMAGES["trainer"], tmp_path)


@pytest.mark.parametrize("image", IMAGES.values(), ids=lambda image: image.name)
def test_what_a_dockerfile_takes_in_is_what_its_key_is_made_of(image) -> None:
    dockerfile = (CHECKOUT / image.dockerfile).read_text()
    copied = {word.rstrip("/") for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M) for word in line.split()}
    bound = set(re.findall(r"type=bind,source=([^,\s]+)", dockerfile))
    covered = {str(file.relative_to(CHECKOUT)) for file in source_files(image, CHECKOUT)}

    assert bound | copied
    for source in bound | copied:
        path = CHECKOUT / source
        files = [path] if path.is_file() else [entry for entry in path.rglob("*.py") if entry.is_file()]
        assert {str(file.relative_to(CHECKOUT)) for file in files} <= covered, source


@pytest.mark.parametrize("image", IMAGES.values(), ids=lambda image: image.name)
def test_images_run_as_nobody_in_particular_from_a_base_the_sandbox_has(image) -> None:
    dockerfile = (CHECKOUT / image.dockerfile).read_text()

    assert f"docker.io/library/{re.search(r'ARG BASE=(.+)', dockerfile).group(1)}" == base_image.REFERENCE
    assert "USER 65532:65532" in dockerfile
    # It would pull a frontend from a registry.
    assert "# syntax" not in dockerfile


def test_build_secrets_are_those_this_machine_has(tmp_path: Path) -> None:
    assert build_secrets(tmp_path) == []

    (tmp_path / "pip.conf").write_text("[global]")
    (tmp_path / "apt" / "sources.list.d").mkdir(parents=True)
    debian = tmp_path / "apt" / "sources.list.d" / "debian.sources"
    debian.write_text("Types: deb\nURIs: mirror\nSuites: bookworm bookworm-security\nComponents: main\n")
    (tmp_path / "apt" / "sources.list.d" / "other.list").write_text("deb mirror bookworm main\n")

    assert build_secrets(tmp_path) == [
        "--secret", f"id=pip,src={tmp_path / 'pip.conf'}", "--secret", f"id=apt,src={debian}",
    ]  # fmt: skip


def test_a_control_plane_whose_start_was_interrupted_does_not_count_as_running(tmp_path: Path) -> None:
    """Of two processes one had been started and written down; the next `up` must start the other."""
    etcd = processes.start(["sleep", "60"], mark="half", log=tmp_path / "etcd.log")
    written = {"mark": "half", "server": "https://127.0.0.1:1", "pids": {"etcd": etcd.pid}}
    (tmp_path / "instance.json").write_text(json.dumps(written))
    plane = control_plane.ControlPlane(tmp_path, binaries.Binaries(tmp_path, Progress(quiet=True)))
    try:
        assert processes.is_running(etcd.pid, "half")
        assert not plane.running
    finally:
        plane.stop()
        etcd.wait()


def test_mounts_of_or_below_the_state_are_found() -> None:
    mountinfo = "\n".join(
        [
            "22 1 254:0 / / rw - ext4 /dev/vda rw",
            "30 22 254:0 /state/cluster/kubelet /run/kubelet rw - ext4 /dev/vda rw",
            r"31 22 0:50 / /state/cluster/a\040b rw - overlay overlay rw",
            "32 22 0:51 / /state/clusters rw - tmpfs tmpfs rw",
        ]
    )

    assert leftovers.mounts(Path("/state/cluster"), mountinfo) == ["/run/kubelet", "/state/cluster/a b"]


def test_a_checkouts_down_leaves_the_sandbox_of_another_checkout_its_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interface and control groups have fixed names: of the one sandbox that runs, whosever it is."""
    removed: list[str] = []
    monkeypatch.setattr(cluster, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(namespaces, "running", lambda: {tmp_path / "other" / "cluster": 1})
    monkeypatch.setattr(network, "remove", lambda: removed.append("network"))
    monkeypatch.setattr(network, "exists", lambda: True)
    monkeypatch.setattr(cgroups, "remove", lambda: removed.append("control groups"))
    monkeypatch.setattr(cgroups, "remaining", lambda: [tmp_path / "group"])
    places, quiet = Paths(tmp_path / "mine", tmp_path / "cache"), Progress(quiet=True)

    cluster.Cluster(places, binaries.Binaries(places.cache, quiet), quiet).down()

    assert removed == []


def test_control_groups_of_version_1_get_the_parents_cpus(tmp_path: Path) -> None:
    for controller in ("cpuset", "memory"):
        (tmp_path / controller).mkdir()
        (tmp_path / controller / "cgroup.procs").write_text("")
    (tmp_path / "cpuset" / "cpuset.cpus").write_text("0-1")
    (tmp_path / "cpuset" / "cpuset.mems").write_text("0")

    cgroups.create(tmp_path)

    assert (tmp_path / "cpuset" / cgroups.NAME / "cpuset.cpus").read_text() == "0-1"
    assert (tmp_path / "memory" / cgroups.NAME).is_dir()
    assert cgroups.controllers(tmp_path) == {"cpuset", "memory"}


def test_control_groups_of_version_2_get_their_controllers_switched_on(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")

    cgroups.create(tmp_path)

    assert "+memory" in (tmp_path / "cgroup.subtree_control").read_text()
    assert "+memory" in (tmp_path / cgroups.NAME / "cgroup.subtree_control").read_text()
    assert cgroups.controllers(tmp_path) == {"cpu", "memory", "pids"}


def test_the_command_line_lists_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sandbox", "--help"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )

    for command in ("up", "down", "status", "load", "kubeconfig", "logs", "volume", "restart", "kubectl", "helm"):
        assert re.search(rf"^    {command} ", done.stdout, re.M), command


def _apt(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """An apt-get that runs `script`, on a machine whose policy file would be in `folder`."""
    program = folder / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(debian, "_POLICY", folder / "policy-rc.d")
    return folder / "policy-rc.d"


def test_services_stay_stopped_while_packages_are_installed_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    policy = _apt(tmp_path, monkeypatch, f"cp {tmp_path}/policy-rc.d {seen}")

    debian.install(["runc"], Progress(quiet=True))

    assert "exit 101" in seen.read_text()
    assert not policy.exists()


def test_what_a_killed_installation_left_is_removed_and_the_machines_own_policy_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _apt(tmp_path, monkeypatch, "exit 0")
    policy.write_text(debian._POLICY_TEXT)
    debian.install([], Progress(quiet=True))
    assert not policy.exists()

    policy.write_text("#!/bin/sh\nexit 0\n")
    debian.install(["runc"], Progress(quiet=True))
    assert policy.read_text() == "#!/bin/sh\nexit 0\n"


def test_a_failed_installation_leaves_no_policy_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = _apt(tmp_path, monkeypatch, "echo no network >&2; exit 100")

    with pytest.raises(SandboxError, match="no network"):
        debian.install(["runc"], Progress(quiet=True))
    assert not policy.exists()
