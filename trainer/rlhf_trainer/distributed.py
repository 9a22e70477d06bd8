"""The process group: who is rank what, and the few collectives the loops use, summed in rank order.

A float sum depends on its order; adding the ranks' shares in rank order makes every figure that decides anything
(losses, guardrails, verdicts) equal on all ranks and in every repetition.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from rlhf_trainer.exits import RendezvousFailed

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers. Make it with ``join``."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the ranks, in float64 and rank order; all ranks must pass the same keys."""
        keys = sorted(values)
        if self.size == 1:
            return {key: float(values[key]) for key in keys}
        mine = torch.tensor([values[key] for key in keys], dtype=torch.float64, device=self.device)
        shares = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(shares, mine)
        total = torch.zeros_like(mine)
        for share in shares:
            total += share
        return dict(zip(keys, total.tolist(), strict=True))

    def means(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value averaged over the ranks (equal weights)."""
        return {key: total / self.size for key, total in self.sums(values).items()}

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        return self.sums({"flag": float(flag)})["flag"] > 0

    def gather(self, value: T) -> list[T]:
        """The picklable ``value`` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def broadcast(self, value: T) -> T:
        """Rank 0's picklable ``value`` on every rank."""
        box: list[T] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def share(self, rows: int) -> slice:
        """This rank's contiguous part of ``rows`` rows; ``rows`` must be divisible by the world size."""
        part, rest = divmod(rows, self.size)
        if rest:
            raise ValueError(f"{rows} rows do not divide over {self.size} ranks")
        return slice(self.rank * part, (self.rank + 1) * part)


def join(timeout: timedelta) -> World:
    """Meets the other ranks as torchrun's environment says (alone without it), within ``timeout``.

    Also pins what makes runs repeatable: deterministic kernels where they exist.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on the variable
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("warn")  # not use_deterministic_algorithms(): that imports the compiler
    if not dist.is_initialized():
        _start_group("nccl" if device.type == "cuda" else "gloo", rank, size, timeout)
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


def _start_group(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    try:
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:  # a single process needs no address: an in-memory store does
            dist.init_process_group(backend, store=HashStore(), rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise RendezvousFailed(
            f"rank {rank} of {size} did not meet its peers within {timeout.total_seconds():.0f} s: {error}; "
            "check that every pod of the attempt runs and that the headless Service resolves"
        ) from error


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
