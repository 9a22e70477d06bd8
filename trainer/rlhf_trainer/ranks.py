"""What each rank tells its launcher: small files in a folder of the pod, one set per local rank. No torch.

``rank-<r>.json`` (pid, and whether the rank joined the process group), ``rank-<r>.beat`` (its modification time is the
heartbeat) and ``rank-<r>.result`` (the Result of a rank that ended by itself). A rank killed by a signal leaves no
result, which is how the launcher knows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rlhf_trainer.wire import Result, Wire

FOLDER_VARIABLE = "RLHF_RANKS_FOLDER"


class RankState(Wire):
    rank: int
    pid: int
    joined: bool = False


@dataclass(frozen=True)
class RankFiles:
    """Written by one rank."""

    folder: Path
    rank: int

    @classmethod
    def from_environment(cls) -> RankFiles:
        """Where the launcher said; the current folder's ``.ranks`` for a worker started by hand."""
        folder = Path(os.environ.get(FOLDER_VARIABLE, ".ranks"))
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, int(os.environ.get("RANK", "0")))

    def started(self) -> None:
        self._state(joined=False)

    def joined(self) -> None:
        self._state(joined=True)
        self.beat()

    def beat(self) -> None:
        (self.folder / f"rank-{self.rank}.beat").touch()

    def ended(self, result: Result) -> None:
        _write(self.folder / f"rank-{self.rank}.result", result.to_json())

    def _state(self, joined: bool) -> None:
        state = RankState(rank=self.rank, pid=os.getpid(), joined=joined)
        _write(self.folder / f"rank-{self.rank}.json", state.to_json())


def read_states(folder: Path) -> dict[int, RankState]:
    states = [RankState.model_validate_json(path.read_bytes()) for path in folder.glob("rank-*.json")]
    return {state.rank: state for state in states}


def read_results(folder: Path) -> dict[int, Result]:
    results = [Result.model_validate_json(path.read_bytes()) for path in folder.glob("rank-*.result")]
    return {result.rank: result for result in results}


def last_beat(folder: Path) -> float | None:
    """Wall-clock time of the oldest heartbeat among the local ranks; None before all of them joined."""
    beats = [path.stat().st_mtime for path in folder.glob("rank-*.beat")]
    return min(beats) if beats and len(beats) == len(read_states(folder)) else None


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(path.suffix + ".writing")
    aside.write_text(text)
    aside.rename(path)
