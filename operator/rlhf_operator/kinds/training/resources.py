"""How big an attempt is: processes, world size, GPUs, and what an hour of it costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_operator.api.training import TrainerSpec
from rlhf_operator.kinds.base import Prices
from rlhf_operator.kinds.training.objects import mapping

_SUFFIXES = {
    "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)([numkMGTPE]|[KMGTPE]i)?")
_BYTES = ("memory", "ephemeral-storage")
GIB = 2.0**30
_HUGE = 1e21  # keeps a nonsense exponent finite


def quantity(value: Any) -> float:
    """A Kubernetes quantity as a number of units (memory: bytes); 0 for what is none."""
    if isinstance(value, bool):
        return 0.0
    match = _QUANTITY.fullmatch(str(value))
    return min(max(float(match[1]) * _SUFFIXES[match[2] or ""], 0.0), _HUGE) if match else 0.0


def is_gpu(resource: str) -> bool:
    """Whole GPUs of any vendor, and NVIDIA's MIG slices, each counted as one."""
    return resource.endswith("/gpu") or resource.startswith("nvidia.com/mig-")


def openmp_threads(cpus: float, processes: int = 1) -> int:
    """OMP_NUM_THREADS of one process: its share of the container's CPUs, at least one.

    Left to itself OpenMP takes every core of the node and waits in busy loops, and a digest is promised for the same
    number of threads only.
    """
    return max(1, int(cpus // processes))


def node_amounts(resources: Mapping[str, Any]) -> dict[str, float]:
    """What one container may use: the larger of request and limit, by resource."""
    limits, requests = mapping(resources, "limits"), mapping(resources, "requests")
    return {
        name: max(quantity(limits.get(name)), quantity(requests.get(name))) for name in sorted({*limits, *requests})
    }


@dataclass(frozen=True)
class Shape:
    """What one attempt occupies. `requests` are of one node: the larger of request and limit."""

    nodes: int
    processes: int
    requests: Mapping[str, float]

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    @property
    def gpus(self) -> float:
        return self.nodes * sum(amount for name, amount in self.requests.items() if is_gpu(name))

    @property
    def threads(self) -> int:
        return openmp_threads(self.requests.get("cpu", 0.0), self.processes)

    def cost_per_hour(self, prices: Prices) -> float | None:
        """Money per hour of all nodes; None unless every requested resource has a price (memory: per GiB)."""
        if not self.requests or any(name not in prices.per_hour for name in self.requests):
            return None
        units = {name: amount / GIB if name in _BYTES else amount for name, amount in self.requests.items()}
        return self.nodes * sum(prices.per_hour[name] * amount for name, amount in units.items())

    def unpriced(self, prices: Prices) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.requests if name not in prices.per_hour))


def shape(trainer: TrainerSpec, resources: Mapping[str, Any]) -> Shape:
    """The shape of the merged trainer container: podTemplate may have changed the resources."""
    amounts = node_amounts(resources)
    if isinstance(trainer.num_proc_per_node, int):
        processes = trainer.num_proc_per_node
    else:
        processes = max(1, int(sum(amount for name, amount in amounts.items() if is_gpu(name))))
    return Shape(trainer.num_nodes, processes, amounts)
