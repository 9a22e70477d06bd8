"""What a checkpoint is made of, besides engines: small state as JSON, tensors as safetensors, random state by rank."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rlhf_trainer.distributed import World


class JsonState:
    """A JSON-able mapping, equal on all ranks (data position, KL controller, Lagrange multiplier, ...)."""

    def __init__(
        self, world: World, get: Callable[[], Mapping[str, Any]], put: Callable[[dict[str, Any]], None]
    ) -> None:
        self._world, self._get, self._put = world, get, put

    def save(self, folder: Path) -> None:
        if self._world.is_main:
            (folder / "state.json").write_text(json.dumps(dict(self._get()), sort_keys=True))

    def load(self, folder: Path) -> None:
        self._put(json.loads((folder / "state.json").read_text()))


class TensorState:
    """Named tensors, equal on all ranks (reward normaliser, ...)."""

    def __init__(
        self,
        world: World,
        get: Callable[[], Mapping[str, torch.Tensor]],
        put: Callable[[dict[str, torch.Tensor]], None],
    ) -> None:
        self._world, self._get, self._put = world, get, put

    def save(self, folder: Path) -> None:
        if self._world.is_main:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in self._get().items()},
                folder / "state.safetensors",
            )

    def load(self, folder: Path) -> None:
        self._put(load_file(folder / "state.safetensors", device=str(self._world.device)))


class RandomState:
    """Generators of every rank: Python's, numpy's, torch's of the CPU and of the rank's own device.

    The loops draw from ``randomness``, which needs no state; this covers what a library draws behind their back.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def save(self, folder: Path) -> None:
        state = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(self._world.device) if self._on_cuda else None,
        }
        torch.save(state, folder / f"rank-{self._world.rank}.pt")

    def load_resharded(self, folder: Path, scratch: Path, alive: Callable[[], None]) -> None:  # noqa: ARG002
        """A rank that the checkpoint has takes its state up; one that is new keeps its own. Neither can change what
        a run computes: whatever decides is drawn from ``randomness``, which no state and no rank layout touches."""
        if (folder / f"rank-{self._world.rank}.pt").exists():
            self.load(folder)

    def load(self, folder: Path) -> None:
        # weights_only=False: the states are plain tuples of Python and numpy; the file's sha256 was verified before.
        state = torch.load(folder / f"rank-{self._world.rank}.pt", weights_only=False)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        # Of this rank's device alone: where the state is loaded, there may be fewer devices or none.
        if self._on_cuda and state.get("device") is not None:
            torch.cuda.set_rng_state(state["device"], self._world.device)

    @property
    def _on_cuda(self) -> bool:
        return self._world.device.type == "cuda"
