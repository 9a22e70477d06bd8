"""Direct preference optimisation (DPO, cDPO, IPO): pairs train the policy without a reward model or sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_trainer.algos.preference import dpo_losses, ipo_losses, margins
from rlhf_trainer.config import DPO, PreferenceLoss
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.given_texts import Pair, Text
from rlhf_trainer.loops.offline import OfflineTrainer, Sums, ratio
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.reference_cache import cached_logprobs
from rlhf_trainer.models.critic import Actor
from rlhf_trainer.models.policy import Batch


def pair_losses(margin: Tensor, probability: Tensor, dpo: DPO) -> Tensor:
    """Loss per pair (B,) as the user chose it."""
    if dpo.loss is PreferenceLoss.IPO:
        flipped = dpo.label_smoothing
        return ipo_losses(margin, probability * (1 - flipped) + (1 - probability) * flipped, tau=dpo.beta)
    return dpo_losses(margin, probability, beta=dpo.beta, label_smoothing=dpo.label_smoothing)


class PreferenceTrainer(OfflineTrainer):
    """One row is one pair; both responses go through one forward pass."""

    responses_per_row = 2

    def __init__(self, session: Session, inputs: PolicyInputs) -> None:
        super().__init__(session, inputs, Actor)
        self._pairs = inputs.pairs
        self._reference_logprobs = torch.zeros(0, 2)

    def rows(self) -> int:
        texts = [Text(pair.prompt, response) for pair in self._pairs for response in pair.responses]
        known = cached_logprobs(
            self.session, self.inputs.policy, self.reference, texts, self.pad_id, self.params.temperature
        )
        self._reference_logprobs = known.view(-1, 2)
        return len(self._pairs)

    def gradients(self, rows: Sequence[int]) -> dict[str, float]:
        mine, sums = self.mine(rows), Sums()
        for part in self.engine.micro_batches():
            self._backward(mine[part], sums)
        return _figures(sums.over(self.world), self.training.dpo.beta)

    def _backward(self, rows: Sequence[int], sums: Sums) -> None:
        pairs, device = [self._pairs[row] for row in rows], self.world.device
        batch = _batch(pairs, self.pad_id, device)
        logprobs, _, entropy = self.engine(batch, self.params.temperature)
        chosen, rejected = logprobs.sum(dim=1).chunk(2)
        anchors = self._reference_logprobs[list(rows)].to(device)
        probability = torch.tensor([pair.probability for pair in pairs], device=device)
        margin = margins(chosen, rejected, anchors[:, 0], anchors[:, 1])
        losses = pair_losses(margin, probability, self.training.dpo)
        self.engine.backward(losses.mean())
        decided = probability != 0.5
        good, bad, gap = (chosen - anchors[:, 0])[decided], (rejected - anchors[:, 1])[decided], margin[decided]
        sums.add(
            loss=losses.detach().sum(), rows=len(pairs), decided=decided.sum(), right=(gap > 0).sum(),
            good=good.detach().sum(), bad=bad.detach().sum(), entropy=entropy.sum(), tokens=batch.lengths.sum(),
        )  # fmt: skip


def _batch(pairs: Sequence[Pair], pad_id: int, device: torch.device) -> Batch:
    """The chosen responses of all pairs, then the rejected ones."""
    prompts = [pair.prompt.ids for pair in pairs]
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return Batch.of(prompts * 2, responses, pad_id, device)


def _figures(sums: dict[str, float], beta: float) -> dict[str, float]:
    good, bad = ratio(sums["good"], sums["decided"]), ratio(sums["bad"], sums["decided"])
    return {
        "loss": sums["loss"] / sums["rows"],
        "preferenceAccuracy": ratio(sums["right"], sums["decided"]),
        "rewardMargin": beta * (good - bad),
        "chosenReward": beta * good,
        "rejectedReward": beta * bad,
        "entropy": sums["entropy"] / sums["tokens"],
        "responseLength": sums["tokens"] / (2 * sums["rows"]),
    }
