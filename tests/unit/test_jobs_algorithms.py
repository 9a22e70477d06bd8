"""What a policy job hands to its pods, waits for and says, by algorithm."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_operator.kinds.base import Key
from rlhf_operator.kinds.training.upstream import references
from rlhf_trainer.config import Algorithm
from rlhf_trainer.wire import AttemptConfig
from tests.unit.jobs_world import ALGORITHMS, World, algorithm_spec, digest, reward_spec, success

KIND = "PolicyOptimizationJob"
JUDGE = {"uri": "pvc://models/safety-filter.json", "digest": digest("5")}
SUITE = {"uri": "pvc://models/suite.jsonl", "digest": digest("6"), "maxViolationRate": 0.05}
AUDIT = {"jobRef": {"name": "audit"}}
READ = {
    "PPO": {"rewardModel"},
    "GRPO": {"rewardModel"},
    "RLOO": {"rewardModel"},
    "ReinforcePlusPlus": {"rewardModel"},
    "BestOfN": {"rewardModel"},
    "DPO": {"preferences"},
    "KTO": {"preferences"},
    "SFT": {"demonstrations"},
    "Distillation": {"teacher"},
}
ALWAYS = {"policy", "prompts"}


def started(algorithm: str, **changes: Any) -> World:
    """The job with everything it may wait for."""
    world = World(algorithm_spec(algorithm, **changes), kind=KIND)
    world.upstream("rm", "e", lineage={"preferences": digest("1")})
    world.upstream("audit", "8", lineage={"preferences": digest("7")})
    world.upstream("teacher", "9", kind=KIND)
    world.tick()
    return world


def config_of(world: World, attempt: int = 1) -> AttemptConfig:
    found = world.children["ConfigMap"][f"rm-tune-a{attempt}"]
    return AttemptConfig.model_validate_json(found["data"]["attempt.json"])


def located(config: AttemptConfig) -> set[str]:
    fields = {
        "policy": config.policy,
        "prompts": config.prompts,
        "rewardModel": config.reward_model,
        "auditRewardModel": config.audit_reward_model,
        "preferences": config.preferences,
        "demonstrations": config.demonstrations,
        "teacher": config.teacher,
        "safetyFilter": config.safety_filter,
        "safetySuite": config.safety_suite,
    }
    return {name for name, found in fields.items() if found is not None and found.digest is not None}


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_pods_get_what_the_algorithm_reads_and_the_lineage_names_it(algorithm: Algorithm) -> None:
    world = started(algorithm)
    assert located(config_of(world)) == ALWAYS | READ[algorithm]
    assert set(world.status["lineage"]) == ALWAYS | READ[algorithm] | {"config"}
    assert set(world.status["inputs"]) == ALWAYS | READ[algorithm]
    judged = started(algorithm, auditRewardModel=AUDIT, evaluation={"safetyFilter": JUDGE, "safetySuite": SUITE})
    judges = {"auditRewardModel", "safetyFilter", "safetySuite"}
    assert located(config_of(judged)) == ALWAYS | READ[algorithm] | judges
    assert set(judged.status["lineage"]) == ALWAYS | READ[algorithm] | judges | {"config"}
    assert judged.status["lineage"]["auditRewardModel"] == digest("8")


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_config_digest_chains_everything_that_shapes_the_weights(algorithm: Algorithm) -> None:
    def config(**changes: Any) -> str:
        return config_of(started(algorithm, **changes)).config_digest

    same = config()
    for name in ALWAYS | READ[algorithm]:
        assert config(**{name: {"uri": "pvc://models/other", "digest": digest("0")}}) != same, name
    assert config(auditRewardModel=AUDIT) == same, "an audit judges and shapes nothing"
    judged = config(evaluation={"safetyFilter": JUDGE})
    assert config(evaluation={"safetyFilter": JUDGE, "safetySuite": SUITE}) == judged, "so does a suite"
    assert config(training={**ALGORITHMS[algorithm].get("training", {}), "steps": 7}) != same
    told = {**ALGORITHMS[algorithm].get("training", {}), "lossNormalization": "token"}
    assert config(training=told) == same, "a default is the same whether the user or the server wrote it"
    assert config(output={"uri": "pvc://artifacts/elsewhere"}, trainer={"numNodes": 1}) == same


def test_a_student_waits_for_a_validated_teacher() -> None:
    world = World(algorithm_spec("Distillation"), kind=KIND)
    assert references(world.primary) == {Key(KIND, "ml", "teacher")}
    world.upstream("teacher", kind="RewardModelJob")  # a namesake of another kind teaches nothing
    world.tick()
    assert "PolicyOptimizationJob teacher, which does not exist" in world.condition("Progressing")["message"]
    complete = [
        {"type": "Complete", "status": "True"},
        {"type": "Validated", "status": "Unknown", "message": "nothing judges this policy"},
    ]
    world.upstream("teacher", kind=KIND, conditions=complete)
    world.tick()
    assert world.holds("Progressing") == ("False", "WaitingForUpstream")
    told = world.condition("Progressing")["message"]
    assert told.endswith("completed without being Validated: nothing judges this policy")
    assert not world.children["Job"]
    world.upstream("teacher", "9", kind=KIND)
    world.tick()
    assert world.status["lineage"]["teacher"] == digest("9")
    assert config_of(world).teacher is not None


TUNED = {"jobRef": {"name": "sft"}}


@pytest.mark.parametrize(
    ("world", "field", "infix"),
    [
        (World(algorithm_spec("PPO", policy=TUNED), kind=KIND), "policy", "tune"),
        (World(reward_spec(baseModel=TUNED)), "baseModel", "train"),
    ],
    ids=["policy", "base of a reward model"],
)
def test_what_another_job_tuned_is_where_training_starts(world: World, field: str, infix: str) -> None:
    """SFT, then a reward model and PPO on its policy: a chain by names, pinned by digests."""
    assert Key(KIND, "ml", "sft") in references(world.primary)
    world.upstream("rm", "e")
    world.tick()
    assert f"spec.{field} waits for {KIND} sft, which does not exist" in world.condition("Progressing")["message"]
    assert not world.children["Job"]
    world.upstream("sft", "9", kind=KIND)
    world.tick()
    assert world.status["lineage"][field] == digest("9")
    config = AttemptConfig.model_validate_json(world.children["ConfigMap"][f"rm-{infix}-a1"]["data"]["attempt.json"])
    assert (config.policy or config.base_model) is not None
    world.run_pods()
    world.upstream("sft", "8", kind=KIND)
    world.tick()
    assert world.holds("Accepted") == ("False", "DigestMismatch")


def test_a_teacher_that_changes_under_its_name_is_an_error() -> None:
    world = started("Distillation")
    world.run_pods()
    world.upstream("teacher", "8", kind=KIND)
    world.tick()
    assert world.holds("Accepted") == ("False", "DigestMismatch")
    assert "PolicyOptimizationJob teacher now holds" in world.condition("Accepted")["message"]


@pytest.mark.parametrize("algorithm", ["DPO", "KTO"])
def test_an_audit_that_learned_from_the_same_preferences_is_refused(algorithm: str) -> None:
    own = ALGORITHMS[algorithm]["preferences"]["digest"]
    world = World(algorithm_spec(algorithm, auditRewardModel=AUDIT), kind=KIND)
    world.upstream("audit", "8", lineage={"preferences": own})
    world.tick()
    assert world.holds("Accepted") == ("False", "InvalidData")
    assert f"trained on the same preferences as this policy, {own}" in world.condition("Accepted")["message"]
    world.upstream("audit", "8", lineage={"preferences": digest("0")})
    world.tick()
    assert world.status["attempt"] == 1


@pytest.mark.parametrize(
    ("algorithm", "changes", "judged"),
    [
        ("SFT", {}, False),
        ("DPO", {}, False),
        ("Distillation", {}, False),
        ("SFT", {"auditRewardModel": AUDIT}, True),
        ("KTO", {"evaluation": {"safetyFilter": JUDGE}}, True),
        ("GRPO", {}, True),  # by its own reward model, which the verdict says
    ],
)
def test_success_without_a_judge_is_not_validated_and_says_so_from_the_start(
    algorithm: str, changes: dict[str, Any], judged: bool
) -> None:
    world = started(algorithm, **changes)
    assert world.holds("Validated") == ("Unknown", "NotYet")
    assert ("nothing judges this policy" in world.condition("Validated")["message"]) != judged
    world.run_pods()
    world.complete(success(verdicts=[]))
    assert world.phase == "Succeeded"
    assert world.holds("Validated") == ("Unknown", "OutcomeUnknown")
    told = world.condition("Validated")["message"]
    assert "no evidence is not a pass" in told
    assert ("nothing judges this policy" in told) != judged


@pytest.mark.parametrize("nodes", [1, 4])
def test_another_world_size_while_suspended_is_another_attempt_of_the_same_run(nodes: int) -> None:
    world = started("GRPO", trainer={"numNodes": 2})
    world.run_pods()
    world.report(step=3)
    before = config_of(world)
    world.edit(suspend=True)
    world.children["Pod"].clear()
    world.tick()
    assert world.phase == "Suspended"
    world.edit(suspend=False, trainer={"numNodes": nodes})
    assert world.holds("Accepted")[0] == "True"
    assert world.status["attempt"] == 2
    after = config_of(world, 2)
    assert (before.world_size, after.world_size) == (2, nodes)
    assert after.config_digest == before.config_digest, "else its checkpoints would be refused"
    assert (after.output.path, after.attempt) == (before.output.path, 2)
    assert world.job["spec"]["completions"] == nodes
    world.run_pods()
    world.report(step=5, world_size=nodes, attempt=2)
    assert world.status["progress"]["worldSize"] == nodes
    assert world.phase == "Running"


def test_the_samples_of_a_prompt_stay_together() -> None:
    """24 rows would divide over 2 ranks and 2 mini batches, 6 groups do not."""
    world = started("GRPO", training={"algorithm": "GRPO", "promptsPerStep": 6, "samplesPerPrompt": 4})
    assert world.holds("Accepted") == ("False", "InvalidData")
    told = world.condition("Accepted")["message"]
    assert "promptsPerStep of 6 is not divisible by the world size of 2 times 2" in told


@pytest.mark.parametrize("metric", ["zeroVarianceFraction", "clippedFraction", "rewardStd"])
def test_a_breach_of_any_guardrail_is_a_condition(metric: str) -> None:
    guardrail = {"metric": metric, "above": 0.9, "action": "Alert"}
    world = started("GRPO", guardrails=[guardrail])
    world.run_pods()
    world.report(step=1)
    assert world.holds("GuardrailsHealthy")[0] == "True"
    breach = {"metric": metric, "state": "Breached", "value": 1.0, "sinceStep": 2, "action": "Alert"}
    world.report(step=7, guardrails=[breach], metrics={"lambdaSafety": 2.5})
    assert world.holds("GuardrailsHealthy") == ("False", "GuardrailBreached")
    assert f"{metric} is out of bounds since step 2" in world.condition("GuardrailsHealthy")["message"]


def test_mini_batches_are_of_the_online_algorithms() -> None:
    odd = {"promptsPerStep": 6, "ppo": {"miniBatches": 2}}
    assert started("DPO", training={"algorithm": "DPO", **odd}).status["attempt"] == 1
    world = started("PPO", training=odd, trainer={"numNodes": 6})
    assert (
        "promptsPerStep of 6 is not divisible by the world size of 6 times 2" in world.condition("Accepted")["message"]
    )


def test_no_verdict_of_a_long_gate_is_lost() -> None:
    world = started("GRPO")
    world.run_pods()
    verdicts = [{"metric": f"aspectAccuracy/{n}", "state": "Pass", "n": 9} for n in range(23)]
    world.complete(success(verdicts=verdicts))
    assert len(world.status["verdicts"]) == 23
    assert world.holds("Validated")[0] == "True"
