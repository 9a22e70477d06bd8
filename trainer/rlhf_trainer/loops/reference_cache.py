"""Log-probabilities of given texts under the frozen reference: computed once per run, kept on disk, checked on use.

    <run>/reference-logprobs/<identity>.safetensors

The identity is a digest of everything the numbers depend on: the reference's weights, every token of every row in
order (so data, formatting and dropped rows), and the temperature. A later attempt of the run reads the file when its
content still hashes to what was written, and computes anew otherwise.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_trainer.checkpoint import sync_folder
from rlhf_trainer.digests import folder_digest
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.given_texts import Text
from rlhf_trainer.models.policy import Batch, reference_logprobs
from rlhf_trainer.wire import Located, digest_of

log = logging.getLogger(__name__)

_ROWS_PER_PASS = 64  # of one rank; fixed, so that padding and with it rounding do not depend on the world size
_FOLDER = "reference-logprobs"
_NAME = "logprobs"


@dataclass(frozen=True)
class ReferenceFile:
    """One set of sequence log-probabilities (N,) on disk."""

    path: Path
    rows: int

    def read(self) -> Tensor | None:
        """The numbers, or None when there are none or not what was written."""
        try:
            with safe_open(self.path, framework="pt") as file:
                values: Tensor = file.get_tensor(_NAME)
                written = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning(
                "%s: cannot be read (%s); the reference's log-probabilities are computed anew", self.path, error
            )
            return None
        if written != _sha256(values) or values.shape != (self.rows,):
            log.warning("%s: was altered; the reference's log-probabilities are computed anew", self.path)
            return None
        return values

    def write(self, values: Tensor) -> None:
        """Atomically: a reader sees all of it or none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.writing")
        save_file({_NAME: values}, aside, metadata={"sha256": _sha256(values)})
        aside.rename(self.path)
        sync_folder(self.path.parent)


def reference_file(run: Path, reference: Located, texts: Sequence[Text], temperature: float) -> ReferenceFile:
    hasher = hashlib.sha256()
    for text in texts:
        hasher.update(repr((text.prompt.ids, text.response)).encode())
    identity = digest_of(
        {
            "reference": reference.digest or folder_digest(reference.path),
            "tokens": hasher.hexdigest(),
            "temperature": temperature,
        }
    )
    return ReferenceFile(run / _FOLDER / f"{identity.removeprefix('sha256:')}.safetensors", len(texts))


def cached_logprobs(
    session: Session, located: Located, reference: Any, texts: Sequence[Text], pad_id: int, temperature: float
) -> Tensor:
    """Sequence log-probabilities (N,) of all ``texts`` on every rank, on the CPU. Collective."""
    world = session.world
    file: ReferenceFile | None = None
    if world.is_main:
        file = reference_file(Path(session.config.output.path), located, texts, temperature)
    values = world.broadcast(file.read() if file is not None else None)
    if values is None:
        values = _compute(session, reference, texts, pad_id, temperature)
        if file is not None:
            file.write(values)
    return values


def sequence_logprobs(reference: Any, texts: Sequence[Text], pad_id: int, temperature: float) -> Tensor:
    """(B,) log-probabilities summed over the response tokens."""
    device = next(reference.parameters()).device
    batch = Batch.of([text.prompt.ids for text in texts], [text.response for text in texts], pad_id, device)
    return reference_logprobs(reference, batch, temperature).sum(dim=1)


def _compute(session: Session, reference: Any, texts: Sequence[Text], pad_id: int, temperature: float) -> Tensor:
    world = session.world
    passes: list[Tensor] = []
    for start in range(0, len(texts), _ROWS_PER_PASS * world.size):
        first = start + world.rank * _ROWS_PER_PASS
        mine = texts[first : first + _ROWS_PER_PASS]
        own = sequence_logprobs(reference, mine, pad_id, temperature).cpu() if mine else torch.zeros(0)
        passes += world.gather(own)
        session.pulse()
    return torch.cat(passes)


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
