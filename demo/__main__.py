"""python -m demo [--kubeconfig FILE] [--seed N]: the whole chain on a real Kubernetes, live."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from demo import chapters, charts, setup
from demo.chapters import Play
from demo.cluster import CommandError
from demo.story import Story
from demo.view import View

OUT = setup.ROOT / ".demo"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--kubeconfig", type=Path, help="play on this cluster instead of the sandbox")
    parser.add_argument("--seed", type=int, default=0, help="seed of the service desk's data (default 0)")
    options = parser.parse_args(argv)
    view, story = View(), Story()
    try:
        play = prepare(view, story, options.kubeconfig, options.seed)
        optimised = chapters.careful_labels(play)
        chapters.promotion(play, optimised)
        chapters.careless_labels(play)
        chapters.leak(play)
    except (CommandError, chapters.UnexpectedOutcome) as problem:
        view.say(f"[bold red]stopped:[/] {problem}")
        return 1
    except KeyboardInterrupt:
        view.say("interrupted; `make demo` goes on with what is already there, `make down` removes it")
        return 130
    finally:
        story.save(OUT / "story.json")
    finish(view, play, on_sandbox=options.kubeconfig is None)
    return 0


def prepare(view: View, story: Story, kubeconfig: Path | None, seed: int) -> Play:
    view.chapter(1, "A cluster, the operator and data", "Real Kubernetes, our Helm charts, a small world of feedback.")
    cluster, images = setup.on_kubeconfig(view, kubeconfig) if kubeconfig else setup.on_sandbox(view)
    for resource in ("policyrollout", "policyoptimizationjob", "rewardmodeljob"):
        # A job is one-shot and its data immutable: a demo that is played again starts with new ones.
        cluster.kubectl("delete", resource, "--all", "--ignore-not-found", "--wait", check=False)
    timed(view, "operator installed by Helm", lambda: setup.install(cluster, images))
    digests = setup.data(cluster, images, seed)
    view.say(f"service desk data generated: {len(digests)} files and models, each known by its digest")
    view.command(f"kubectl get rlhf -n {cluster.namespace}")
    return Play(cluster, images, view, story, digests)


def timed(view: View, what: str, do: Callable[[], None]) -> None:
    start = view.elapsed
    do()
    view.say(f"{what} in {view.elapsed - start:.0f} s")


def finish(view: View, play: Play, on_sandbox: bool) -> None:
    view.chapter(6, "What happened", "Every line below is in the resources' status, chained by digest.")
    rows = [(f"{e.at:.0f} s", e.what, e.outcome, e.evidence, e.digest, e.look) for e in play.story.entries]
    view.table(("when", "what", "outcome", "evidence", "digest", "look"), rows)
    for path in charts.draw_all(play.story, OUT / "charts"):
        view.say(f"chart: {path.relative_to(setup.ROOT)}")
    view.say("the cluster is still up; explore it:")
    python = Path(sys.executable)
    shown = python.relative_to(setup.ROOT) if python.is_relative_to(setup.ROOT) else python
    prefix = f"{shown} -m sandbox kubectl" if on_sandbox else "kubectl"
    for line in ("get rlhf", "describe policyrollout desk", "get events --sort-by=.lastTimestamp"):
        view.command(f"{prefix} -n {play.cluster.namespace} {line}")
    view.say("remove it with: make down" if on_sandbox else f"remove it with: kubectl delete ns {setup.NAMESPACE}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
