"""The four acts of the demo. Each does what a user would do with kubectl, and says why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demo import follow, manifests, toolbox
from demo.cluster import Cluster, Object
from demo.setup import Images
from demo.story import Story, best_evidence, short
from demo.traffic import Traffic
from demo.view import View

ROLLOUT = "desk"
JUDGED = (("estimate", ""), ("lower", "_lower"), ("upper", "_upper"))


@dataclass
class Play:
    cluster: Cluster
    images: Images
    view: View
    story: Story
    digests: Mapping[str, str]


class UnexpectedOutcome(RuntimeError):
    """The chain decided otherwise than the demo's data calls for: a defect, shown as one."""


def careful_labels(play: Play) -> Object:
    """Careful labels: reward models validated, a policy trained against one and judged by the other."""
    play.view.chapter(
        2,
        "Careful labels become a reward model, then a policy",
        "Two reward models from different raters: one trains the policy, the other only judges it.",
    )
    play.cluster.apply(
        manifests.reward_model_job("helpful-rm", "feedback/careful.jsonl", play.digests),
        manifests.reward_model_job("audit-rm", "feedback/audit.jsonl", play.digests, seed=8),
        manifests.policy_optimization_job("helpful-ppo", "helpful-rm", "audit-rm", play.digests),
    )
    play.view.say("applied helpful-rm, audit-rm and helpful-ppo; helpful-ppo waits until both are validated")
    for name in ("helpful-rm", "audit-rm"):
        expect(play, "rewardmodeljob", name, "Succeeded")
    done = expect(play, "policyoptimizationjob", "helpful-ppo", "Succeeded")
    keep_training(play, done)
    win = next((v for v in done["status"].get("verdicts", ()) if v.get("metric") == "winRate"), None)
    if win and win.get("lower") is not None:
        play.story.win_rates["audit reward model"] = win
    oracle_win_rate(play, done)
    return done


def careless_labels(play: Play) -> None:
    """Careless labels: the model looks good on its own holdout, and the trusted scores refuse it."""
    play.view.chapter(
        4,
        "Careless labels are refused",
        "These labels agree with each other, so accuracy on their own holdout is high. Trusted scores tell the truth.",
    )
    play.cluster.apply(
        manifests.reward_model_job("careless-rm", "feedback/careless.jsonl", play.digests),
        manifests.policy_optimization_job("careless-ppo", "careless-rm", "audit-rm", play.digests),
    )
    expect(play, "rewardmodeljob", "careless-rm", "Failed")
    pods = play.cluster.list("pods", "rlhf.dev/name=careless-ppo")
    waiting = play.cluster.get("policyoptimizationjob", "careless-ppo") or {}
    reason = follow.why(waiting, "Progressing", "Accepted")
    play.view.say(f"careless-ppo has {len(pods)} pods · {reason}")
    if pods:
        raise UnexpectedOutcome("careless-ppo started pods although its reward model was refused")
    look = f"kubectl describe poj careless-ppo -n {play.cluster.namespace}"
    play.story.add(play.view.elapsed, "PolicyOptimizationJob careless-ppo", "never started", reason, "–", look)


def promotion(play: Play, optimised: Object) -> None:
    """The base policy serves; the new one is shadowed, ramped and promoted under live traffic."""
    play.view.chapter(
        3,
        "The policy is rolled out under live traffic",
        "First the base policy serves. Then the spec names the new one: shadow, 10%, 50%, promoted, on evidence alone.",
    )
    base = manifests.source("models/desk-sft", play.digests)
    play.cluster.apply(manifests.policy_rollout(ROLLOUT, base, play.digests))
    follow.rollout(play.cluster, play.view, Story(), ROLLOUT, "first", lambda live: serving(live, base["digest"]))
    play.view.say("the base policy serves all traffic")
    wanted = str(optimised["status"]["artifact"]["digest"])
    with Traffic(play.cluster, play.images, "traffic-promotion", ROLLOUT) as traffic:
        play.cluster.apply(manifests.policy_rollout(ROLLOUT, {"jobRef": {"name": "helpful-ppo"}}, play.digests))
        done = follow.rollout(
            play.cluster, play.view, play.story, ROLLOUT, "promotion", lambda live: serving(live, wanted) or left(live)
        )
        summary = traffic.stop()
    if not serving(done, wanted):
        raise UnexpectedOutcome(f"the better policy was not promoted: {follow.why(done, 'Progressing', 'SafetyOK')}")
    record_rollout(play, done, "helpful-ppo promoted", wanted, summary)


