"""Candidates that break their answers off, one after the other, until a guardrail fails each and its route is gone."""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import json
import time
from dataclasses import dataclass, field

from benchmarks.harness.gateway import Answered
from benchmarks.harness.rollout import WEIGHT, Rollout, Route
from rlhf_operator.api.policy_rollout_status import RolloutReason
from rlhf_trainer.wire import VerdictState
from tests.unit.gateway_world import talks_on

BREAK_AFTER = 2  # chunks of a streamed answer; what is asked for whole is answered
SECONDS = 60.0  # for one candidate


@dataclass(frozen=True)
class Verdict:
    """Seconds from the evidence that decides until weight 0 is seen, and until stable answers a conversation that the
    candidate had; from the first answer that broke off before a user's eyes until weight 0; and how many broke off.
    `conversations`: of the candidate, in the evidence that decides."""

    written: float
    answered: float
    harmed: float
    broken: int
    conversations: int


class Users(io.StringIO):
    """Takes in the lines of the traffic: when and how often users of a revision were left with a broken answer."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: dict[str, list[float]] = {}
        self.failed: list[str] = []  # what no candidate is to blame for

    def write(self, text: str) -> int:
        line = json.loads(text)
        if line["error"] is not None:
            if line["arm"] == "canary":
                self.broken.setdefault(line["revision"], []).append(time.monotonic())
            else:
                self.failed.append(text)
        return len(text)


@dataclass
class Trials:
    """Proposes and condemns candidates of one rollout, over running traffic."""

    rollout: Rollout
    users: Users
    gaps: list[float] = field(default_factory=list)  # seconds between the operator's pulls while a candidate is tried

    async def condemn(self, number: int) -> Verdict:
        async with asyncio.timeout(SECONDS):
            return await self._condemn(_digest(number))

    async def _condemn(self, digest: str) -> Verdict:
        one = self.rollout
        one.pod.forget()
        revision = await one.propose(digest)
        begun = await one.route(WEIGHT)
        (talk,) = talks_on("canary", WEIGHT, 1, begun.config.salt)
        await one.first_by("canary", talk)
        asking = asyncio.create_task(one.first_by("stable", talk))
        written = await one.weight(0.0)
        answered = await asking
        pulls = one.pod.answered()
        decisive = await self._decisive(digest, begun, pulls)
        moments = [pull.at for pull in pulls if begun.at <= pull.at <= decisive.at]
        self.gaps += [after - before for before, after in itertools.pairwise(moments)]
        await one.forget(revision)
        broken = self.users.broken[revision]
        seen = _conversations(decisive, begun)
        return Verdict(written - decisive.at, answered - decisive.at, written - broken[0], len(broken), seen)

    async def _decisive(self, digest: str, begun: Route, pulls: list[Answered]) -> Answered:
        """The first answer with as many conversations of the candidate as the written verdict rests on."""
        status = await self.rollout.status()
        entry = next(entry for entry in status["revisions"] if entry["digest"] == digest)
        if entry.get("reason") != RolloutReason.GUARDRAIL_CROSSED:
            raise RuntimeError(f"the candidate left by another way than a verdict: {entry}")
        (verdict,) = entry["verdicts"]
        found = [pull for pull in pulls if _conversations(pull, begun) == verdict["n"]]
        if verdict["state"] != VerdictState.FAIL or not found:
            raise RuntimeError(f"no answer of the gateway has the counts of the verdict: {verdict}")
        return found[0]


def _conversations(pull: Answered, route: Route) -> int:
    """Of the candidate, in the stage of a route."""
    return sum(
        row.conversations
        for row in pull.evidence.counts
        if (row.stage, row.arm, row.shadow) == (route.config.stage, "canary", False)
    )


def _digest(number: int) -> str:
    return f"sha256:{hashlib.sha256(f'candidate {number}'.encode()).hexdigest()}"
