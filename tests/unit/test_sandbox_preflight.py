"""What stands in the way of the sandbox is named together with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox import preflight
from sandbox.errors import SandboxError
from sandbox.network import overlapping
from sandbox.paths import Paths
from sandbox.preflight import Facts, problems


def test_a_machine_that_has_everything_has_no_problems() -> None:
    assert problems(Facts()) == []


@pytest.mark.parametrize(
    ("facts", "what", "remedy"),
    [
        (Facts(system="Darwin"), "needs Linux; this is Darwin", "Linux machine"),
        (Facts(is_root=False), "needs root", "sudo"),
        (Facts(missing_packages=("runc", "iproute2"), has_apt=False), "runc, iproute2", "Install them"),
        (Facts(cgroup_controllers=frozenset({"cpu"})), "missing: memory, pids", "/sys/fs/cgroup"),
        (Facts(namespaces_refused="Operation not permitted"), "Operation not permitted", "privileged"),
        (Facts(overlay_refused="invalid argument"), "overlayfs", "RLHF_SANDBOX_DIR"),
        (Facts(overlapping_routes=("10.96.0.0/12",)), "10.96.0.0/12", "another machine or cluster"),
        (Facts(other_sandbox=Path("/a/.sandbox/cluster")), "from /a/.sandbox/cluster", "RLHF_SANDBOX_DIR=/a/.sandbox "),
        (Facts(state=Path("/run/user/0/x")), "below /run", "RLHF_SANDBOX_DIR"),
        (Facts(free_disk_gb=7.4), "7 GB are free", "larger disk"),
        (Facts(memory_gb=1.5), "1.5 GB of memory", "larger machine"),
    ],
)
def test_each_problem_is_named_with_its_remedy(facts: Facts, what: str, remedy: str) -> None:
    found = problems(facts)

    assert len(found) == 1
    assert what in found[0].what
    assert remedy in found[0].remedy


def test_packages_that_apt_can_install_are_no_problem() -> None:
    assert problems(Facts(missing_packages=("containerd", "runc"), has_apt=True)) == []


def test_images_that_are_there_need_no_second_room() -> None:
    assert problems(Facts(free_disk_gb=8, has_images=True)) == []


def test_several_problems_are_told_at_once() -> None:
    assert len(problems(Facts(free_disk_gb=1, memory_gb=1, overlapping_routes=("10.96.0.0/12",)))) == 3


def test_the_error_ends_with_how_to_use_another_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preflight, "gather", lambda _: Facts(system="Darwin"))

    with pytest.raises(SandboxError, match=r"needs Linux[\s\S]*make demo KUBECONFIG="):
        preflight.check(Paths(tmp_path, tmp_path))


def test_only_routes_within_the_fixed_ranges_overlap() -> None:
    routes = ["default", "192.168.1.0/24", "10.0.0.0/8", "10.98.0.17", "10.99.0.0/16", "fe80::/64"]

    assert overlapping(routes) == ["10.0.0.0/8", "10.98.0.17"]