def leak(play: Play) -> None:
    """A candidate that leaks secrets is rolled back at its first stage with users."""
    play.view.chapter(
        5,
        "A leaking candidate is rolled back",
        "The filter that judges answers was trained on labelled examples; it never saw the list the oracle judges by.",
    )
    leaky = manifests.source("models/desk-leaky", play.digests)
    with Traffic(play.cluster, play.images, "traffic-leak", ROLLOUT) as traffic:
        play.cluster.apply(manifests.policy_rollout(ROLLOUT, leaky, play.digests))
        done = follow.rollout(
            play.cluster,
            play.view,
            play.story,
            ROLLOUT,
            "leak",
            lambda live: left(live) or serving(live, leaky["digest"]),
        )
        summary = traffic.stop()
    if not left(done):
        raise UnexpectedOutcome("the leaking candidate was promoted")
    record_rollout(play, done, "desk-leaky rolled back", str(leaky["digest"]), summary)


def serving(live: Object, digest: str) -> bool:
    """The rollout is at rest with this digest as its stable revision."""
    status = live.get("status", {})
    stable = [r["digest"] for r in status.get("revisions", ()) if r.get("state") == "Stable"]
    return status.get("phase") == "Healthy" and stable == [digest]


def left(live: Object) -> bool:
    return live.get("status", {}).get("phase") in ("RolledBack", "Failed")


def expect(play: Play, resource: str, name: str, phase: str) -> Object:
    """Follows a job to its end, prints its evidence, and insists on the outcome."""
    live = follow.job(play.cluster, play.view, resource, name)
    status = live["status"]
    verdicts = status.get("verdicts", ())
    reason = follow.why(live, "Complete" if status["phase"] == "Succeeded" else "Failed", "Validated")
    style = "green" if status["phase"] == "Succeeded" else "red"
    play.view.say(f"{live['kind']} {name}: [{style}]{status['phase']}[/] · {reason}")
    play.view.verdicts(verdicts)
    digest = short((status.get("artifact") or {}).get("digest"))
    look = f"kubectl describe {resource} {name} -n {play.cluster.namespace}"
    play.story.add(play.view.elapsed, f"{live['kind']} {name}", status["phase"], best_evidence(verdicts), digest, look)
    if status["phase"] != phase:
        raise UnexpectedOutcome(f"{name} ended {status['phase']}, expected {phase}: {reason}. Look: {look}")
    return live


def record_rollout(play: Play, live: Object, what: str, digest: str, summary: Mapping[str, Any]) -> None:
    verdicts = live["status"].get("verdicts", ())
    play.view.verdicts(verdicts)
    leaks = ", ".join(f"{arm['violations']} from {arm['arm']} {arm['revision']}" for arm in summary["arms"])
    play.view.say(f"{what}: {summary['requests']} requests, {summary['failures']} failed")
    play.view.say(f"leaked secrets that reached users, counted by the oracle: {leaks}")
    look = f"kubectl describe policyrollout {ROLLOUT} -n {play.cluster.namespace}"
    leaked = sum(arm["violations"] for arm in summary["arms"] if arm["arm"] == "canary")
    evidence = (
        f"{best_evidence(verdicts)}; {summary['failures']} of {summary['requests']} requests failed; "
        f"users saw {leaked} leaks of the candidate"
    )
    play.story.served[what] = summary
    play.story.add(play.view.elapsed, f"PolicyRollout: {what}", live["status"]["phase"], evidence, short(digest), look)


def keep_training(play: Play, live: Object) -> None:
    """Reads every attempt's metrics from the volume, for the charts."""
    name, uid = live["metadata"]["name"], live["metadata"]["uid"]
    pattern = f"cat {toolbox.MOUNT}/artifacts/{name}/{uid}/a*/metrics.jsonl"
    text = toolbox.run(play.cluster, "desk-metrics", play.images.trainer, ["sh", "-c", pattern])
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    by_step = {row["step"]: row for row in rows}  # a step that was lost and repeated counts as it was repeated
    play.story.training[name] = [by_step[step] for step in sorted(by_step)]


def oracle_win_rate(play: Play, live: Object) -> None:
    """What the hidden oracle thinks, which no reward model and no gate has seen."""
    artifact = str(live["status"]["artifact"]["uri"]).removeprefix(f"pvc://{toolbox.CLAIM}/")
    command = ["python", "-m", "rlhf_trainer.desk", "judge", "--policy", f"{toolbox.MOUNT}/{artifact}"]
    command += ["--against", f"{toolbox.MOUNT}/models/desk-sft"]
    report = toolbox.last_object(toolbox.run(play.cluster, "desk-judge", play.images.trainer, command))
    rate = {name: report[f"win_rate{suffix}"] for name, suffix in JUDGED}
    interval = f"\\[{rate['lower']:.3f}, {rate['upper']:.3f}]"
    play.view.say(
        f"hidden oracle: win rate against the base {rate['estimate']:.3f} {interval}; "
        f"it leaks a secret in {report['violation_rate']:.1%} of its answers, the base in "
        f"{report['violation_rate_against']:.1%}"
    )
    play.view.say(f"prompt: {report['example_prompt']!r}")
    play.view.say(f"  base:      {report['example_reply_against']!r}")
    play.view.say(f"  optimised: {report['example_reply']!r}")
    play.story.win_rates["hidden oracle"] = rate
