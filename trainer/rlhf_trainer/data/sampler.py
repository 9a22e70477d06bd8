"""Which rows come next: an order that is a pure function of (seed, epoch), and a position that resumes it exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhf_trainer.randomness import Stream, generator


@dataclass(frozen=True)
class Position:
    """``offset`` rows of epoch ``epoch`` have been taken. The whole state of a sampler."""

    seed: int
    epoch: int = 0
    offset: int = 0

    @classmethod
    def after(cls, taken: int, size: int, seed: int) -> Position:
        """Where a sampler of ``size`` rows stands once ``taken`` rows have been taken from the start."""
        return cls(seed, *divmod(taken, size))


class Sampler:
    """Row indices without end: every epoch is a fresh permutation, and a batch may straddle two epochs.

    The order is global. Ranks take their shares of each batch, so it does not depend on the world size.
    """

    def __init__(self, size: int, position: Position, stream: Stream = Stream.SHUFFLE) -> None:
        if size < 1:
            raise ValueError("a sampler needs at least one row")
        if not 0 <= position.offset <= size:
            raise ValueError(f"position {position} lies outside a data set of {size} rows: the data has changed")
        self._size, self._stream, self._position = size, stream, position
        self._order = self._permutation(position.epoch)

    @property
    def position(self) -> Position:
        return self._position

    def take(self, count: int) -> list[int]:
        """The next ``count`` row indices, all ranks together."""
        indices: list[int] = []
        epoch, offset = self._position.epoch, self._position.offset
        while len(indices) < count:
            if offset == self._size:
                epoch, offset = epoch + 1, 0
                self._order = self._permutation(epoch)
            chunk = self._order[offset : offset + count - len(indices)]
            indices += chunk.tolist()
            offset += len(chunk)
        self._position = Position(self._position.seed, epoch, offset)
        return indices

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        return generator(self._position.seed, self._stream, step=epoch).permutation(self._size)
