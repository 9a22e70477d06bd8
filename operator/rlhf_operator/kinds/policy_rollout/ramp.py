"""Where the candidate stands: what keeps it in its stage, takes it to the next one, or out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from rlhf_operator.api.conditions import RolloutCondition, find
from rlhf_operator.api.decision import Action, Decision
from rlhf_operator.api.policy_rollout import BlindAction, Guardrail, Stage, StageApproval, seconds
from rlhf_operator.api.policy_rollout_status import (
    Revision,
    RolloutMetric,
    RolloutPhase,
    RolloutReason,
    RolloutVerdict,
)
from rlhf_operator.kinds.policy_rollout import evidence
from rlhf_operator.kinds.policy_rollout.course import Course
from rlhf_operator.kinds.policy_rollout.decisions import decision_about
from rlhf_operator.kinds.policy_rollout.evidence import Evidence
from rlhf_operator.kinds.policy_rollout.gateway import stage_number
from rlhf_operator.kinds.policy_rollout.observe import View
from rlhf_operator.kinds.training.objects import moment
from rlhf_trainer.wire import VerdictState

Move = Literal["stay", "next", "promote", "reject"]


@dataclass(frozen=True)
class Standing:
    """What happens to the candidate in this pass, and why."""

    move: Move
    phase: RolloutPhase
    reason: RolloutReason
    message: str
    routed: bool = True  # False: no traffic for now
    approval: bool | None = None  # of this stage; None: none is asked for
    wait: float | None = None  # seconds until time alone may change this


@dataclass(frozen=True)
class Ramp:
    """One candidate in one pass. `route_confirmed`: the gateways do what the recorded stage says."""

    view: View
    course: Course
    candidate: Revision
    blind_since: datetime | None
    route_confirmed: bool

    @property
    def stage(self) -> Stage | None:
        stages, index = self.view.spec.stages, self.course.stage
        return None if index is None else stages[min(index, len(stages) - 1)]

    @property
    def promoting(self) -> bool:
        return self.course.stage is not None and self.course.stage >= len(self.view.spec.stages)

    @property
    def number(self) -> int:
        """Of the stage, as the gateways count."""
        index = min(self.course.stage or 0, len(self.view.spec.stages) - 1)
        return stage_number(self.course.trial, index)

    @property
    def phase(self) -> RolloutPhase:
        if self.promoting:
            return RolloutPhase.PROMOTING
        return RolloutPhase.SHADOWING if self.stage is not None and self.stage.shadow else RolloutPhase.PROGRESSING

    def standing(self, found: Evidence) -> Standing:
        """The first thing that speaks: an end, an interruption, what the stage still lacks, or the next step."""
        return self._end(found) or self._interruption() or self._lack(found) or self._step()

    def _end(self, found: Evidence) -> Standing | None:
        abort = decision_about(self.view, Action.ABORT, self.candidate.digest, since=self.candidate.started_at)
        if abort is not None:
            message = f"aborted by {abort.spec.by}: {abort.spec.reason}"
            return self._rejected(RolloutReason.ABORTED_BY_DECISION, message)
        if (guardrail := evidence.crossed(found.trial, self.view.spec.guardrails)) is not None:
            return self._rejected(RolloutReason.GUARDRAIL_CROSSED, self._crossing(found, guardrail))
        if (crash := self.view.crash_loop(self.candidate.revision)) is not None:
            return self._rejected(RolloutReason.CANDIDATE_UNAVAILABLE, crash)
        on_blind = self.view.spec.on_blind
        if on_blind.action is BlindAction.ROLLBACK and self._blind_for() >= seconds(on_blind.max_duration):
            message = f"the gateways' counts could not be read for {on_blind.max_duration}"
            return self._rejected(RolloutReason.METRICS_BLIND, message)
        return None

    def _interruption(self) -> Standing | None:
        if self.view.ready_endpoints(self.candidate.revision) == 0:
            message = f"no pod of {self.candidate.revision} is ready: it gets no traffic until one is"
            return self._stay(RolloutReason.CANDIDATE_UNAVAILABLE, message, routed=False)
        if self.course.stage is None:
            if self.view.spec.paused:
                return self._stay(RolloutReason.STAGE_RUNNING, "paused before the first stage", routed=False)
            return Standing("next", self.phase, RolloutReason.STAGE_RUNNING, "the first stage begins", routed=False)
        return None

    def _lack(self, found: Evidence) -> Standing | None:
        """What has to come before the stage may end."""
        stage = self.stage
        if stage is None:
            return None
        if not self.route_confirmed:
            return self._stay(RolloutReason.STAGE_RUNNING, "waiting for every gateway pod to take the new weight")
        if self.blind_since is not None:
            return self._stay(RolloutReason.METRICS_BLIND, self._blind_message(), wait=self._blind_left())
        design = evidence.designs(self.view, self.course.trial)[self.number]
        if found.trial.split_mismatch(self.number, design):
            return self._stay(RolloutReason.SPLIT_MISMATCH, self._mismatch_message(found, stage))
        return self._missing(found, stage)

    def _missing(self, found: Evidence, stage: Stage) -> Standing | None:
        skipped = self._decided(Action.SKIP_STAGE) is not None  # the waiting, not what guardrails say
        have = found.trial.samples(self.number)
        if have < stage.min_samples and not self.promoting and not skipped:
            return self._stay(RolloutReason.NEED_MORE_SAMPLES, self._samples_message(found, stage))
        left = 0.0 if skipped else self._duration_left(stage)
        if left > 0.0:
            return self._stay(RolloutReason.STAGE_RUNNING, f"stage {self.course.stage} runs {stage.min_duration}", left)
        verdicts = self.verdicts(found)
        if (unknown := next((v for v in verdicts if v.state is VerdictState.UNKNOWN), None)) is not None:
            message = f"nothing advances: {unknown.message}{self._gateway_trouble()}"
            return self._stay(RolloutReason.METRICS_BLIND, message)
        if stage.shadow and (worse := next(filter(looks_worse, verdicts), None)) is not None:
            message = f"no user is sent to a candidate that looks worse in its shadow stage: {worse.message}"
            return self._stay(RolloutReason.NEED_MORE_SAMPLES, message)
        last = self.course.stage is not None and self.course.stage >= len(self.view.spec.stages) - 1
        if last and not evidence.all_passed(found.trial, self.view.spec.guardrails):
            missing = next(v.message for v in verdicts if v.state is not VerdictState.PASS)
            return self._stay(RolloutReason.NEED_MORE_SAMPLES, f"a promotion needs every guardrail to pass: {missing}")
        return None

    def _step(self) -> Standing:
        stage, index = self.stage, self.course.stage
        approval = None if stage is None or self.promoting else self._approval(stage)
        if approval is False:
            message = (
                f"stage {index} has its evidence; a Decision Approve with stage {index} and digest "
                f"{self.candidate.digest} lets it go on{self._not_honoured()}"
            )
            return self._stay(RolloutReason.AWAITING_DECISION, message, approval=False)
        if self.view.spec.paused:
            return self._stay(RolloutReason.STAGE_PASSED, "paused", approval=approval)
        if not self.promoting:
            return Standing("next", self.phase, RolloutReason.STAGE_PASSED, f"stage {index} passed", approval=approval)
        ready, wanted = self.view.ready_endpoints(self.candidate.revision), self.view.spec.serving.replicas
        if ready < wanted:
            message = f"scaling up before it takes all traffic: {ready} of {wanted} pods are ready"
            return self._stay(RolloutReason.STAGE_PASSED, message)
        return Standing("promote", RolloutPhase.PROMOTING, RolloutReason.PROMOTED, "every stage and guardrail passed")

    def _stay(
        self,
        reason: RolloutReason,
        message: str,
        wait: float | None = None,
        *,
        routed: bool = True,
        approval: bool | None = None,
    ) -> Standing:
        phase = self.phase
        if self.view.spec.paused:
            phase, message = RolloutPhase.PAUSED, f"paused by spec.paused; {message}"
        elif reason is RolloutReason.AWAITING_DECISION:
            phase = RolloutPhase.AWAITING_APPROVAL
        return Standing("stay", phase, reason, message, routed, approval, wait)

    def _rejected(self, reason: RolloutReason, message: str) -> Standing:
        return Standing("reject", RolloutPhase.ROLLING_BACK, reason, message, routed=False)

    def _approval(self, stage: Stage) -> bool | None:
        if self._decided(Action.SKIP_STAGE) is not None:
            return True
        return self.approved_by() is not None if stage.approval is StageApproval.REQUIRED else None

    def approved_by(self) -> str | None:
        """Who let the present stage pass, for the ledger."""
        for action, what in ((Action.APPROVE, ""), (Action.SKIP_STAGE, " skipped")):
            if (decision := self._decided(action)) is not None:
                by = f"{decision.spec.by} ({decision.name}): {decision.spec.reason}"
                return f"stage {self.course.stage}{what}: {by}"[:512]
        return None

    def _decided(self, action: Action) -> Decision | None:
        """A decision in force about the present stage of this trial."""
        since, digest = self.candidate.started_at, self.candidate.digest
        return decision_about(self.view, action, digest, since=since, stage=self.course.stage)

    def _not_honoured(self) -> str:
        if self.view.observed.decisions_honoured:
            return ""
        return "; decisions are not honoured now: the admission policy that binds them to their authors is not in place"

    def verdicts(self, found: Evidence) -> list[RolloutVerdict]:
        """What every guardrail says in this stage."""
        design = evidence.designs(self.view, self.course.trial)[self.number]
        return evidence.verdicts(found.trial, self.view.spec.guardrails, design, self._rate(found))

    def _crossing(self, found: Evidence, guardrail: Guardrail) -> str:
        (verdict,) = (v for v in self.verdicts(found) if v.metric is guardrail.metric)
        return f"{guardrail.metric} in stage {self.course.stage}: {verdict.message}"

    def _samples_message(self, found: Evidence, stage: Stage) -> str:
        have = found.trial.samples(self.number)
        missing = stage.min_samples - have
        text = (
            f"{have} of {stage.min_samples} candidate conversations in stage {self.course.stage}: {missing} more needed"
        )
        left = evidence.eta(missing, self._rate(found))
        return f"{text}, about {duration(left)} at this traffic" if left is not None else f"{text}; no traffic so far"

    def _rate(self, found: Evidence) -> float | None:
        """Candidate conversations per second in this stage, as of that evidence; None without any.

        Not as of now: a rate that falls while nothing comes would be rewritten for ever.
        """
        have, started = found.trial.samples(self.number), self.course.stage_started_at
        if not have or started is None or found.updated_at is None:
            return None
        return have / max(1.0, (found.updated_at - started).total_seconds())

    def _mismatch_message(self, found: Evidence, stage: Stage) -> str:
        share = found.trial.observed_share(self.number) or 0.0
        return (
            f"the gateways counted {100.0 * share:.3g} % of conversations on the candidate where "
            f"{stage.weight_percent:g} % are configured: nothing advances; look at how conversations are keyed, and "
            "abort the trial by a Decision or change its stages"
        )

    def _blind_for(self) -> float:
        return (self.view.now - self.blind_since).total_seconds() if self.blind_since is not None else 0.0

    def _blind_left(self) -> float | None:
        left = seconds(self.view.spec.on_blind.max_duration) - self._blind_for()
        return left if left > 0 else None

    def _blind_message(self) -> str:
        pods = [pod for pod in self.view.gateway_pods if pod.ready and pod.blind(self.view.now)]
        pull = pods[0].evidence_pull if pods else None
        why = (pull.error if pull is not None else None) or "no gateway pod answers with its counts"
        return f"the gateways' counts cannot be read, so nothing advances: {why}"[:1024]

    def _gateway_trouble(self) -> str:
        """What the gateway pods say that keeps them from doing what they are told."""
        states = [pod.state for pod in self.view.gateway_pods if pod.ready and pod.state is not None]
        trouble = next((error for state in states for error in state.errors), None)
        return f": {trouble}"[:768] if trouble is not None else "; the gateway pods' logs say why"

    def _duration_left(self, stage: Stage) -> float:
        if stage.min_duration is None or self.promoting:
            return 0.0
        started = self.course.stage_started_at or self.view.now
        started = max(started, self._available_since() or started)
        return (started + timedelta(seconds=seconds(stage.min_duration)) - self.view.now).total_seconds()

    def _available_since(self) -> datetime | None:
        """Since when the candidate has had a pod without a break: without one it has no weight, whatever its stage."""
        known = find(self.view.status.conditions, RolloutCondition.CANDIDATE_AVAILABLE)
        return moment({"at": known.last_transition_time}, "at") if known is not None else None


def looks_worse(verdict: RolloutVerdict) -> bool:
    """Undecided, and nearer to the margin than to no difference. Waiting in the shadow costs no user anything, and the
    samples that come will decide. The latency of mirrored requests, for which nobody waits, is left to real traffic."""
    if verdict.state is not VerdictState.NEED_MORE_DATA or verdict.metric is RolloutMetric.LATENCY:
        return False
    return verdict.estimate is not None and verdict.estimate > verdict.margin / 2


def duration(total: int) -> str:
    """90 -> "1m30s"."""
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else "", f"{secs}s" if secs and not hours else ""]
    return "".join(parts) or "0s"
