"""Every malformed object is refused by the API server, with words that name the field and what to do."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from rlhf_operator.kinds import reward_model_job
from rlhf_operator.kinds.base import Observed, Settings
from rlhf_operator.kinds.training.claims import claim_key
from tests.cluster.policy_cases import FAMILIES, POLICY_CASES, SELF_REFERENCES, Case
from tests.cluster.rest import Rest
from tests.cluster.samples import CRDS, DELETED, changed, example
from tests.property import cluster

RM, PPO, ROLLOUT = "reward-model-job", "policy-optimization-job", "policy-rollout"
S3 = "reward-model-job-s3"
APPROVE, ACKNOWLEDGE = "decision-approve", "decision-acknowledge"
DIGEST = "sha256:" + "9" * 64
STORED = {"uri": "s3://bucket/key", "digest": DIGEST}
STORE = {"secretRef": {"name": "desk-store"}}


def env(name: str) -> dict[str, Any]:
    return {"spec.trainer.env": [{"name": name, "value": "1"}]}


def serving(**fields: Any) -> dict[str, Any]:
    return {"spec.serving": fields}


def endpoint(value: str) -> dict[str, Any]:
    return {"spec.objectStore.endpoint": value}


def containers(value: Any) -> dict[str, Any]:
    return {"spec.trainer.podTemplate.spec.containers": value}


RESERVED = ("spec.trainer.env[0].name", "set by the operator and torchrun: remove the variable")
DIGEST_FORM = "must be sha256: followed by 64 lower-case hex digits"
CLAIM_FORM = "must be pvc://<claim>/<path>, where"
INPUT_FORM = "must be pvc://<claim>/<path> or s3://<bucket>/<key>"
ON_VOLUMES = "s3:// is for inputs of training jobs alone"

STORE_CASES = [
    Case("a run into a bucket", RM, {"spec.output.uri": "s3://b/k"}, ("spec.output.uri", CLAIM_FORM, ON_VOLUMES)),
    Case("a policy in a bucket", ROLLOUT, {"spec.policy": STORED}, ("spec.policy.uri", ON_VOLUMES)),
    Case("a filter in a bucket", ROLLOUT, {"spec.safetyFilter": STORED}, ("spec.safetyFilter.uri", ON_VOLUMES)),
    Case("an object without a key", S3, {"spec.baseModel.uri": "s3://models"}, ("spec.baseModel.uri", INPUT_FORM)),
    Case("an object of no bucket", S3, {"spec.preferences.uri": "s3:///x"}, ("spec.preferences.uri", INPUT_FORM)),
    Case("a key that climbs", S3, {"spec.preferences.uri": "s3://b/../x"}, ("spec.preferences.uri", "with a dot")),
    Case("a key with a hole", S3, {"spec.preferences.uri": "s3://b/a//x"}, ("spec.preferences.uri", INPUT_FORM)),
    Case("a prefix with a slash", S3, {"spec.baseModel.uri": "s3://b/a/"}, ("spec.baseModel.uri", INPUT_FORM)),
    Case("a signed address", S3, {"spec.baseModel.uri": "s3://b/x?sig=1"}, ("spec.baseModel.uri", INPUT_FORM)),
    Case(
        "a secret in an address",
        S3,
        {"spec.preferences.uri": "s3://key:secret@b/x"},
        ("spec.preferences.uri", "credentials go into the Secret that spec.objectStore.secretRef names"),
    ),
    Case("scores in no bucket", RM, {"spec.validation.humanScores.uri": "s3://"}, ("humanScores.uri", "s3://")),
    Case("an object without its digest", S3, {"spec.preferences.digest": DELETED}, ("preferences.digest: Required",)),
    Case("a stored model without its digest", S3, {"spec.baseModel.digest": DELETED}, ("is not an identity",)),
    Case("a store of nothing", S3, {"spec.objectStore": {}}, ("spec.objectStore", "name an endpoint, a region or a")),
    Case("a store nothing is in", RM, {"spec.objectStore": STORE}, ("spec.objectStore", "this job has none: name one")),
    Case("a store no policy is in", PPO, {"spec.objectStore": STORE}, ("spec.objectStore", "this job has none")),
    Case("an endpoint with a path", S3, endpoint("https://h/minio"), ("objectStore.endpoint", "without a path")),
    Case("an endpoint with a secret", S3, endpoint("https://a:b@h"), ("objectStore.endpoint", "without credentials")),
    Case("an endpoint of files", S3, endpoint("file://x"), ("objectStore.endpoint", "http(s)://<host>[:<port>]")),
    Case("a region in words", S3, {"spec.objectStore.region": "the north"}, ("spec.objectStore.region",)),
    Case("a Secret elsewhere", S3, {"spec.objectStore.secretRef.name": "ns/x"}, ("secretRef.name", "of a Secret in")),
    Case("keys in the spec", S3, {"spec.objectStore.accessKey": "x"}, ('unknown field "spec.objectStore.accessKey"',)),
    Case("credentials twice", S3, env("AWS_SECRET_ACCESS_KEY"), ("spec.trainer.env", "remove it from one of them")),
]

CASES = [
    # names
    Case("name too long", RM, {"metadata.name": "a" * 41}, ("metadata.name must be at most 40 characters",)),
    Case("name with a dot", RM, {"metadata.name": "a.b"}, ("metadata.name must be at most 40 characters of a-z",)),
    Case("name starting with a digit", ROLLOUT, {"metadata.name": "1a"}, ("start with a letter",)),
    # unknown, missing and mistyped
    Case("misspelt field", RM, {"spec.training.learningrate": 1}, ('unknown field "spec.training.learningrate"',)),
    Case("unknown field in an env entry", RM, {"spec.trainer.env": [{"name": "A", "valueFrom": {}}]}, ("valueFrom",)),
    Case("no base model", RM, {"spec.baseModel": DELETED}, ("spec.baseModel: Required value",)),
    Case("no preferences", RM, {"spec.preferences": DELETED}, ("spec.preferences: Required value",)),
    Case("no output", RM, {"spec.output": DELETED}, ("spec.output: Required value",)),
    Case("no spec", RM, {"spec": DELETED}, ("spec: Required value",)),
    Case("no prompts", PPO, {"spec.prompts": DELETED}, ("spec.prompts: Required value",)),
    Case("no stages", ROLLOUT, {"spec.stages": DELETED}, ("spec.stages: Required value",)),
    Case("text for a number", RM, {"spec.training.epochs": "two"}, ("spec.training.epochs", "must be of type integer")),
    Case("a list for an object", RM, {"spec.trainer": []}, ("spec.trainer", "must be of type object")),
    # identity
    Case("no digest", RM, {"spec.preferences.digest": DELETED}, ("spec.preferences.digest: Required value",)),
    Case("a base without its digest", RM, {"spec.baseModel.digest": DELETED}, ("spec.baseModel", "is not an identity")),
    Case("digest of another algorithm", RM, {"spec.preferences.digest": "md5:00"}, ("spec.preferences", DIGEST_FORM)),
    Case("digest cut off", RM, {"spec.baseModel.digest": DIGEST[:-1]}, ("spec.baseModel.digest", DIGEST_FORM)),
    Case(
        "digest in capitals", PPO, {"spec.prompts.digest": "sha256:" + "A" * 64}, ("spec.prompts.digest", DIGEST_FORM)
    ),
    Case("digest too long", RM, {"spec.baseModel.digest": DIGEST + "0"}, ("spec.baseModel.digest: Too long",)),
    Case("a path for a uri", RM, {"spec.output.uri": "/data"}, ("spec.output.uri", CLAIM_FORM)),
    Case("a scheme not yet read", RM, {"spec.baseModel.uri": "gs://b/k"}, ("spec.baseModel.uri", INPUT_FORM)),
    Case("a path that climbs", PPO, {"spec.policy.uri": "pvc://m/../x"}, ("spec.policy.uri", "starts with a dot")),
    Case("credentials in a uri", PPO, {"spec.policy.uri": "pvc://me:pw@m/x"}, ("spec.policy.uri", INPUT_FORM)),
    *STORE_CASES,
    # one of
    Case(
        "no reward model at all", PPO, {"spec.rewardModel": {}}, ("spec.rewardModel", "exactly one of jobRef and uri")
    ),
    Case(
        "two reward models",
        PPO,
        {"spec.rewardModel.uri": "pvc://a/b", "spec.rewardModel.digest": DIGEST},
        ("spec.rewardModel", "exactly one of jobRef and uri: jobRef waits for that job"),
    ),
    Case(
        "a policy without its digest",
        ROLLOUT,
        {"spec.policy": {"uri": "pvc://a/b"}},
        ("spec.policy", "a uri without its digest is not an identity"),
    ),
    Case("a reference to nothing", ROLLOUT, {"spec.policy.jobRef.name": ""}, ("spec.policy.jobRef.name", "object")),
    Case(
        "an audit by the judge itself",
        PPO,
        {"spec.auditRewardModel.jobRef.name": "helpful-rm"},
        ("spec", "auditRewardModel must not be rewardModel"),
    ),
    # training
    Case("ZeRO stage 4", RM, {"spec.training.deepspeed.zeroStage": 4}, ("zeroStage", "less than or equal to 3")),
    Case("learning rate 0", RM, {"spec.training.learningRate": 0}, ("spec.training.learningRate", "greater than 0")),
    Case("holdout of everything", RM, {"spec.training.holdoutFraction": 1}, ("holdoutFraction", "less than 1")),
    Case("no ensemble", RM, {"spec.training.ensemble.members": 0}, ("members", "greater than or equal to 1")),
    Case("unknown algorithm", PPO, {"spec.training.algorithm": "A2C"}, ("algorithm", 'supported values: "PPO"')),
    Case("unknown calibration", RM, {"spec.training.calibration": "platt"}, ("calibration", '"temperature", "none"')),
    Case("temperature 0", PPO, {"spec.training.generation.temperature": 0}, ("temperature", "greater than 0")),
    Case(
        "a batch that does not divide",
        RM,
        {"spec.trainer.numProcPerNode": 3},
        ("training.globalBatchSize must be divisible by trainer.numNodes x trainer.numProcPerNode",),
    ),
    Case(
        "prompts that do not divide",
        PPO,
        {"spec.trainer.numProcPerNode": 5},
        ("training.promptsPerStep must be divisible",),
    ),
    Case(
        "a length bias against nothing",
        RM,
        {"spec.validation.maxLengthBias": 0.2, "spec.validation.humanScores": DELETED},
        ("spec.validation.maxLengthBias", "name validation.humanScores, or remove it"),
    ),
    Case("an aspect twice", RM, {"spec.training.aspects": ["tone", "tone"]}, ("aspects", "name an aspect twice")),
    Case("an aspect in words", RM, {"spec.training.aspects": ["Tone of it"]}, ("spec.training.aspects[0]",)),
    Case("a gap in percent", RM, {"spec.validation.maxCohortGap": 5}, ("maxCohortGap", "less than or equal to 1")),
    Case("a Brier score in percent", RM, {"spec.validation.maxBrierScore": 25}, ("maxBrierScore", "or equal to 1")),
    Case("probes in percent", RM, {"spec.validation.minProbePassRate": 90}, ("minProbePassRate", "or equal to 1")),
    Case("accuracy above 1", RM, {"spec.validation.minAccuracy": 65}, ("minAccuracy", "less than or equal to 1")),
    # no number of clean replies shows a rate of 0
    Case("no violation at all", PPO, {"spec.evaluation.maxViolationRate": 0}, ("maxViolationRate", "greater than 0")),
    Case("a win rate in percent", PPO, {"spec.evaluation.minWinRate": 55}, ("minWinRate", "less than or equal to 1")),
    Case("an unknown opponent", PPO, {"spec.evaluation.against": "gpt"}, ("evaluation.against", '"policy"')),
    Case("an unknown guardrail metric", PPO, {"spec.guardrails.0.metric": "joy"}, ("guardrails[0].metric", '"kl"')),
    # pods
    Case("no nodes", RM, {"spec.trainer.numNodes": 0}, ("spec.trainer.numNodes", "greater than or equal to 1")),
    Case("half a process", RM, {"spec.trainer.numProcPerNode": "half"}, ("numProcPerNode", "from 1 to 64, or auto")),
    Case("too many processes", RM, {"spec.trainer.numProcPerNode": 65}, ("numProcPerNode", "from 1 to 64, or auto")),
    Case(
        "no quantity",
        RM,
        {"spec.trainer.resourcesPerNode.limits.memory": "4 GB"},
        ("spec.trainer.resourcesPerNode.limits", "such as 2, 500m or 16Gi"),
    ),
    Case("MASTER_ADDR", RM, env("MASTER_ADDR"), RESERVED),
    Case("MASTER_PORT", PPO, env("MASTER_PORT"), RESERVED),
    Case("RANK", RM, env("RANK"), RESERVED),
    Case("LOCAL_RANK", RM, env("LOCAL_RANK"), RESERVED),
    Case("WORLD_SIZE", RM, env("WORLD_SIZE"), RESERVED),
    Case("PET_NNODES", RM, env("PET_NNODES"), RESERVED),
    Case("TORCHELASTIC_RUN_ID", PPO, env("TORCHELASTIC_RUN_ID"), RESERVED),
    Case("RLHF_ANYTHING", PPO, env("RLHF_ANYTHING"), RESERVED),
    Case("an environment name with a dash", RM, env("A-B"), ("spec.trainer.env[0].name",)),
    Case(
        "a variable twice",
        RM,
        {"spec.trainer.env": [{"name": "A"}, {"name": "A"}]},
        ("spec.trainer.env[1]: Duplicate value",),
    ),
    # pod templates: the outline here, the rest when the pods are created (below)
    Case("a template of text", RM, {"spec.trainer.podTemplate": {"spec": "x"}}, ("podTemplate.spec", "type object")),
    Case(
        "a typo in the outline", RM, {"spec.trainer.podTemplate": {"spek": {}}}, ('unknown field "spec.trainer.podTem',)
    ),
    Case("labels in a list", RM, {"spec.trainer.podTemplate": {"metadata": {"labels": ["a"]}}}, ("metadata.labels",)),
    Case("containers by name", PPO, containers({"trainer": {}}), ("podTemplate.spec.containers.trainer",)),
    Case("a container without a name", PPO, containers([{"image": "x"}]), ("containers[0].name: Required value",)),
    Case(
        "a reserved variable in a template",
        PPO,
        containers([{"name": "trainer", "env": [{"name": "RANK", "value": "1"}]}]),
        ("spec.trainer.podTemplate.spec.containers[0].env[0].name", "set by the operator and torchrun"),
    ),
    Case(
        "variables as a map",
        PPO,
        containers([{"name": "trainer", "env": {"A": "B"}}]),
        ('unknown field "spec.trainer.podTemplate.spec.containers[0].env.A"',),
    ),
    Case(
        "a container twice",
        ROLLOUT,
        {"spec.serving.podTemplate.spec.containers": [{"name": "a"}, {"name": "a"}]},
        ("spec.serving.podTemplate.spec.containers[1]: Duplicate value",),
    ),
    # policies
    Case("restarts below 0", RM, {"spec.failurePolicy.maxRestarts": -1}, ("maxRestarts", "greater than or equal to 0")),
    Case("a rule for nothing", RM, {"spec.failurePolicy.rules.0.onExitCodes": []}, ("a rule needs at least one of",)),
    Case("an unknown action", RM, {"spec.failurePolicy.rules.0.action": "Retry"}, ("rules[0].action", '"FailJob"')),
    Case("exit code 256", RM, {"spec.failurePolicy.rules.0.onExitCodes": [256]}, ("onExitCodes[0]", "equal to 255")),
    Case("a deadline of 0", RM, {"spec.activeDeadlineSeconds": 0}, ("activeDeadlineSeconds", "or equal to 1")),
    Case("a ttl below 0", RM, {"spec.ttlSecondsAfterFinished": -1}, ("ttlSecondsAfterFinished", "or equal to 0")),
    Case("an empty budget", RM, {"spec.budget": {}}, ("spec.budget", "needs gpuHours, costUSD or both")),
    Case("a budget of 0", RM, {"spec.budget.gpuHours": 0}, ("spec.budget.gpuHours", "greater than 0")),
    Case("no checkpoints kept", RM, {"spec.checkpoints.keepLast": 0}, ("spec.checkpoints.keepLast", "or equal to 1")),
    # rollouts
    Case("stages going down", ROLLOUT, {"spec.stages.1.weightPercent": 60}, ("spec", "ascending weightPercent")),
    Case("a stage of 100 %", ROLLOUT, {"spec.stages.3.weightPercent": 100}, ("weightPercent", "or equal to 99")),
    Case("weight 0 without shadow", ROLLOUT, {"spec.stages.0.shadow": False}, ("spec.stages[0]", "shadow: true")),
    Case("shadow with weight", ROLLOUT, {"spec.stages.1.shadow": True}, ("spec.stages[1]", "has weightPercent 0")),
    Case("nothing but shadow", ROLLOUT, {"spec.stages": [{"weightPercent": 0, "shadow": True}]}, ("above 0",)),
    Case("no stage", ROLLOUT, {"spec.stages": []}, ("spec.stages", "should have at least 1 items")),
    Case("stage without samples", ROLLOUT, {"spec.stages.1.minSamples": 0}, ("minSamples", "or equal to 1")),
    Case("a duration in words", ROLLOUT, {"spec.stages.1.minDuration": "1 minute"}, ("minDuration", "such as 500ms")),
    Case("an unknown approval", ROLLOUT, {"spec.stages.3.approval": "Maybe"}, ("stages[3].approval", '"Required"')),
    Case("no guardrail", ROLLOUT, {"spec.guardrails": []}, ("spec.guardrails", "should have at least 1 items")),
    Case("a guardrail twice", ROLLOUT, {"spec.guardrails.1.metric": "latencyP95"}, ("guardrails[2]: Duplicate value",)),
    Case("a margin of 0", ROLLOUT, {"spec.guardrails.0.margin": 0}, ("guardrails[0].margin", "greater than 0")),
    Case("an alpha of 0", ROLLOUT, {"spec.guardrails.0.alpha": 0}, ("guardrails[0].alpha", "greater than 0")),
    Case("a generous alpha", ROLLOUT, {"spec.guardrails.0.alpha": 0.5}, ("guardrails[0].alpha", "or equal to 0.1")),
    Case(
        "a limit of safety",
        ROLLOUT,
        {"spec.guardrails.0.limit": "1s"},
        ("guardrails[0]", "of the guardrail latencyP95"),
    ),
    Case("safety unseen", ROLLOUT, {"spec.safetyFilter": DELETED}, ("needs safetyFilter",)),
    Case("an unknown engine", ROLLOUT, serving(engine="tgi"), ("serving.engine", '"builtin", "vllm", "custom"')),
    Case("vllm without an image", ROLLOUT, serving(engine="vllm"), ("spec.serving", "need an image")),
    Case("builtin with an image", ROLLOUT, serving(image="v:1"), ("spec.serving", "builtin has the trainer's")),
    Case("builtin with arguments", ROLLOUT, serving(args=["x"]), ("spec.serving", "of the engines vllm and custom")),
    Case(
        "vllm with a command", ROLLOUT, serving(engine="vllm", image="v:1", command=["x"]), ("vllm serve takes args",)
    ),
    Case("a bad header", ROLLOUT, {"spec.routing.conversationKey.header": "X Y"}, ("conversationKey.header",)),
    # decisions
    Case("approval without a digest", APPROVE, {"spec.digest": DELETED}, ("spec.digest", "need digest")),
    Case("approval without a stage", APPROVE, {"spec.stage": DELETED}, ("spec.stage", "stage goes with Approve")),
    Case(
        "approval of a job", APPROVE, {"spec.subject.kind": "RewardModelJob"}, ("spec.action", "about a PolicyRollout")
    ),
    Case("no reason", APPROVE, {"spec.reason": ""}, ("spec.reason", "at least 1 chars long")),
    Case("an unknown verb", APPROVE, {"spec.action": "Bless"}, ("spec.action", '"Approve"')),
    Case("acknowledging a rollout", ACKNOWLEDGE, {"spec.subject.kind": "PolicyRollout"}, ("Waive about a job",)),
    Case("acknowledging no attempt", ACKNOWLEDGE, {"spec.attempt": DELETED}, ("spec.attempt", "goes with Acknowledge")),
    Case("a stage to acknowledge", ACKNOWLEDGE, {"spec.stage": 1}, ("spec.stage", "or remove it")),
    *POLICY_CASES,
    *SELF_REFERENCES,
    Case("an expiry that is no time", APPROVE, {"spec.expiresAt": "soon"}, ("spec.expiresAt", "date-time")),
]


@pytest.fixture(scope="module")
def rest(control_plane, tmp_path_factory) -> Rest:
    control_plane.install_crds(CRDS)
    return Rest(control_plane.kubeconfig, tmp_path_factory.mktemp("rest"))


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_it_is_refused_with_field_and_remedy(rest: Rest, case: Case) -> None:
    refusal = rest.create(changed(example(case.example), case.changes))

    assert refusal, "accepted"
    missing = [fragment for fragment in case.message if fragment not in refusal]
    assert not missing, f"{missing} not in: {refusal}"


@pytest.mark.parametrize("file", [RM, S3, *FAMILIES, ROLLOUT])
def test_the_object_that_is_spoiled_is_sound(rest: Rest, file: str) -> None:
    assert rest.create(example(file)) == ""


SPOILED_PODS = {
    "a typo": ({"tolerationz": []}, 'unknown field "spec.template.spec.tolerationz"'),
    "volumes by name": ({"volumes": {"a": {}}}, "spec.template.spec.volumes of type []v1.Volume"),
    "a container without an image": ({"containers": [{"name": "side"}]}, "containers[1].image: Required value"),
    "a number for resources": ({"containers": [{"name": "trainer", "resources": 7}]}, "containers.resources of type"),
    "an impossible user": ({"securityContext": {"runAsUser": -1}}, "securityContext.runAsUser: Invalid value: -1"),
}


@pytest.mark.parametrize("name", SPOILED_PODS)
def test_what_the_outline_does_not_know_is_refused_when_the_pods_are_created(rest: Rest, name: str) -> None:
    """As the engine asks: 400 and 422 are terminal for it, and the job is Accepted=False with these words."""
    template, message = SPOILED_PODS[name]
    stamped = {
        "metadata.namespace": "default",
        "metadata.uid": "11111111-2222-3333-4444-555555555555",
        "metadata.generation": 1,
        "metadata.resourceVersion": "1",
        "metadata.creationTimestamp": "2026-01-02T03:04:05Z",
    }
    body = changed(example(RM), {**stamped, "spec.trainer.podTemplate": {"spec": template}})
    observed = Observed(
        primary=body,
        children={},
        related={claim_key(c["metadata"]["namespace"], c["metadata"]["name"]): c for c in cluster.claims_for(body)},
        decisions=(),
        decisions_honoured=False,
        pulled={},
        now=datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC),
        settings=Settings(trainer_image="example.org/trainer:1", gateway_image="example.org/gateway:1"),
    )

    (job,) = [child for child in reward_model_job.SPEC.plan(observed).create if child["kind"] == "Job"]

    assert message in rest.create(json.loads(json.dumps(job)))
