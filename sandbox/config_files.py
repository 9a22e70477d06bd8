"""Configuration files of the components, as text: pure functions of the places and of the network's constants."""

from __future__ import annotations

import json
from pathlib import Path

from sandbox import audit, cgroups
from sandbox.namespaces import HOST_NETWORK
from sandbox.network import CLUSTER_DOMAIN, NODE_IP, POD_CIDR
from sandbox.paths import Paths

CONTAINERD_SOCKET = Path("/run/containerd/containerd.sock")
BUILDKIT_SOCKET = Path("/run/buildkit/buildkitd.sock")
# The kubelet's images and BuildKit's are one store: what is built is at once there for pods.
IMAGE_NAMESPACE = "k8s.io"
PAUSE_IMAGE = "localhost/pause:1"


def containerd(places: Paths, cni_folder: Path) -> str:
    # Without CAP_SYS_RESOURCE runc cannot lower oom_score_adj, and dies with "can't get final child's PID from
    # pipe: EOF"; hence restrict_oom_score_adj.
    return f"""version = 2
root = "{places.containerd}"
state = "/run/containerd/state"
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni_folder}"
    conf_dir = "{places.config / "cni"}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"""


def cni() -> str:
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipMasq": False,
        "ipam": {
            "type": "host-local",
            "dataDir": "/run/cni-ipam",
            "ranges": [[{"subnet": POD_CIDR}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return _document({"cniVersion": "0.4.0", "name": "sandbox", "plugins": [bridge]})


def kubelet(places: Paths) -> str:
    return _document(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": NODE_IP,
            "healthzBindAddress": "127.0.0.1",
            "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{cgroups.NAME}",
            # The daemons are not in control groups of their own; there is nothing to hold them to.
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "clusterDomain": CLUSTER_DOMAIN,
            "clusterDNS": [NODE_IP],
            "resolvConf": "",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(places.pki / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(places.pki / "kubelet-server.crt"),
            "tlsPrivateKeyFile": str(places.pki / "kubelet-server.key"),
            # Images cannot be pulled again: never collect them.
            "imageGCHighThresholdPercent": 100,
            "imageMinimumGCAge": "24h",
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
                "nodefs.inodesFree": "1%",
            },
            "localStorageCapacityIsolation": True,
            "maxPods": 110,
            "nodeStatusReportFrequency": "1m",
            "shutdownGracePeriod": "0s",
        }
    )


def kube_proxy(places: Paths) -> str:
    return _document(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "bindAddress": NODE_IP,
            "clientConnection": {"kubeconfig": str(places.pki / "kube-proxy.kubeconfig")},
            "clusterCIDR": POD_CIDR,
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            # Connection tracking limits are the host's; leave them alone.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpCloseWaitTimeout": "0s", "tcpEstablishedTimeout": "0s"},
            "nodePortAddresses": ["primary"],
        }
    )


def corefile(places: Paths) -> str:
    return f""".:53 {{
    bind {NODE_IP}
    errors
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {places.pki / "coredns.kubeconfig"} sandbox
        pods insecure
        ttl 5
    }}
    cache 5
}}
"""


def buildkitd(places: Paths) -> str:
    """16 GB of build cache: one trainer image (its layer counts twice) and what changed since."""
    return f"""root = "{places.cluster / "buildkit"}"
[grpc]
  address = ["unix://{BUILDKIT_SOCKET}"]
[worker.oci]
  enabled = false
[worker.containerd]
  enabled = true
  address = "{CONTAINERD_SOCKET}"
  namespace = "{IMAGE_NAMESPACE}"
  snapshotter = "overlayfs"
  networkMode = "host"
  defaultCgroupParent = "/{cgroups.NAME}/build"
  gc = true
  reservedSpace = "2GB"
  maxUsedSpace = "16GB"
  minFreeSpace = "5GB"
  [worker.containerd.runtime]
    name = "io.containerd.runc.v2"
    options = {{ BinaryName = "{build_runtime_path(places)}" }}
"""


def build_runtime() -> str:
    """Image builds reach package registries by the host's network, although containerd lives in the sandbox's."""
    return f'#!/bin/sh\nexec nsenter --net={HOST_NETWORK} runc "$@"\n'


def build_runtime_path(places: Paths) -> Path:
    return places.config / "runc-hostnet"


def write_all(places: Paths, cni_folder: Path) -> None:
    """Writes every file to where the components' command lines name it."""
    files = {
        places.config / "containerd.toml": containerd(places, cni_folder),
        places.config / "cni" / "10-sandbox.conflist": cni(),
        places.config / "kubelet.yaml": kubelet(places),
        places.config / "kube-proxy.yaml": kube_proxy(places),
        places.config / "Corefile": corefile(places),
        places.config / "buildkitd.toml": buildkitd(places),
        places.config / "audit-policy.json": audit.render_policy(),
        build_runtime_path(places): build_runtime(),
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    build_runtime_path(places).chmod(0o755)


def _document(content: dict[str, object]) -> str:
    return json.dumps(content, indent=1) + "\n"
