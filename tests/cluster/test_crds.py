"""The CRDs on a real API server: defaults, immutability, strictness, and how they read in kubectl."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec
from rlhf_operator.api.reward_model_job import RewardModelJob
from tests.cluster.rest import Rest
from tests.cluster.samples import CRDS, DELETED, EXAMPLES, Body, changed, example, text

RM, PPO, ROLLOUT = "reward-model-job", "policy-optimization-job", "policy-rollout"
JOBS = (RM, PPO)
OTHER = "sha256:" + "9" * 64


@pytest.fixture(scope="module", autouse=True)
def crds(control_plane) -> None:
    control_plane.install_crds(CRDS)


class Objects:
    """Objects of one namespace."""

    def __init__(self, kubectl: Any, rest: Rest, namespace: str) -> None:
        self._kubectl = kubectl
        self._rest = rest
        self._namespace = namespace

    def __call__(self, *words: str, **options: Any) -> Any:
        return self._kubectl("-n", self._namespace, *words, **options)

    def create(self, body: Body, *, status: Body | None = None) -> Body:
        self("apply", "--server-side", "-f", "-", input=text(body))
        name = f"{body['kind']}/{body['metadata']['name']}"
        if status is not None:
            self("patch", name, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
        live: Body = json.loads(self("get", name, "-o", "json").stdout)
        return live

    def refusal(self, body: Body) -> str:
        """What the server says to a new version of an object; empty if it takes it."""
        return self._rest.apply(body, self._namespace)


@pytest.fixture(scope="module")
def rest(control_plane, tmp_path_factory) -> Rest:
    return Rest(control_plane.kubeconfig, tmp_path_factory.mktemp("rest"))


@pytest.fixture
def objects(kubectl, rest: Rest, namespace) -> Objects:
    return Objects(kubectl, rest, namespace)


@pytest.mark.parametrize("file", sorted(path.name for path in EXAMPLES.rglob("*.yaml")))
def test_every_example_is_accepted(control_plane, kubectl, namespace, file: str) -> None:
    # A Decision is accepted from its author only.
    author = yaml.safe_load((EXAMPLES / file).read_text())["spec"].get("by", "admin")
    control_plane.user(author, groups=["system:masters"])

    words = ["-n", namespace, "create", "--dry-run=server", "--validate=strict", "-f", str(EXAMPLES / file)]
    assert "created (" in kubectl(*words, user=author).stdout


CONDITION = {"observedGeneration": 1, "lastTransitionTime": "2026-01-02T03:04:05Z"}
VALIDATED = {**CONDITION, "type": "Validated", "status": "True", "reason": "Passed"}
STATUSES: dict[str, Body] = {
    RM: {
        "phase": "Succeeded",
        "conditions": [{**VALIDATED, "message": "held-out accuracy 0.71 [0.67, 0.75] over 400 pairs"}],
        "attempt": 1,
    },
    PPO: {"phase": "Running", "attempt": 2, "restarts": 1},
    ROLLOUT: {"phase": "Progressing", "stage": 2, "weights": {"desired": 10, "written": 10}},
}


def test_nested_defaults_fire_and_match_the_models(objects) -> None:
    minimal = changed(
        example(RM),
        {f"spec.{field}": DELETED for field in ("training", "trainer", "checkpoints", "validation", "failurePolicy")},
    )

    spec = objects.create(minimal)["spec"]

    model = RewardModelJob.model_validate(minimal)
    expected = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))["spec"]
    assert expected["training"].pop("aspects") == []  # empty lists are no defaults: absent means the same
    assert spec["training"] == expected["training"]
    assert spec["training"]["deepspeed"] == {"zeroStage": 2}
    assert spec["checkpoints"] == expected["checkpoints"]
    assert spec["validation"] == expected["validation"]
    assert spec["trainer"]["numNodes"] == 1
    assert spec["trainer"]["numProcPerNode"] == "auto"
    assert spec["suspend"] is False


def test_a_status_is_stored_as_written_without_defaults(objects) -> None:
    status = {"phase": "Running", "attempt": 1, "attempts": [{"number": 1, "startedAt": "2026-01-02T03:04:05Z"}]}

    live = objects.create(example(RM), status=status)

    assert live["status"] == status


def test_a_status_in_a_new_object_is_ignored(objects) -> None:
    live = objects.create({**example(RM), "status": {"phase": "Succeeded"}})

    assert "status" not in live


RUNNING = {"phase": "Running", "attempt": 1}
SUSPENDED = {"phase": "Suspended", "attempt": 1}
FIXED = {
    RM: {
        "spec.baseModel.digest": OTHER,
        "spec.preferences.uri": "pvc://feedback/desk-v2.jsonl",
        "spec.training.epochs": 3,
        "spec.training.deepspeed.zeroStage": 3,
        "spec.validation.minAccuracy": 0.5,
        "spec.validation.humanScores": DELETED,
        "spec.output.uri": "pvc://artifacts/other",
    },
    PPO: {
        "spec.policy.digest": OTHER,
        "spec.rewardModel": {"jobRef": {"name": "other-rm"}},
        "spec.auditRewardModel": DELETED,
        "spec.prompts.digest": OTHER,
        "spec.training.steps": 10,
        "spec.guardrails": DELETED,
        "spec.evaluation.minWinRate": 0.1,
        "spec.output.uri": "pvc://artifacts/other",
    },
}
KEPT = {
    "dpo": {"spec.preferences.digest": OTHER, "spec.auditRewardModel": DELETED, "spec.training.dpo.beta": 0.2},
    "sft": {"spec.demonstrations.uri": "pvc://feedback/more.jsonl", "spec.training.lora.rank": 8},
    "distillation": {
        "spec.policy": {"jobRef": {"name": "other-sft"}},
        "spec.teacher.jobRef.name": "other-ppo",
        "spec.evaluation.minWinRate": 0.4,
    },
}
EDITABLE = {
    "spec.trainer.numNodes": 1,
    "spec.trainer.env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
    "spec.failurePolicy.maxRestarts": 9,
    "spec.preRunningDeadlineSeconds": 1800,
    "spec.activeDeadlineSeconds": 3600,
    "spec.budget": {"gpuHours": 128},
}


@pytest.mark.parametrize("file", JOBS)
@pytest.mark.parametrize("suspended", [False, True], ids=["running", "suspended"])
def test_data_model_and_training_never_change(objects, file: str, suspended: bool) -> None:
    body = changed(example(file), {"spec.suspend": suspended})
    objects.create(body, status=SUSPENDED if suspended else RUNNING)

    for path, value in FIXED[file].items():
        expected = f"spec.{path.split('.')[1]} is immutable: a new run is a new name, create another job"
        assert expected in objects.refusal(changed(body, {path: value})), path


@pytest.mark.parametrize("file", KEPT)
def test_what_an_algorithm_learns_from_never_changes(objects, file: str) -> None:
    body = changed(example(file), {"spec.suspend": True})
    objects.create(body, status=SUSPENDED)

    for path, value in KEPT[file].items():
        assert f"spec.{path.split('.')[1]} is immutable" in objects.refusal(changed(body, {path: value})), path
    # The algorithm cannot change by swapping what it learns from either.
    swapped = {"spec.training.algorithm": "KTO", "spec.preferences": {"uri": "pvc://f/x.jsonl", "digest": OTHER}}
    assert "immutable" in objects.refusal(changed(body, swapped))
    assert objects.refusal(changed(body, {"spec.trainer.numNodes": 4})) == ""


@pytest.mark.parametrize("file", ["policy-optimization-job", "grpo", "dpo", "kto", "sft", "lagrangian", "distillation"])
def test_the_operator_reads_what_the_server_stores(objects, file: str) -> None:
    """Defaults written by the server are the models' own, so both compute one config digest."""
    body = example(file)

    stored = objects.create(body)["spec"]

    assert PolicyOptimizationJobSpec.model_validate(stored) == PolicyOptimizationJobSpec.model_validate(body["spec"])


