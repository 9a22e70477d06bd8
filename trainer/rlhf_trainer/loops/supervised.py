"""Supervised fine-tuning: the responses of the demonstrations by maximum likelihood, every token weighing the same."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_trainer.algos.supervised import token_cross_entropy
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.offline import OfflineTrainer, Sums
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.models.critic import Actor
from rlhf_trainer.models.policy import Batch

Tokens = tuple[int, ...]


class SupervisedTrainer(OfflineTrainer):
    def __init__(self, session: Session, inputs: PolicyInputs) -> None:
        super().__init__(session, inputs, Actor)

    def rows(self) -> int:
        return len(self.inputs.demonstrations)

    def gradients(self, rows: Sequence[int]) -> dict[str, float]:
        texts = [self.inputs.demonstrations[row] for row in rows]
        tokens = sum(len(text.response) for text in texts)  # of all ranks: every token weighs the same everywhere
        mine = texts[self.world.share(len(texts))]
        return imitate(self, [(text.prompt.ids, text.response) for text in mine], tokens)


def imitate(trainer: OfflineTrainer, mine: Sequence[tuple[Tokens, Tokens]], tokens: int) -> dict[str, float]:
    """Backward passes over this rank's (prompt, response) rows of a step that has ``tokens`` response tokens."""
    sums = Sums()
    for part in trainer.engine.micro_batches():
        prompts, responses = zip(*mine[part], strict=True)
        batch = Batch.of(prompts, responses, trainer.pad_id, trainer.world.device)
        logprobs, _, entropy = trainer.engine(batch, trainer.params.temperature)
        loss = token_cross_entropy(logprobs, batch.mask(), tokens)
        trainer.engine.backward(loss * trainer.shares())
        sums.add(loss=loss.detach(), entropy=entropy.sum(), rows=len(prompts))
    total = sums.over(trainer.world)
    return {
        "loss": total["loss"],
        "entropy": total["entropy"] / tokens,
        "responseLength": tokens / total["rows"],
    }
