"""Training and validating a reward model: K members on bootstrap rows through one engine, then the gate.

Everything a step uses (rows, learning rate) is a function of (seed, step), so the checkpoint's position is one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rlhf_trainer.algos.bradley_terry import accuracy, aspect_loss, preference_loss
from rlhf_trainer.artifact import publish_artifact
from rlhf_trainer.config import RewardModelTraining, RewardModelValidation
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.engine import Engine, EngineOptions
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.common import Outcome, Session
from rlhf_trainer.loops.reward_gate import evaluate, member_batches
from rlhf_trainer.loops.reward_inputs import Inputs, Pair, given, lineage, prepare
from rlhf_trainer.models.adapters import attach, merged
from rlhf_trainer.models.reward import RewardEnsemble, save_reward_model
from rlhf_trainer.randomness import Stream, generator

_TOKENS_PER_PASS = 32_768  # of one member on one rank: bounds the activations of a backward pass
_WARMUP_SHARE = 0.05


def run(session: Session) -> Outcome:
    """The whole attempt, from preflight to artifact. Raises the endings of ``exits``."""
    config, world = session.config, session.world
    base, preferences = given(config.base_model, "baseModel"), given(config.preferences, "preferences")
    training, validation = config.reward_model_training, config.validation or RewardModelValidation()
    if training is None:
        raise Invalid("the attempt's configuration has no rewardModelTraining; recreate the resource")
    inputs = prepare(session, base, preferences, training)
    session.pulse()
    ensemble = RewardEnsemble.from_base(
        Path(base.path), training.ensemble.members, inputs.encoder.pad_id, training.seed, training.aspects
    )
    if training.lora is not None:
        for index, member in enumerate(ensemble.members):
            attach(member.model, training.lora, training.seed, index)
    engine = Engine(ensemble, _engine_options(training, world.size), world)
    session.pulse()
    _train(session, engine, inputs, training)
    session.begin_evaluation()
    calibration, verdicts, figures = evaluate(session, engine, inputs, training, validation)
    session.board.verdicts(verdicts)
    session.begin_saving()
    weights = merged(engine.state_dict(), engine.module)
    digests = lineage(config, base, preferences)

    def write(folder: Path) -> None:
        module = engine.module
        assert isinstance(module, RewardEnsemble)
        save_reward_model(folder, module, weights, inputs.encoder, calibration)

    artifact = publish_artifact(session, write, digests, verdicts)
    return Outcome(artifact, verdicts, figures, digests, gate_reason="RewardGateFailed")


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
    engine.module.eval()  # no dropout where attention has it without a module either (Llama, Qwen, Granite)
    for step in range(session.begin({"engine": engine}, total), total):
        chosen = [
            [pairs[index] for index in member_rows(training, len(pairs), member, step)]
            for member in range(training.ensemble.members)
        ]
        weights = aspect_weights(chosen, training.aspects)
        mine = [own[world.share(training.global_batch_size)] for own in chosen]
        passes = [
            _backward(engine, [own[part] for own in mine], weights, inputs.encoder, training)
            for part in engine.micro_batches()
        ]
        rate = learning_rate(training.learning_rate, step, total)
        engine.step(rate)
        figures = _figures(world.sums({name: sum(each[name] for each in passes) for name in passes[0]}))
        session.finish_step(step + 1, {**figures, "learningRate": rate, "gradientNorm": engine.gradient_norm})


def _figures(sums: dict[str, float]) -> dict[str, float]:
    """Means over all passes of all ranks, which are alike but for how many of their pairs are decided."""
    return {
        "loss": sums["loss"] / sums["passes"],
        "accuracy": sums["right"] / sums["decided"] if sums["decided"] else 0.0,
        "margin": sums["margin"] / sums["passes"],
    }


def aspect_weights(rows: Sequence[Sequence[Pair]], aspects: Sequence[str]) -> torch.Tensor:
    """[K, A]: rows of a step over those that order the aspect, by member; 0 where none does.

    Counted over the whole step, so that the gradient is the same however the step is cut into ranks and passes.
    """
    counts = [[sum(name in pair.aspects for pair in own) for name in aspects] for own in rows]
    ordered = torch.tensor(counts, dtype=torch.float32).view(len(rows), len(aspects))
    return torch.where(ordered > 0, len(rows[0]) / ordered.clamp_min(1), torch.zeros(()))


def _backward(
    engine: Engine,
    rows: Sequence[Sequence[Pair]],
    weights: torch.Tensor,
    encoder: Encoder,
    training: RewardModelTraining,
) -> dict[str, float]:
    """One slice, rows by member: forward of both responses at once, loss summed over members, gradient. Returns sums
    for ``_figures``."""
    texts = [[pair.a for pair in own] + [pair.b for pair in own] for own in rows]
    scores = engine(*member_batches(texts, encoder.pad_id, engine.world.device))
    device = scores.device
    labels = torch.tensor([[pair.probability_a for pair in own] for own in rows], device=device)
    margins = torch.tensor([[pair.margin for pair in own] for own in rows], device=device)
    a, b = scores.chunk(2, dim=1)
    losses = torch.stack(
        [
            preference_loss(own_a[:, 0], own_b[:, 0], own_labels, training.centering, own_margins)
            for own_a, own_b, own_labels, own_margins in zip(a, b, labels, margins, strict=True)
        ]
    )
    objective = losses.sum()
    if training.aspects:
        wanted = [[[pair.aspects.get(name, 0.5) for name in training.aspects] for pair in own] for own in rows]
        targets = torch.tensor(wanted, device=device)
        counting = (targets != 0.5) * weights.to(device)[:, None, :]
        # aspect_loss means over members too; the sum over members is what trains each alike.
        objective = objective + len(rows) * aspect_loss((a - b)[..., 1:], targets, counting)
    engine.backward(objective)
    delta = (a - b)[..., 0].detach()
    right, decided = accuracy(delta, labels)
    margin = (delta * (2 * labels - 1)).mean()
    figures = {"loss": float(losses.mean().detach()), "margin": float(margin), "passes": 1.0}
    return figures | {"right": right * decided, "decided": float(decided)}


def _engine_options(training: RewardModelTraining, world_size: int) -> EngineOptions:
    rows = training.global_batch_size // world_size
    fitting = (
        part for part in range(rows, 0, -1) if rows % part == 0 and 2 * part * training.max_length <= _TOKENS_PER_PASS
    )
    return EngineOptions(
        zero_stage=training.deepspeed.zero_stage,
        learning_rate=training.learning_rate,
        rows_per_step=training.global_batch_size,
        micro_rows=training.micro_batch_size or next(fitting, 1),
        weight_decay=training.weight_decay,
        precision=training.precision,
        # The norm is over all members: 1 for each when they are alike.
        max_grad_norm=float(training.ensemble.members) ** 0.5,
    )
