"""The evidence of a reward model's gate: every held-out text scored once, temperature and reference set fixed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_trainer.config import Calibration, RewardModelTraining, RewardModelValidation
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.engine import Engine
from rlhf_trainer.evals.calibration import HeldOut, temperature
from rlhf_trainer.evals.probes import Favourite, Probe, ProbeOutcome, spoil
from rlhf_trainer.evals.reward_model import Evidence, HumanScored, figures, judge
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.reward_inputs import Inputs, Pair
from rlhf_trainer.models.reward import RewardCalibration, RewardEnsemble, normaliser, to_batch
from rlhf_trainer.wire import Verdict

_RENAMED = {"accuracy": "heldOutAccuracy"}  # a training step has an accuracy too


@dataclass(frozen=True)
class _Texts:
    """What is scored, in this order: both sides of the held-out pairs, human-scored responses, spoilt favourites."""

    pairs: tuple[Pair, ...]
    human: tuple[tuple[int, ...], ...]
    favourites: tuple[Favourite, ...]
    chosen: tuple[int, ...]  # where the favourites lie among both sides of the pairs
    spoilt: tuple[tuple[int, ...], ...]  # all favourites for each kind of probe

    @property
    def rows(self) -> list[tuple[int, ...]]:
        return [*(pair.a for pair in self.pairs), *(pair.b for pair in self.pairs), *self.human, *self.spoilt]


def evaluate(
    session: Session, engine: Engine, inputs: Inputs, training: RewardModelTraining, validation: RewardModelValidation
) -> tuple[RewardCalibration, tuple[Verdict, ...], dict[str, float]]:
    """Calibration, verdicts and figures, equal on all ranks. Collective."""
    texts = _texts(inputs)
    raw = score_rows(session, engine, texts.rows, inputs.encoder.pad_id)
    calibrate = training.calibration is Calibration.TEMPERATURE
    reference = raw[:, : 2 * len(texts.pairs), 0]
    uncalibrated = normaliser(reference, 1.0)
    pairs = _held_out(uncalibrated.apply(raw[..., 0])[0], texts.pairs, [pair.probability_a for pair in texts.pairs])
    fitted = temperature(pairs.take(pairs.decided)) if calibrate else 1.0
    calibration = normaliser(reference, fitted)
    evidence = _evidence(texts, inputs, training, raw, pairs, calibration)
    verdicts = judge(evidence, validation, calibrate, training.seed)
    found = {_RENAMED.get(v.metric, v.metric): v.estimate for v in verdicts if v.estimate is not None}
    found = {name: value for name, value in found.items() if "/" not in name}
    found |= figures(evidence, calibrate, training.seed) | {"temperature": fitted, "rewardScale": calibration.scale}
    session.board.figures(found)
    return calibration, verdicts, found


def score_rows(session: Session, engine: Engine, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Raw scores [K, N, H] of all rows on every rank, in float32 on the CPU; the rows are shared out over the ranks."""
    world, module = session.world, engine.module
    assert isinstance(module, RewardEnsemble)
    members, heads = len(module.members), module.heads
    size = max(1, min(256, -(-len(rows) // world.size)))
    module.eval()
    parts: list[Tensor] = []
    # Every rank runs the same number of passes, which ZeRO-3 needs: its forward gathers weights from all.
    for start in range(0, len(rows), size * world.size):
        mine = rows[start + world.rank * size : start + (world.rank + 1) * size]
        batch = list(mine) or [rows[0]]
        with torch.no_grad():
            scores = engine(*member_batches([batch] * members, pad_id, world.device)).float().cpu()
        parts.extend(world.gather(scores[:, : len(mine)]))
        session.pulse()
    return torch.cat(parts, dim=1) if parts else torch.zeros(members, 0, heads)


def member_batches(rows: Sequence[Sequence[Sequence[int]]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows by member → ids [K, B, T] and lengths [K, B], padded to one width."""
    ids, lengths = to_batch([row for own in rows for row in own], pad_id)
    shape = (len(rows), len(rows[0]))
    return ids.view(*shape, -1).to(device), lengths.view(shape).to(device)


def _texts(inputs: Inputs) -> _Texts:
    encoder = inputs.encoder
    found = list(_favourites(inputs.holdout))
    favourites = tuple(one for _, one in found)
    versions = [
        [_encoded(encoder, one.prompt, reply) for one, reply in zip(favourites, spoil(probe, favourites), strict=True)]
        for probe in Probe
    ]
    # Stuffed, or with a longer reply to another prompt, a text may be more than the model can read.
    longest = inputs.positions or math.inf
    kept = [at for at in range(len(found)) if all(len(own[at]) <= longest for own in versions)]
    return _Texts(
        inputs.holdout,
        tuple(_encoded(encoder, row.prompt, row.response) for row in inputs.human),
        tuple(favourites[at] for at in kept),
        tuple(found[at][0] for at in kept),
        tuple(own[at] for own in versions for at in kept),
    )


def _favourites(pairs: Sequence[Pair]) -> Iterator[tuple[int, Favourite]]:
    """Each decided pair's favourite, with its place in the list of all a's followed by all b's."""
    for index, pair in enumerate(pairs):
        row = pair.row
        if pair.probability_a > 0.5:
            yield index, Favourite(row.prompt, row.response_a, row.response_b)
        elif pair.probability_a < 0.5:
            yield len(pairs) + index, Favourite(row.prompt, row.response_b, row.response_a)


def _evidence(
    texts: _Texts,
    inputs: Inputs,
    training: RewardModelTraining,
    raw: Tensor,
    pairs: HeldOut,
    calibration: RewardCalibration,
) -> Evidence:
    count = len(texts.pairs)
    reward = calibration.apply(raw[..., 0])[0]
    scored = reward[2 * count : 2 * count + len(texts.human)]
    human = None
    if inputs.human:
        human = HumanScored(
            scored.tolist(),
            [row.score for row in inputs.human],
            [float(len(inputs.encoder.response(row.response))) for row in inputs.human],
            tuple(row.prompt for row in inputs.human),
        )
    return Evidence(
        pairs,
        tuple(pair.row.cohort for pair in texts.pairs),
        human,
        {name: _aspect(raw[..., 1 + place], texts.pairs, name) for place, name in enumerate(training.aspects)},
        _outcomes(texts, reward),
        calibration.scale,
    )


def _outcomes(texts: _Texts, reward: Tensor) -> tuple[ProbeOutcome, ...]:
    if not texts.favourites:
        return ()
    kept = reward[list(texts.chosen)].double()
    spoilt = reward[len(reward) - len(texts.spoilt) :].double().view(len(Probe), -1)
    prompts = tuple(one.prompt for one in texts.favourites)
    return tuple(ProbeOutcome(probe, (kept - own).numpy(), prompts) for probe, own in zip(Probe, spoilt, strict=True))


def _aspect(raw: Tensor, pairs: Sequence[Pair], name: str) -> HeldOut:
    """Held-out pairs as one aspect's head sees them; those it does not order count as ties."""
    return _held_out(raw.mean(dim=0), pairs, [pair.aspects.get(name, 0.5) for pair in pairs])


def _held_out(scores: Tensor, pairs: Sequence[Pair], labels: Sequence[float]) -> HeldOut:
    count = len(pairs)
    delta = (scores[:count] - scores[count : 2 * count]).double().numpy()
    return HeldOut(delta, np.array(labels, dtype=np.float64), tuple(pair.prompt for pair in pairs))


def _encoded(encoder: Encoder, prompt: str, response: str) -> tuple[int, ...]:
    return tuple(encoder.pair(prompt, response))
