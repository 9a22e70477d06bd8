"""Publishing an artifact: written aside, given its manifest, renamed whole; identified by its folder digest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_trainer.checkpoint import sync_folder
from rlhf_trainer.digests import MANIFEST, folder_digest, folder_files
from rlhf_trainer.wire import Artifact, Verdict

if TYPE_CHECKING:
    from rlhf_trainer.loops.common import Session


def publish_artifact(
    session: Session, write: Callable[[Path], None], lineage: Mapping[str, str], verdicts: Sequence[Verdict]
) -> Artifact:
    """Rank 0 calls ``write(folder)`` and publishes the folder as this attempt's artifact. Collective.

    The digest leaves out ``manifest.json`` and with it time and attempt: equal runs have equal artifacts.
    """
    artifact = None
    if session.world.is_main:
        artifact = _publish(session, write, lineage, verdicts)
    published = session.world.broadcast(artifact)
    assert published is not None  # rank 0 published or raised
    return published


def _publish(
    session: Session, write: Callable[[Path], None], lineage: Mapping[str, str], verdicts: Sequence[Verdict]
) -> Artifact:
    final = session.folder / "artifact"
    aside = final.with_name(".artifact.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    artifact = Artifact(path=str(final), digest=folder_digest(aside))
    manifest: dict[str, Any] = {
        "kind": session.config.kind,
        "name": session.config.name,
        "namespace": session.config.namespace,
        "uid": session.config.uid,
        "attempt": session.config.attempt,
        "time": session.clock().isoformat(),
        "digest": artifact.digest,
        "lineage": dict(lineage),
        "verdicts": [json.loads(verdict.to_json()) for verdict in verdicts],
    }
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for relative in (*folder_files(aside), Path(MANIFEST)):
        with (aside / relative).open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)  # of the same attempt, when its pods were started again
    aside.rename(final)
    sync_folder(final.parent)
    return artifact
