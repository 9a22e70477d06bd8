"""The real kinds under the real engine: a crash after every write, lost events, conflicts and lost answers change
nothing, and at rest nothing is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_operator.api.labels import ATTEMPT, OWNER_NAME, OWNER_UID
from rlhf_operator.kinds import KINDS
from rlhf_operator.kinds.base import JOB, PERSISTENT_VOLUME_CLAIM, POD
from tests.property import cluster
from tests.property.memory_api import Dict, Faults, MemoryApi
from tests.property.world import NAMESPACE, Story, World

LATE = "late"  # a claim that only an edit makes
EXAMPLES = Path(__file__).parents[2] / "manifests" / "examples"


class TrainingWorld(World):
    """Its kubelet runs training pods, step by step, to the end that the story names."""

    async def begin(self) -> None:
        named = [claim for manifest in self.story.manifests for claim in cluster.claims_for(manifest)]
        for name, claim in {claim["metadata"]["name"]: claim for claim in named}.items():
            if name != LATE:
                self.api.insert(PERSISTENT_VOLUME_CLAIM, claim)
        await super().begin()

    def kubelet(self) -> bool:
        return any(self._advance(job) for job in self.api.of("jobs") if not _is_over(job))

    def _advance(self, job: Dict) -> bool:
        if job["spec"].get("suspend"):
            return False
        pods, now = cluster.by_owner(self.api.of("pods"), job), self.clock.now()
        if not pods:
            for pod in cluster.pods_of(job, job["spec"]["template"]):
                self.api.insert(POD, pod)
            return True
        for pod in pods:
            phase = (pod.get("status") or {}).get("phase")
            if phase is None:
                self.api.store(POD, {**pod, "status": cluster.running(now)})
                return True
        for pod in pods:
            if pod["status"]["phase"] == "Running":
                self.api.store(POD, {**pod, "status": self._end(job, pod)})
                return True
        failed = any(pod["status"]["phase"] == "Failed" for pod in pods)
        self.api.store(JOB, {**job, "status": cluster.job_ended(job, failed, now)})
        return True

    def _end(self, job: Dict, pod: Dict) -> Dict:
        labels, now = job["metadata"]["labels"], self.clock.now()
        attempt = int(labels[ATTEMPT])
        arguments = labels[OWNER_UID], attempt, now
        if job["metadata"]["name"] in self.story.failing:
            return cluster.ended(pod, 21, cluster.failure(*arguments), now)
        return cluster.ended(pod, 0, cluster.success(*arguments), now)


def _is_over(job: Dict) -> bool:
    return any(c["type"] in ("Complete", "Failed") for c in (job.get("status") or {}).get("conditions") or ())


def example(name: str, **spec: Any) -> Dict:
    made = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    made["metadata"]["namespace"] = NAMESPACE
    made["spec"] |= spec
    return made


STORIES = {
    "a reward model whose first attempt fails, and the policy that waits for it": Story(
        [
            example("reward-model-job", ttlSecondsAfterFinished=None),
            example("policy-optimization-job", ttlSecondsAfterFinished=None, auditRewardModel=None),
        ],
        frozenset({"helpful-rm-train-a1"}),
    ),
    "a job that fails until it may not any more": Story(
        [example("reward-model-job", failurePolicy={"maxRestarts": 1})],
        frozenset({"helpful-rm-train-a1", "helpful-rm-train-a2"}),
    ),
    "a job whose claim is made after it": Story(
        [example("reward-model-job", output={"uri": f"pvc://{LATE}/rm"})],
        edits=(lambda api: api.insert(PERSISTENT_VOLUME_CLAIM, cluster.claim(NAMESPACE, LATE)),),
    ),
    "a job that cannot share its claim": Story(
        [example("reward-model-job", output={"uri": f"pvc://{LATE}/rm"}, trainer={"numNodes": 2})],
        edits=(lambda api: api.insert(PERSISTENT_VOLUME_CLAIM, cluster.claim(NAMESPACE, LATE, "ReadWriteOnce")),),
    ),
    "a rollout that waits for its policy": Story([example("policy-rollout")]),
}


def tidy(story: Story) -> Story:
    manifests = copy.deepcopy(list(story.manifests))
    for manifest in manifests:
        manifest["spec"] = {key: value for key, value in manifest["spec"].items() if value is not None}
    return Story(manifests, story.failing, story.edits)


@pytest.fixture(params=STORIES, ids=str)
def story(request: pytest.FixtureRequest) -> Story:
    return tidy(STORIES[request.param])


async def undisturbed(story: Story) -> World:
    world = TrainingWorld(KINDS, story)
    await world.begin()
    await world.settle()
    return world


async def check(world: World, reference: World) -> None:
    await world.settle_after_faults()
    assert _shape(world) == _shape(reference)
    assert {name: count for name, count in world.creations().items() if count > 1} == {}
    assert await world.writes_at_rest() == 0


def _shape(world: World) -> dict[str, Any]:
    """Phases, ledgers and verdicts of our kinds, and which children there are; not usage, which is time."""
    shape: dict[str, Any] = {}
    for ref, obj in sorted(world.api.objects.items()):
        if ref.plural in ("events", "pods"):
            continue
        status = obj.get("status") or {}
        attempts = [(a.get("number"), a.get("failureClass"), a.get("counted")) for a in status.get("attempts") or ()]
        conditions = {c["type"]: (c["status"], c.get("reason")) for c in status.get("conditions") or ()}
        shape[f"{ref.plural}/{ref.name}"] = (status.get("phase"), attempts, conditions, status.get("verdicts"))
    return shape


async def test_the_stories_go_where_they_should() -> None:
    phases = {}
    for name, story in STORIES.items():
        world = await undisturbed(tidy(story))
        phases[name] = {
            o["metadata"]["name"]: o["status"]["phase"]
            for plural in ("rewardmodeljobs", "policyoptimizationjobs", "policyrollouts")
            for o in world.api.of(plural)
        }

    waits, fails, late, refused, rolls = phases.values()
    assert waits == {"helpful-rm": "Succeeded", "helpful-ppo": "Succeeded"}
    assert fails == {"helpful-rm": "Failed"}
    assert late == {"helpful-rm": "Succeeded"}
    assert refused == {"helpful-rm": "Failed"}
    assert rolls == {"desk": "Pending"}


async def test_a_crash_after_every_write_changes_nothing(story: Story) -> None:
    reference = await undisturbed(story)
    assert reference.api.writes

    for k in range(1, len(reference.api.writes) + 1):
        world = TrainingWorld(KINDS, story, MemoryApi(Faults(crash_after=k)))
        await world.begin()
        await world.settle()
        await check(world, reference)


async def test_conflicts_lost_answers_and_lost_events_change_nothing(story: Story) -> None:
    reference = await undisturbed(story)

    for k in range(0, len(reference.api.writes), 2):
        world = TrainingWorld(KINDS, story)
        await world.begin()
        while len(world.api.writes) < k and (world.deliver() or await world.work() or world.kubelet()):
            pass
        world.api.faults = Faults(conflicts=1, lost_answers=1)
        await world.work()
        world.lose_events()
        world.kubelet()
        world.drop_events(2)
        await check(world, reference)


async def test_children_are_named_after_their_owner(story: Story) -> None:
    world = await undisturbed(story)

    for ref, obj in world.api.objects.items():
        labels = obj["metadata"].get("labels") or {}
        if OWNER_NAME in labels and ref.plural != "pods":
            assert ref.name.startswith(labels[OWNER_NAME])
