"""What can be found wrong before any weight is loaded: digests, tokenizer, rows, batch arithmetic, memory.

Every refusal is Invalid (exit 11) and names the file, the row and field where there is one, and the remedy.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from rlhf_trainer.cgroup import memory_limit
from rlhf_trainer.digests import DigestMismatchError, RowError, check_digest, dataset_digest, folder_digest
from rlhf_trainer.exits import Invalid
from rlhf_trainer.wire import AttemptConfig, Located

log = logging.getLogger(__name__)

_TOO_LONG_SHARE = 0.5  # of the rows; beyond it the data does not fit the job rather than a row the model


def check_attempt(config: AttemptConfig) -> None:
    """Everything about the attempt that needs neither a tokenizer nor rows. Run by rank 0, before the others go on."""
    for name, located in _folders(config):
        _check(name, located, folder_digest)
    for name, located in _datasets(config):
        _check(name, located, dataset_digest)
    _check_audit(config)


def check_batch(rows_per_step: int, world_size: int, mini_batches: int, field: str) -> None:
    """``rows_per_step`` must divide over ranks and mini batches."""
    parts = world_size * mini_batches
    if rows_per_step % parts:
        below, above = rows_per_step // parts * parts, -(-rows_per_step // parts) * parts
        choices = f"{below} or {above}" if below else str(above)
        raise Invalid(
            f"training.{field} is {rows_per_step}, which does not divide over {world_size} ranks"
            + (f" and {mini_batches} mini batches" if mini_batches > 1 else "")
            + f"; choose {choices}"
        )


def check_too_long(path: str, dropped: int, total: int, limit: int, field: str) -> None:
    """Rows longer than the limit are dropped and counted, never cut; losing most of the data is refused."""
    if not dropped:
        return
    if dropped / total > _TOO_LONG_SHARE:
        raise Invalid(
            f"{path}: {dropped} of {total} rows have more than {limit} tokens and would be dropped; "
            f"raise training.{field}"
        )
    log.warning("%s: %d of %d rows have more than %d tokens and are dropped", path, dropped, total, limit)


def warn_of_memory(model: Path, copies: int, zero_stage: int, world_size: int) -> None:
    """Logs when the training state alone (weights, gradients, Adam) looks larger than the container's memory."""
    limit, parameters = memory_limit(), count_parameters(model)
    if limit is None or parameters is None:
        return
    needed = training_bytes(parameters * copies, zero_stage, world_size)
    if needed > limit:
        log.warning(
            "%s: weights, gradients and optimiser need about %.1f GiB per rank at ZeRO stage %d, the container has "
            "%.1f GiB; raise deepspeed.zeroStage, the number of ranks or the memory limit",
            model, needed / 2**30, zero_stage, limit / 2**30,
        )  # fmt: skip


def training_bytes(parameters: int, zero_stage: int, world_size: int) -> int:
    """Bytes per rank for float32 AdamW training, activations excluded (Rajbhandari et al. 2020, table 1): 4 for
    weights (sharded from stage 3), 4 for gradients (from stage 2), 8 for moments (from stage 1)."""
    shares = [world_size if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    return sum(parameters * size // share for size, share in zip((4, 4, 8), shares, strict=True))


def count_parameters(model: Path) -> int | None:
    """Parameters in a folder's safetensors files, read from their headers; None where there are none."""
    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for dimension in tensor["shape"]:
                    size *= dimension
                total += size
    return total or None


def _check(name: str, located: Located, digest: Callable[[Path], str]) -> None:
    shown = located.uri or located.path
    try:
        actual = digest(Path(located.path))
    except RowError as error:
        raise Invalid(f"spec.{name}: {error}") from error
    except (OSError, ValueError) as error:
        raise Invalid(f"spec.{name} ({shown}): {error}; check the path and the mounted claim") from error
    if located.digest is not None:
        try:
            check_digest(actual, located.digest, f"spec.{name} ({shown})")
        except DigestMismatchError as error:
            raise Invalid(str(error), reason="DigestMismatch") from error


def _check_audit(config: AttemptConfig) -> None:
    if config.reward_model is None or config.audit_reward_model is None:
        return
    digests = {folder_digest(config.reward_model.path), folder_digest(config.audit_reward_model.path)}
    if len(digests) == 1:
        raise Invalid(
            "spec.auditRewardModel is the same model as spec.rewardModel, so it cannot catch what that one misses; "
            "train one on other preferences"
        )


def _folders(config: AttemptConfig) -> Iterable[tuple[str, Located]]:
    named = {
        "baseModel": config.base_model,
        "policy": config.policy,
        "rewardModel": config.reward_model,
        "auditRewardModel": config.audit_reward_model,
        "teacher": config.teacher,
    }
    return ((name, located) for name, located in named.items() if located is not None)


def _datasets(config: AttemptConfig) -> Iterable[tuple[str, Located]]:
    named = {
        "preferences": config.preferences,
        "validation.humanScores": config.human_scores,
        "prompts": config.prompts,
        "demonstrations": config.demonstrations,
    }
    return ((name, located) for name, located in named.items() if located is not None)
