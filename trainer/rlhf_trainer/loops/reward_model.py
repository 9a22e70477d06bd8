"""Training and validating a reward model: K members on bootstrap rows through one engine, then the gate.

Everything a step uses (rows, learning rate) is a function of (seed, step), so the checkpoint's position is one number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from rlhf_trainer.algos.bradley_terry import accuracy, preference_loss
from rlhf_trainer.artifact import publish_artifact
from rlhf_trainer.config import Calibration, RewardModelTraining, RewardModelValidation
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.data.rows import Preference, ScoredResponse, load_preferences, load_scores
from rlhf_trainer.data.split import split
from rlhf_trainer.digests import dataset_digest, folder_digest
from rlhf_trainer.engine import Engine, EngineOptions
from rlhf_trainer.evals.reward_model import HeldOut, judge, temperature
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.common import Outcome, Session
from rlhf_trainer.models.adapters import attach, merged
from rlhf_trainer.models.reward import RewardCalibration, RewardEnsemble, save_reward_model, to_batch
from rlhf_trainer.preflight import check_attempt, check_batch, check_too_long, warn_of_memory
from rlhf_trainer.randomness import Stream, generator
from rlhf_trainer.wire import AttemptConfig, Located, Verdict

log = logging.getLogger(__name__)

_TOKENS_PER_PASS = 32_768  # of one member on one rank: bounds the activations of a backward pass
_WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Pair:
    """One encoded annotation."""

    prompt: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    probability_a: float


@dataclass(frozen=True)
class Inputs:
    encoder: Encoder
    training: tuple[Pair, ...]
    holdout: tuple[Pair, ...]
    human: tuple[ScoredResponse, ...]
    dropped: int


def run(session: Session) -> Outcome:
    """The whole attempt, from preflight to artifact. Raises the endings of ``exits``."""
    config, world = session.config, session.world
    base, preferences = _given(config.base_model, "baseModel"), _given(config.preferences, "preferences")
    training, validation = config.reward_model_training, config.validation or RewardModelValidation()
    if training is None:
        raise Invalid("the attempt's configuration has no rewardModelTraining; recreate the resource")
    inputs = prepare(session, base, preferences, training)
    session.board.figures({"droppedPairs": float(inputs.dropped)})
    session.pulse()
    ensemble = RewardEnsemble.from_base(
        Path(base.path), training.ensemble.members, inputs.encoder.pad_id, training.seed
    )
    if training.lora is not None:
        for index, member in enumerate(ensemble.members):
            attach(member.model, training.lora, training.seed, index)
    engine = Engine(ensemble, _engine_options(training, world.size), world)
    session.pulse()
    _train(session, engine, inputs, training)
    session.begin_evaluation()
    calibration, verdicts, figures = _evaluate(session, engine, inputs, training, validation)
    session.board.verdicts(verdicts)
    session.begin_saving()
    weights = merged(engine.state_dict(), engine.module)
    lineage = _lineage(config, base, preferences)

    def write(folder: Path) -> None:
        module = engine.module
        assert isinstance(module, RewardEnsemble)
        save_reward_model(folder, module, weights, inputs.encoder, calibration)

    artifact = publish_artifact(session, write, lineage, verdicts)
    return Outcome(artifact, verdicts, figures, lineage, gate_reason="RewardGateFailed")


def prepare(session: Session, base: Located, preferences: Located, training: RewardModelTraining) -> Inputs:
    """Preflight, then encoded rows. Rank 0 alone reads the large files twice; a refusal reaches every rank."""
    config, world = session.config, session.world
    session.first_on_main(lambda: check_attempt(config))
    check_batch(training.global_batch_size, world.size, 1, "globalBatchSize")
    if world.is_main:
        warn_of_memory(Path(base.path), training.ensemble.members, training.deepspeed.zero_stage, world.size)
    encoder = _open_encoder(base)
    pairs, dropped = _encode(load_preferences(preferences.path), encoder, training.max_length)
    check_too_long(preferences.path, dropped, len(pairs) + dropped, training.max_length, "maxLength")
    train_pairs, holdout = split(pairs, lambda pair: pair.prompt, training.holdout_fraction)
    if len(train_pairs) < training.global_batch_size:
        raise Invalid(
            f"{preferences.path}: {len(train_pairs)} training pairs are fewer than training.globalBatchSize "
            f"{training.global_batch_size}; lower it or collect more preferences"
        )
    human = load_scores(config.human_scores.path) if config.human_scores is not None else []
    return Inputs(encoder, tuple(train_pairs), tuple(holdout), tuple(human), dropped)


def member_rows(training: RewardModelTraining, pairs: int, member: int, step: int) -> npt.NDArray[np.int64]:
    """Row indices of one member's batch in one step: an epoch is a permutation of its own bootstrap sample.

    A single member sees every row once per epoch. The last, incomplete batch of an epoch is left out.
    """
    size = training.global_batch_size
    epoch, batch = divmod(step, pairs // size)
    order = generator(training.seed, Stream.SHUFFLE, step=epoch, sample=member).permutation(pairs)
    chosen = order[batch * size : (batch + 1) * size]
    if training.ensemble.members == 1:
        return chosen
    resampled = generator(training.seed, Stream.BOOTSTRAP, sample=member).integers(0, pairs, pairs)
    return resampled[chosen]


def learning_rate(peak: float, step: int, total: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then linear decay towards zero at the end."""
    warmup = max(1, round(_WARMUP_SHARE * total))
    return peak * min((step + 1) / warmup, (total - step) / total)


