"""Kahneman-Tversky optimisation: every response of a decided pair is one desirable or undesirable row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_trainer.algos.kto import kto_losses, mismatched, reference_point
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.given_texts import Text, single_responses
from rlhf_trainer.loops.offline import OfflineTrainer, Sums, ratio
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.reference_cache import cached_logprobs, sequence_logprobs
from rlhf_trainer.models.critic import Actor
from rlhf_trainer.models.policy import Batch


class KTOTrainer(OfflineTrainer):
    """The reference point of a step is estimated on its whole batch before any gradient, so that neither ranks nor
    micro batches change it."""

    def __init__(self, session: Session, inputs: PolicyInputs) -> None:
        preferences = session.config.preferences
        path = preferences.path if preferences is not None else "spec.preferences"
        self._texts, self._desirable = single_responses(inputs.pairs, path)
        if len(self._texts) < inputs.training.prompts_per_step:
            raise Invalid(
                f"{path}: {len(self._texts)} responses of decided pairs are fewer than training.promptsPerStep "
                f"{inputs.training.prompts_per_step}; lower it or give more rows"
            )
        super().__init__(session, inputs, Actor)  # loads weights: whatever can be refused is refused before
        self._reference_logprobs = torch.zeros(0)

    def rows(self) -> int:
        self._reference_logprobs = cached_logprobs(
            self.session, self.inputs.policy, self.reference, self._texts, self.pad_id, self.params.temperature
        )
        return len(self._texts)

    def gradients(self, rows: Sequence[int]) -> dict[str, float]:
        point = self._reference_point(rows)
        mine, sums = self.mine(rows), Sums()
        for part in self.engine.micro_batches():
            self._backward(mine[part], point, sums)
        return _figures(sums.over(self.world), self.training.kto.beta) | {"referencePoint": point}

    @torch.no_grad()
    def _reference_point(self, rows: Sequence[int]) -> float:
        """z0 from prompts of the batch answered with responses to other prompts of it."""
        texts = [self._texts[row] for row in rows]
        borrowed = mismatched([text.prompt.ids for text in texts])
        swapped = [Text(text.prompt, texts[other].response) for text, other in zip(texts, borrowed, strict=True)]
        mine, temperature, sums = swapped[self.world.share(len(rows))], self.params.temperature, Sums()
        for part in self.engine.micro_batches():
            logprobs, _, _ = self.engine(self._batch(mine[part]), temperature)
            anchors = sequence_logprobs(self.reference, mine[part], self.pad_id, temperature)
            sums.add(total=(logprobs.sum(dim=1) - anchors).double().sum())
        return reference_point(sums.over(self.world)["total"], len(rows))

    def _backward(self, rows: Sequence[int], point: float, sums: Sums) -> None:
        kto, device = self.training.kto, self.world.device
        batch = self._batch([self._texts[row] for row in rows])
        logprobs, _, entropy = self.engine(batch, self.params.temperature)
        log_ratio = logprobs.sum(dim=1) - self._reference_logprobs[list(rows)].to(device)
        desirable = torch.tensor([self._desirable[row] for row in rows], device=device)
        losses = kto_losses(
            log_ratio,
            desirable,
            reference=point,
            beta=kto.beta,
            desirable_weight=kto.desirable_weight,
            undesirable_weight=kto.undesirable_weight,
        )
        self.engine.backward(losses.mean())
        fixed = log_ratio.detach()
        sums.add(
            loss=losses.detach().sum(), rows=len(rows), desirable=desirable.sum(), good=fixed[desirable].sum(),
            bad=fixed[~desirable].sum(), entropy=entropy.sum(), tokens=batch.lengths.sum(),
        )  # fmt: skip

    def _batch(self, texts: Sequence[Text]) -> Batch:
        return Batch.of(
            [text.prompt.ids for text in texts], [text.response for text in texts], self.pad_id, self.world.device
        )


def _figures(sums: dict[str, float], beta: float) -> dict[str, float]:
    good = ratio(sums["good"], sums["desirable"])
    bad = ratio(sums["bad"], sums["rows"] - sums["desirable"])
    return {
        "loss": sums["loss"] / sums["rows"],
        "rewardMargin": beta * (good - bad),
        "chosenReward": beta * good,
        "rejectedReward": beta * bad,
        "entropy": sums["entropy"] / sums["tokens"],
        "responseLength": sums["tokens"] / sums["rows"],
    }
