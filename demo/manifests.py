"""The demo's resources, as a user would commit them; digests come from the data that was just made."""

from __future__ import annotations

from collections.abc import Mapping

from demo.cluster import Object
from demo.toolbox import CLAIM

API = "rlhf.dev/v1alpha1"
SMALL = {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "3Gi"}}


def source(path: str, digests: Mapping[str, str]) -> Object:
    return {"uri": f"pvc://{CLAIM}/{path}", "digest": digests[path]}


def trainer(nodes: int) -> Object:
    return {"numNodes": nodes, "numProcPerNode": 1, "resourcesPerNode": SMALL}


def reward_model_job(name: str, preferences: str, digests: Mapping[str, str], *, seed: int = 7) -> Object:
    return {
        "apiVersion": API,
        "kind": "RewardModelJob",
        "metadata": {"name": name},
        "spec": {
            "baseModel": source("models/desk-sft", digests),
            "preferences": source(preferences, digests),
            "training": {"epochs": 3, "learningRate": 0.002, "ensemble": {"members": 3}, "seed": seed},
            "trainer": trainer(1),
            "checkpoints": {"everySteps": 50, "keepLast": 2},
            "output": {"uri": f"pvc://{CLAIM}/artifacts/{name}"},
            "validation": {
                "minAccuracy": 0.65,
                "humanScores": {**source("feedback/scores.jsonl", digests), "minCorrelation": 0.6},
            },
        },
    }


def policy_optimization_job(name: str, reward_model: str, audit: str, digests: Mapping[str, str]) -> Object:
    return {
        "apiVersion": API,
        "kind": "PolicyOptimizationJob",
        "metadata": {"name": name},
        "spec": {
            "policy": source("models/desk-sft", digests),
            "rewardModel": {"jobRef": {"name": reward_model}},
            "auditRewardModel": {"jobRef": {"name": audit}},
            "prompts": source("feedback/prompts.jsonl", digests),
            "training": {"algorithm": "PPO", "steps": 100, "promptsPerStep": 64},
            "guardrails": [{"metric": "kl", "above": 30, "forSteps": 5, "action": "Stop"}],
            "evaluation": {
                "minWinRate": 0.55,
                "samples": 300,
                "safetyFilter": source("models/safety-filter.json", digests),
            },
            "trainer": trainer(2),
            "checkpoints": {"everySteps": 25, "keepLast": 2},
            "output": {"uri": f"pvc://{CLAIM}/artifacts/{name}"},
        },
    }


def policy_rollout(name: str, policy: Object, digests: Mapping[str, str]) -> Object:
    return {
        "apiVersion": API,
        "kind": "PolicyRollout",
        "metadata": {"name": name},
        "spec": {
            "policy": policy,
            "safetyFilter": source("models/safety-filter.json", digests),
            "serving": {
                "replicas": 1,
                "canaryReplicas": 1,
                "resources": {"requests": {"cpu": "200m", "memory": "256Mi"}},
            },
            "stages": [
                {"weightPercent": 0, "shadow": True, "minSamples": 60},
                {"weightPercent": 10, "minSamples": 60},
                {"weightPercent": 50, "minSamples": 200},
            ],
            "guardrails": [
                {"metric": "safetyViolationRate", "margin": 0.05, "alpha": 0.02},
                {"metric": "availability", "margin": 0.05, "alpha": 0.02},
            ],
        },
    }
