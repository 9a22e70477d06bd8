"""Addresses of the sandbox, and the pair of interfaces and routes that joins it to the host.

The host reaches Services and pods through the node; pods have no way out: what they try fails at once.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Sequence

from sandbox import namespaces, processes

INTERFACE = "rlhf0"
NODE_INTERFACE = "eth0"
HOST_IP = "10.97.0.1"
NODE_IP = "10.97.0.2"
LINK_CIDR = "10.97.0.0/30"
POD_CIDR = "10.98.0.0/24"
SERVICE_CIDR = "10.96.0.0/16"
APISERVER_SERVICE_IP = "10.96.0.1"
CLUSTER_DOMAIN = "cluster.local"
API_PORT = 6443
SERVER = f"https://{NODE_IP}:{API_PORT}"
CIDRS = (LINK_CIDR, POD_CIDR, SERVICE_CIDR)

_SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.ipv4.conf.all.route_localnet=1",
    "net.ipv4.ip_unprivileged_port_start=0",
)


def host_commands(init: int) -> list[list[str]]:
    """What is run on the host, `init` being the first process of the sandbox.

    The routes exist before the first pod does, or the host's answer to it could leave by the default route.
    """
    return [
        ["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", NODE_INTERFACE, "netns", str(init)],
        ["ip", "address", "add", f"{HOST_IP}/30", "dev", INTERFACE],
        ["ip", "link", "set", INTERFACE, "up"],
        ["ip", "route", "add", SERVICE_CIDR, "via", NODE_IP],
        ["ip", "route", "add", POD_CIDR, "via", NODE_IP],
    ]


def node_script() -> str:
    """What is run inside the sandbox."""
    lines = [
        "set -e",
        f"ip address add {NODE_IP}/30 dev {NODE_INTERFACE}",
        f"ip link set {NODE_INTERFACE} up",
        f"ip route add {SERVICE_CIDR} dev {NODE_INTERFACE}",
        "ip route add unreachable default",
        f"sysctl -qw {' '.join(_SYSCTLS)}",
        # Bridged pods must reach each other's Services; without the module there is nothing to switch on.
        "sysctl -qw net.bridge.bridge-nf-call-iptables=1 2>/dev/null || true",
    ]
    return "\n".join(lines)


def join(init: int) -> None:
    """Joins the sandbox whose first process is `init` to the host."""
    for command in host_commands(init)[:3]:
        processes.run(command)
    namespaces.run(init, ["sh", "-c", node_script()])
    for command in host_commands(init)[3:]:
        processes.run(command)


def remove() -> None:
    """Takes the host's interface away, and its routes with it. Nothing happens when it is not there."""
    subprocess.run(["ip", "link", "delete", INTERFACE], capture_output=True, check=False)


def exists() -> bool:
    return subprocess.run(["ip", "link", "show", INTERFACE], capture_output=True, check=False).returncode == 0


def overlapping(destinations: Sequence[str]) -> list[str]:
    """Those of the host's route destinations that overlap the sandbox's fixed ranges."""
    ours = [ipaddress.ip_network(cidr) for cidr in CIDRS]
    found = []
    for destination in destinations:
        try:
            theirs = ipaddress.ip_network(destination, strict=False)
        except ValueError:
            continue  # "default"
        if theirs.version == 4 and any(theirs.overlaps(one) for one in ours):
            found.append(destination)
    return found


def foreign_routes() -> list[str]:
    """Destinations of the host's routes that do not go through the sandbox's own interface."""
    routes = json.loads(processes.run(["ip", "-json", "route", "show"]) or "[]")
    return [route["dst"] for route in routes if route.get("dev") != INTERFACE]