def test_pods_and_limits_do_not_change_while_pods_run(objects) -> None:
    body = example(RM)
    objects.create(body, status=RUNNING)

    for path, value in EDITABLE.items():
        expected = f"spec.{path.split('.')[1]} changes only while the job is suspended or before its first attempt"
        assert expected in objects.refusal(changed(body, {path: value})), path


def test_the_way_to_the_data_changes_while_nothing_runs_and_the_data_never(objects) -> None:
    """A Secret is renewed, a store moves; what is read is pinned by its digest."""
    body = example("reward-model-job-s3")
    objects.create(body, status=RUNNING)

    for change in ({"spec.objectStore.secretRef.name": "newer"}, {"spec.objectStore": DELETED}):
        assert "spec.objectStore changes only while the job is suspended" in objects.refusal(changed(body, change))
    suspended = changed(body, {"metadata.name": "moved", "spec.suspend": True})
    objects.create(suspended, status=SUSPENDED)
    assert objects.refusal(changed(suspended, {"spec.objectStore.secretRef.name": "newer"})) == ""
    assert "spec.preferences is immutable" in objects.refusal(changed(body, {"spec.preferences.uri": "s3://b/x"}))


def test_a_store_may_hold_a_safety_suite_alone(objects) -> None:
    suite = {"uri": "s3://red-team/suite.jsonl", "digest": "sha256:" + "6" * 64, "maxViolationRate": 0.05}
    stored = changed(example("dpo"), {"spec.objectStore": {"secretRef": {"name": "s"}}})
    assert "this job has none" in objects.refusal(stored)
    assert objects.refusal(changed(stored, {"spec.evaluation.safetySuite": suite})) == ""


