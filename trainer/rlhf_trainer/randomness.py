"""Counter-based randomness: a draw is named by (seed, stream, step, sample), never by who drew before it.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by (seed, stream) and counted by
(step, sample). Draws are therefore equal for every rank layout, batch split and order, and a resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

_MASK = 2**64 - 1


class Stream(IntEnum):
    """What a draw is for: two purposes never share numbers. Values are part of every artifact's identity."""

    INITIALISATION = 1
    SHUFFLE = 2
    BOOTSTRAP = 3
    SPLIT = 4
    GENERATION = 5
    PROMPTS = 6
    EVALUATION = 7
    MINI_BATCHES = 8
    COLLECTION = 16
    OVERSIGHT = 21
    PREFLIGHT = 22
    SAFETY_SUITE = 23


def generator(seed: int, stream: Stream, step: int = 0, sample: int = 0) -> np.random.Generator:
    """Numpy generator of one named draw."""
    bits = np.random.Philox(key=[seed & _MASK, int(stream)], counter=[0, 0, step & _MASK, sample & _MASK])
    return np.random.Generator(bits)


def uniforms(seed: int, stream: Stream, step: int, samples: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """``[len(samples), count]`` numbers in [0, 1); a row depends only on its own sample index."""
    return np.stack([generator(seed, stream, step, sample).random(count) for sample in samples])


def torch_generator(seed: int, stream: Stream, step: int = 0, sample: int = 0) -> torch.Generator:
    """CPU torch generator of one named draw, for APIs that take one (initialisation)."""
    import torch

    return torch.Generator().manual_seed(int(generator(seed, stream, step, sample).integers(2**63)))