def _train(session: Session, engine: Engine, inputs: Inputs, training: RewardModelTraining) -> None:
    world, pairs = session.world, inputs.training
    total = training.epochs * (len(pairs) // training.global_batch_size)
    engine.module.train()
    for step in range(session.begin({"engine": engine}, total), total):
        rows = [
            member_rows(training, len(pairs), member, step)[world.share(training.global_batch_size)]
            for member in range(training.ensemble.members)
        ]
        passes = [
            _backward(engine, [[pairs[index] for index in own[part]] for own in rows], inputs.encoder, training)
            for part in engine.micro_batches()
        ]
        rate = learning_rate(training.learning_rate, step, total)
        engine.step(rate)
        figures = world.means({name: float(np.mean([each[name] for each in passes])) for name in passes[0]})
        session.finish_step(step + 1, {**figures, "learningRate": rate, "gradientNorm": engine.gradient_norm})


def _backward(
    engine: Engine, rows: Sequence[Sequence[Pair]], encoder: Encoder, training: RewardModelTraining
) -> dict[str, float]:
    """One slice, rows by member: forward of both responses at once, loss summed over members, gradient."""
    texts = [[pair.a for pair in own] + [pair.b for pair in own] for own in rows]
    scores = engine(*_member_batches(texts, encoder.pad_id, engine.world.device))
    labels = torch.tensor([[pair.probability_a for pair in own] for own in rows], device=scores.device)
    a, b = scores.chunk(2, dim=1)
    losses = [
        preference_loss(own_a, own_b, own_labels, training.centering)
        for own_a, own_b, own_labels in zip(a, b, labels, strict=True)
    ]
    engine.backward(torch.stack(losses).sum())
    delta = (a - b).detach()
    right, _ = accuracy(delta, labels)
    margin = (delta * (2 * labels - 1)).mean()
    loss = float(torch.stack(losses).mean().detach())
    return {"loss": loss, "accuracy": right, "margin": float(margin)}


def _member_batches(
    rows: Sequence[Sequence[Sequence[int]]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows by member → ids [K, B, T] and lengths [K, B], padded to one width."""
    ids, lengths = to_batch([row for own in rows for row in own], pad_id)
    shape = (len(rows), len(rows[0]))
    return ids.view(*shape, -1).to(device), lengths.view(shape).to(device)


def score_rows(session: Session, engine: Engine, rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Raw scores [K, N] of all rows on every rank, in float32 on the CPU; the rows are shared out over the ranks."""
    world, module = session.world, engine.module
    assert isinstance(module, RewardEnsemble)
    members = len(module.members)
    size = max(1, min(256, -(-len(rows) // world.size)))
    module.eval()
    parts: list[torch.Tensor] = []
    # Every rank runs the same number of passes, which ZeRO-3 needs: its forward gathers weights from all.
    for start in range(0, len(rows), size * world.size):
        mine = rows[start + world.rank * size : start + (world.rank + 1) * size]
        batch = list(mine) or [rows[0]]
        with torch.no_grad():
            scores = engine(*_member_batches([batch] * members, pad_id, world.device)).float().cpu()
        parts.extend(world.gather(scores[:, : len(mine)]))
        session.pulse()
    return torch.cat(parts, dim=1) if parts else torch.zeros(members, 0)


def _evaluate(
    session: Session, engine: Engine, inputs: Inputs, training: RewardModelTraining, validation: RewardModelValidation
) -> tuple[RewardCalibration, tuple[Verdict, ...], dict[str, float]]:
    pad_id = inputs.encoder.pad_id
    texts = [pair.a for pair in inputs.holdout] + [pair.b for pair in inputs.holdout]
    texts += [tuple(inputs.encoder.pair(row.prompt, row.response)) for row in inputs.human]
    raw = score_rows(session, engine, texts, pad_id)
    count = len(inputs.holdout)
    reference = raw[:, : 2 * count]
    offsets = tuple(reference.double().mean(dim=1).tolist()) if count else (0.0,) * len(raw)
    uncalibrated = RewardCalibration(1.0, offsets, 0.0)
    mean, _ = uncalibrated.apply(raw)
    delta = (mean[:count] - mean[count : 2 * count]).double().numpy()
    labels = np.array([pair.probability_a for pair in inputs.holdout])
    pairs = HeldOut(delta, labels, tuple(pair.prompt for pair in inputs.holdout))
    calibrate = training.calibration is Calibration.TEMPERATURE
    fitted = temperature(pairs.take(pairs.decided)) if calibrate else 1.0
    _, spread = RewardCalibration(fitted, offsets, 0.0).apply(reference)
    calibration = RewardCalibration(fitted, offsets, float(np.quantile(spread.numpy(), 0.95)) if count else 0.0)
    human = (mean[2 * count :].tolist(), [row.score for row in inputs.human]) if inputs.human else None
    verdicts = judge(pairs, human, validation, calibrate, training.seed)
    names = {"accuracy": "heldOutAccuracy"}
    figures = {names.get(v.metric, v.metric): v.estimate for v in verdicts if v.estimate is not None}
    figures = {**figures, "temperature": fitted}
    session.board.figures(figures)
    return calibration, verdicts, figures


def _engine_options(training: RewardModelTraining, world_size: int) -> EngineOptions:
    rows = training.global_batch_size // world_size
    fitting = (
        part for part in range(rows, 0, -1) if rows % part == 0 and 2 * part * training.max_length <= _TOKENS_PER_PASS
    )
    return EngineOptions(
        zero_stage=training.deepspeed.zero_stage,
        learning_rate=training.learning_rate,
        rows_per_step=training.global_batch_size,
        micro_rows=next(fitting, 1),
        weight_decay=training.weight_decay,
        precision=training.precision,
        # The norm is over all members: 1 for each when they are alike.
        max_grad_norm=float(training.ensemble.members) ** 0.5,
    )


def _encode(rows: Sequence[Preference], encoder: Encoder, max_length: int) -> tuple[list[Pair], int]:
    pairs, dropped = [], 0
    for row in rows:
        a, b = (tuple(encoder.pair(row.prompt, text)) for text in (row.response_a, row.response_b))
        if max(len(a), len(b)) > max_length:
            dropped += 1
        else:
            pairs.append(Pair(row.prompt, a, b, row.probability_a))
    return pairs, dropped


def _open_encoder(base: Located) -> Encoder:
    try:
        return Encoder(AutoTokenizer.from_pretrained(base.path))
    except (OSError, ValueError) as error:
        raise Invalid(f"spec.baseModel ({base.uri or base.path}): no tokenizer can be loaded: {error}") from error


def _given(located: Located | None, name: str) -> Located:
    if located is None:
        raise Invalid(f"the attempt's configuration has no {name}; recreate the resource")
    return located


def _lineage(config: AttemptConfig, base: Located, preferences: Located) -> dict[str, str]:
    lineage = {
        "baseModel": base.digest or folder_digest(base.path),
        "preferences": preferences.digest or dataset_digest(preferences.path),
        "config": config.config_digest,
    }
    if config.human_scores is not None:
        lineage["humanScores"] = config.human_scores.digest or dataset_digest(config.human_scores.path)
    return lineage