@pytest.mark.parametrize("file", JOBS)
def test_pods_and_limits_change_while_nothing_runs(objects, file: str) -> None:
    new = example(file)
    suspending = changed(new, {"metadata.name": "suspending", "spec.suspend": True})
    stopped_by_a_guardrail = changed(new, {"metadata.name": "stopped"})
    objects.create(new)
    objects.create(suspending, status=RUNNING)  # it was asked for; its pods are still ending
    objects.create(stopped_by_a_guardrail, status=SUSPENDED)

    for body in (new, suspending, stopped_by_a_guardrail):
        assert objects.refusal(changed(body, EDITABLE)) == "", body["metadata"]["name"]


def test_suspending_and_a_ttl_are_always_possible(objects) -> None:
    body = example(RM)
    objects.create(body, status=RUNNING)

    assert objects.refusal(changed(body, {"spec.suspend": True, "spec.ttlSecondsAfterFinished": 5})) == ""


def test_resuming_and_editing_at_once_is_an_edit_while_suspended(objects) -> None:
    body = changed(example(RM), {"spec.suspend": True})
    objects.create(body, status=SUSPENDED)

    assert objects.refusal(changed(body, {"spec.suspend": False, "spec.trainer.numNodes": 1})) == ""


def test_a_rollout_moves_on_to_another_policy_but_keeps_its_conversations(objects) -> None:
    body = example(ROLLOUT)
    objects.create(body, status={"phase": "Healthy"})

    assert objects.refusal(changed(body, {"spec.policy.jobRef.name": "better-ppo", "spec.paused": True})) == ""
    refusal = objects.refusal(changed(body, {"spec.routing.conversationKey.header": "X-Other"}))
    assert "conversationKey is immutable" in refusal


def test_unknown_fields_are_refused_for_strict_and_pruned_for_lenient_clients(objects) -> None:
    body = changed(example(RM), {"spec.training.learningrate": 1})

    strict = objects("create", "-f", "-", input=text(body), check=False)
    objects("create", "--validate=ignore", "-f", "-", input=text(body))

    assert 'unknown field "spec.training.learningrate"' in strict.stderr
    live = json.loads(objects("get", "rmj", "helpful-rm", "-o", "json").stdout)
    assert "learningrate" not in live["spec"]["training"]


def test_a_pod_template_keeps_what_the_schema_does_not_know(objects) -> None:
    template = {"spec": {"tolerations": [{"key": "gpu", "operator": "Exists"}], "priorityClassName": "high"}}

    live = objects.create(changed(example(RM), {"spec.trainer.podTemplate": template}))

    assert live["spec"]["trainer"]["podTemplate"] == template


def test_they_read_well_in_kubectl(objects) -> None:
    for file, status in STATUSES.items():
        objects.create(example(file), status=status)

    listed = objects("get", "rlhf").stdout
    assert "rewardmodeljob.rlhf.dev/helpful-rm" in listed
    assert "policyoptimizationjob.rlhf.dev/helpful-ppo" in listed
    assert "policyrollout.rlhf.dev/desk" in listed
    for short, name in (("rmj", "helpful-rm"), ("poj", "helpful-ppo"), ("pr", "desk")):
        assert name in objects("get", short).stdout

    described = objects("describe", "rmj", "helpful-rm").stdout
    assert "held-out accuracy 0.71 [0.67, 0.75]" in described
    assert "Learning Rate:" in described


def test_explain_says_what_every_field_is_for(kubectl) -> None:
    text = kubectl("explain", "rewardmodeljob.spec.training.ensemble.members").stdout
    assert "Number of ensemble members K." in text
    assert "to imitate (SFT)" in kubectl("explain", "poj.spec.demonstrations").stdout
    assert "Kahneman-Tversky" in kubectl("explain", "poj.spec.training.kto").stdout
    assert "enum: FailJob, Restart, Ignore" in kubectl("explain", "poj.spec.failurePolicy.rules").stdout
