"""Distillation: a student learns its teacher's samples, or to agree with it token by token on its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from rlhf_trainer.algos.distillation import forward_kl, jensen_shannon, reverse_kl, students_row
from rlhf_trainer.config import Distillation, DistillationMode
from rlhf_trainer.config import Divergence as Measure
from rlhf_trainer.generate.base import Completion, Request, SampleKey
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.offline import OfflineTrainer, Sums
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.supervised import imitate
from rlhf_trainer.models.critic import Actor
from rlhf_trainer.models.policy import Batch, load_policy
from rlhf_trainer.models.student import Divergence, Student


class DistillationTrainer(OfflineTrainer):
    """One row is one sample of a prompt, by teacher or student; a sample is a function of (seed, step, row) and the
    weights of whoever wrote it."""

    def __init__(self, session: Session, inputs: PolicyInputs) -> None:
        self._settings = inputs.training.distillation
        self._sequence = self._settings.mode is DistillationMode.SEQUENCE
        super().__init__(session, inputs, Actor if self._sequence else Student)
        assert inputs.teacher is not None  # check_needs
        self.teacher, _ = load_policy(inputs.teacher.path)  # preflight has compared its tokens with the policy's
        self.teacher.requires_grad_(False).to(self.world.device)

    def rows(self) -> int:
        return len(self.inputs.training_prompts)

    def gradients(self, rows: Sequence[int]) -> dict[str, float]:
        began = time.monotonic()
        prompts = [self.inputs.training_prompts[row].ids for row in rows]
        prompts = [ids for ids in prompts for _ in range(self.training.samples_per_prompt)]
        share = self.world.share(len(prompts))
        completions = self._sample(prompts, range(len(prompts))[share])
        seconds = time.monotonic() - began
        sums = Sums()
        sums.add(
            tokens=sum(len(completion.tokens) for completion in completions),
            cut=sum(completion.finish_reason == "length" for completion in completions),
            seconds=seconds,
        )
        total = sums.over(self.world)
        tokens = int(total["tokens"])
        mine = [(ids, done.tokens) for ids, done in zip(prompts[share], completions, strict=True)]
        figures = imitate(self, mine, tokens) if self._sequence else self._agree(mine, tokens)
        written = sum(self._by_student(row) for row in range(len(prompts)))
        return figures | {
            "onPolicyShare": written / len(prompts),
            "clippedFraction": total["cut"] / len(prompts),
            "generateSeconds": total["seconds"] / self.world.size,
        }

    def _by_student(self, row: int) -> bool:
        return not self._sequence and students_row(row, self._settings.on_policy_fraction)

    def _sample(self, prompts: Sequence[tuple[int, ...]], mine: range) -> list[Completion]:
        """A response to each of this rank's rows, by whoever has to write it. Collective."""
        step = self.session.done
        requests = {row: Request(prompts[row], SampleKey(self.training.seed, step, row)) for row in mine}
        done: dict[int, Completion] = {}
        with self.sampling_lm() as student:
            for lm, by_student in ((student, True), (self.teacher, False)):
                rows = [row for row in mine if self._by_student(row) is by_student]
                if rows:
                    completions = self.generator(lm).generate([requests[row] for row in rows], self.params)
                    done |= dict(zip(rows, completions, strict=True))
        return [done[row] for row in mine]

    def _agree(self, mine: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], tokens: int) -> dict[str, float]:
        divergence, sums = divergence_of(self._settings), Sums()
        for part in self.engine.micro_batches():
            prompts, responses = zip(*mine[part], strict=True)
            batch = Batch.of(prompts, responses, self.pad_id, self.world.device)
            apart, entropy = self.engine(batch, self.teacher, divergence, self.params.temperature)
            loss = apart.sum() / tokens
            self.engine.backward(loss * self.shares())
            sums.add(loss=loss.detach(), entropy=entropy.sum(), rows=len(prompts))
        total = sums.over(self.world)
        return {
            "loss": total["loss"],
            "divergence": total["loss"],
            "entropy": total["entropy"] / tokens,
            "responseLength": tokens / total["rows"],
        }


def divergence_of(settings: Distillation) -> Divergence:
    """(teacher, student) log-probs (N, V) → (N,) nats, as the user chose it."""
    if settings.divergence is Measure.JENSEN_SHANNON:
        return partial(jensen_shannon, beta=settings.beta)
    return forward_kl if settings.divergence is Measure.FORWARD else reverse_kl
