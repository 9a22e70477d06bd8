"""What a reward model learns from: preflight, then encoded annotations on both sides of the holdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from rlhf_trainer.config import RewardModelTraining
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.data.rows import Preference, ScoredResponse, load_preferences, load_scores
from rlhf_trainer.data.split import split
from rlhf_trainer.digests import dataset_digest, folder_digest
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.common import Session
from rlhf_trainer.preflight import check_attempt, check_batch, check_too_long, check_too_long_for
from rlhf_trainer.preflight_models import read_model
from rlhf_trainer.wire import AttemptConfig, Located


@dataclass(frozen=True)
class Pair:
    """One encoded annotation. ``margin`` is in reward units; ``aspects`` as in the row, of the trained ones alone."""

    prompt: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    probability_a: float
    margin: float
    aspects: Mapping[str, float]
    row: Preference


@dataclass(frozen=True)
class Inputs:
    encoder: Encoder
    training: tuple[Pair, ...]
    holdout: tuple[Pair, ...]
    human: tuple[ScoredResponse, ...]
    positions: int | None = None  # tokens that the model can read; None where it does not say


def prepare(session: Session, base: Located, preferences: Located, training: RewardModelTraining) -> Inputs:
    """Preflight, then encoded rows. Rank 0 alone reads the large files twice; a refusal reaches every rank."""
    config, world = session.config, session.world
    session.first_on_main(lambda: check_attempt(config))
    check_batch(training.global_batch_size, world.size, 1, "globalBatchSize")
    _check_micro(training, world.size)
    encoder = _open_encoder(base)
    pairs, dropped = _encode(load_preferences(preferences.path), encoder, training)
    check_too_long(preferences.path, dropped, len(pairs) + dropped, training.max_length, "maxLength")
    session.board.figures({"droppedPairs": float(dropped)})
    train_pairs, holdout = split(
        pairs, lambda pair: pair.prompt, training.holdout_fraction, side_of=lambda pair: pair.row.side
    )
    if len(train_pairs) < training.global_batch_size:
        raise Invalid(
            f"{preferences.path}: {len(train_pairs)} training pairs are fewer than training.globalBatchSize "
            f"{training.global_batch_size}; lower it or collect more preferences"
        )
    _check_aspects(preferences.path, train_pairs, training.aspects)
    positions = read_model("baseModel", Path(base.path)).max_positions
    human = _readable(config.human_scores, encoder, positions)
    return Inputs(encoder, tuple(train_pairs), tuple(holdout), tuple(human), positions)


def given(located: Located | None, name: str) -> Located:
    if located is None:
        raise Invalid(f"the attempt's configuration has no {name}; recreate the resource")
    return located


def lineage(config: AttemptConfig, base: Located, preferences: Located) -> dict[str, str]:
    """name → digest of everything the reward model came from."""
    digests = {
        "baseModel": base.digest or folder_digest(base.path),
        "preferences": preferences.digest or dataset_digest(preferences.path),
        "config": config.config_digest,
    }
    if config.human_scores is not None:
        digests["humanScores"] = config.human_scores.digest or dataset_digest(config.human_scores.path)
    return digests


def _encode(rows: Sequence[Preference], encoder: Encoder, training: RewardModelTraining) -> tuple[list[Pair], int]:
    pairs, dropped = [], 0
    for row in rows:
        a, b = (tuple(encoder.pair(row.prompt, text)) for text in (row.response_a, row.response_b))
        if max(len(a), len(b)) > training.max_length:
            dropped += 1
            continue
        margin = training.margin * (row.strength or 0.0)
        aspects = {name: row.aspects[name] for name in training.aspects if row.aspects.get(name, 0.5) != 0.5}
        pairs.append(Pair(row.prompt, a, b, row.probability_a, margin, aspects, row))
    return pairs, dropped


def _readable(scores: Located | None, encoder: Encoder, positions: int | None) -> list[ScoredResponse]:
    """Trusted scores of what the model can read: ``maxLength`` is of pairs."""
    if scores is None:
        return []
    rows = load_scores(scores.path)
    if positions is None:
        return rows
    fitting = [row for row in rows if len(encoder.pair(row.prompt, row.response)) <= positions]
    remedy = "give shorter ones or choose a base model with a longer context"
    check_too_long_for(scores.path, len(rows) - len(fitting), len(rows), positions, remedy)
    return fitting


def _check_micro(training: RewardModelTraining, world_size: int) -> None:
    micro, rows = training.micro_batch_size, training.global_batch_size // world_size
    if micro is not None and rows % micro:
        raise Invalid(
            f"training.microBatchSize is {micro}, which does not divide the {rows} pairs of a rank "
            f"(globalBatchSize {training.global_batch_size} over {world_size} ranks)"
        )


def _check_aspects(path: str, pairs: Sequence[Pair], aspects: Sequence[str]) -> None:
    if len(set(aspects)) < len(aspects):
        raise Invalid("training.aspects names an aspect twice; keep one of them")
    for name in aspects:
        if not any(name in pair.aspects for pair in pairs):
            known = sorted({known for pair in pairs for known in pair.row.aspects})
            raise Invalid(
                f"{path}: no training pair is ordered by the aspect {name!r} of training.aspects; "
                f"field 'aspects' of the rows names {', '.join(known) or 'none'}"
            )


def _open_encoder(base: Located) -> Encoder:
    try:
        return Encoder(AutoTokenizer.from_pretrained(base.path))
    except (OSError, ValueError) as error:
        raise Invalid(f"spec.baseModel ({base.uri or base.path}): no tokenizer can be loaded: {error}") from error
