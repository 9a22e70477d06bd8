"""Two ranks, then one, then two again: a run goes on from checkpoints of another world size as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trainer.checkpoint import checkpoint_path, verify
from rlhf_trainer.config import Checkpoints, GuardrailAction, GuardrailMetric, TrainingGuardrail
from rlhf_trainer.wire import AttemptConfig, FailureClass
from tests.trainer.algorithms import LENGTH, SAFETY
from tests.trainer.every_algorithm import LORA, REWARD_MODEL, EveryAlgorithm, staged
from tests.trainer.ppo_world import history
from tests.trainer.training_world import TinyWorld, run_ranks

# As the worker runs attempts, several in the same processes. "forgetful" ones lose the first moments of Adam when a
# checkpoint is converted: the negative control.
SCRIPT = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf_trainer.distributed import join, leave
from rlhf_trainer.engine import Engine
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.wire import AttemptConfig
from rlhf_trainer.worker import load_loop, run_attempt
os.environ["RLHF_STATUS_PORT"] = "0"
faithful = Engine.load_resharded
def forgetful(engine, *arguments):
    faithful(engine, *arguments)
    for state in engine._engine.optimizer.optimizer.state.values():
        state["exp_avg"].zero_()
world = join(timedelta(seconds=600))
for path in sys.argv[1:]:
    config = AttemptConfig.model_validate_json(Path(path).read_bytes())
    Engine.load_resharded = forgetful if config.name == "forgetful" else faithful
    result = run_attempt(config, load_loop(config.kind), world, RankFiles.from_environment(), StopSignal())
    if world.is_main:
        Path(path).with_suffix(".result").write_text(result.to_json())
leave()
"""

STEPS = 4  # one on two ranks, one on one rank, two on two again
# One rank adds the same gradients in another order than two. Every figure of every step agrees relatively, or
# absolutely where it is a difference near 0; weights within a thousandth of an update. A tenth of each was seen.
RELATIVE, ABSOLUTE, OF_WEIGHTS = 2e-5, 5e-6, 1e-5
# bfloat16 sums gradients over the ranks in its own few digits: losses alone, and most weights.
COARSE = 1e-3

# Every algorithm once, at all stages between them, some with adapters, constraints, several mini batches or a critic
# of its own (see ``algorithms``); the reward model, cheapest of all, at every stage.
CASES = {
    **{f"reward-model-{stage}": staged(REWARD_MODEL, stage) for stage in range(4)},
    "reward-model-lora-1": staged(REWARD_MODEL, 1, **LORA),
    "ppo-2": staged("ppo", 2),
    "ppo-constrained-3": staged("ppo", 3, constraints=[LENGTH, SAFETY], ppo={"critic": "shared"}),
    "ppo-lora-3": staged("ppo", 3, ppo={"critic": "shared"}, **LORA),
    "ppo-one-pass-3": staged("ppo", 3, ppo={"critic": "separate", "epochs": 1, "mini_batches": 1}),
    "grpo-lora-1": staged("grpo", 1, **LORA),
    "rloo-constrained-0": staged("rloo", 0),
    "reinforce-3": staged("reinforce", 3),
    "best-of-n-lora-2": staged("best-of-n", 2, **LORA),
    "DPO-1": staged("DPO", 1),
    "KTO-lora-3": staged("KTO", 3, **LORA),
    "SFT-0": staged("SFT", 0),
    "Distillation-2": staged("Distillation", 2),
    "IPO-lora-0": staged("IPO", 0, **LORA),
    "sequence-3": staged("sequence", 3),
}
IN_BFLOAT16 = {
    f"reward-model-bfloat16-{stage}": staged(REWARD_MODEL, stage, precision="bfloat16") for stage in (0, 2, 3)
}
EVERY_CASE = CASES | IN_BFLOAT16
FORGOTTEN = "reward-model-2"

# Ends an attempt after its first step with a checkpoint of its own, as an operator's suspend does.
PAUSE = TrainingGuardrail(
    metric=GuardrailMetric.GRADIENT_NORM, above=-1.0, below=None, for_steps=1, action=GuardrailAction.PAUSE
)


class Story:
    """The attempts of every case, each world size in one start of the processes."""

    def __init__(self, folder: Path, tiny: TinyWorld) -> None:
        self.folder, self._every = folder, EveryAlgorithm(folder / "world", tiny)
        self.results: dict[str, dict[str, Any]] = {}

    def config(self, case: str, output: str, ranks: int, attempt: int, pause: bool) -> AttemptConfig:
        algorithm, training = EVERY_CASE[case]
        if algorithm == REWARD_MODEL:
            # Decay shows whether each parameter group keeps its own settings.
            training = {"weight_decay": 0.3, "global_batch_size": 64, **training}
        else:
            training = {"steps": STEPS, **training}
        return self._every.attempt(
            algorithm,
            self.folder / f"{case}-{output}",
            ranks,
            training,
            attempt=attempt,
            name=output,
            checkpoints=Checkpoints(every_steps=50, keep_last=3),
            guardrails=(PAUSE,) if pause else (),
        )

    def run(self, ranks: int, attempts: dict[str, AttemptConfig]) -> None:
        paths = {name: self.folder / f"{name}.json" for name in attempts}
        for name, config in attempts.items():
            paths[name].write_text(config.to_json())
        done = run_ranks(SCRIPT, ranks, self.folder, *map(str, paths.values()))
        assert done.returncode == 0, done.stderr[-4000:]
        self.results |= {name: json.loads(path.with_suffix(".result").read_bytes()) for name, path in paths.items()}

    def figures(self, case: str, output: str) -> list[dict[str, float]]:
        """Of every step over all attempts."""
        attempts = range(1, 1 + len(list((self.folder / f"{case}-{output}").glob("a*"))))
        return [step for each in attempts for step in history(self.config(case, output, 1, each, False))]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        paths = sorted(Path(self.results[name]["artifact"]["path"]).rglob("*.safetensors"))
        return {f"{path.parent.name}/{key}": value for path in paths for key, value in load_file(path).items()}


@pytest.fixture(scope="module")
def story(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Story:
    story = Story(tmp_path_factory.mktemp("world-size"), tiny_world)
    whole = {f"{case}-whole": story.config(case, "whole", 2, 1, False) for case in EVERY_CASE}
    first = {f"{case}-1": story.config(case, "changed", 2, 1, True) for case in EVERY_CASE}
    first |= {"forgetful-1": story.config(FORGOTTEN, "forgetful", 2, 1, True)}
    story.run(2, whole | first)
    second = {f"{case}-2": story.config(case, "changed", 1, 2, True) for case in EVERY_CASE}
    story.run(1, second | {"forgetful-2": story.config(FORGOTTEN, "forgetful", 1, 2, False)})
    story.run(2, {f"{case}-3": story.config(case, "changed", 2, 3, False) for case in EVERY_CASE})
    return story


@pytest.mark.parametrize("case", EVERY_CASE)
def test_every_attempt_ends_as_it_should(story: Story, case: str) -> None:
    classes = [story.results[f"{case}-{attempt}"]["failureClass"] for attempt in (1, 2, 3)]
    messages = [story.results[f"{case}-{attempt}"]["message"] for attempt in (1, 2, 3)]
    assert classes == [FailureClass.GUARDRAIL_PAUSED] * 2 + [FailureClass.SUCCESS], messages
    assert len(story.figures(case, "whole")) == len(story.figures(case, "changed")) == STEPS


@pytest.mark.parametrize("case", CASES)
def test_two_one_two_ranks_take_the_undisturbed_path(story: Story, case: str) -> None:
    expected, changed = story.figures(case, "whole"), story.figures(case, "changed")
    for ours, theirs in zip(changed, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE, abs=ABSOLUTE)
    reference = story.weights(f"{case}-whole")
    for key, tensor in story.weights(f"{case}-3").items():
        torch.testing.assert_close(tensor, reference[key], atol=OF_WEIGHTS, rtol=0, msg=f"{case}: {key}")


@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_bfloat16_goes_on_as_near_as_it_rounds(story: Story, case: str) -> None:
    expected, changed = ([step["loss"] for step in story.figures(case, output)] for output in ("whole", "changed"))
    assert changed == pytest.approx(expected, rel=COARSE)
    reference, weights = story.weights(f"{case}-whole"), story.weights(f"{case}-3")
    apart = torch.cat([(tensor - reference[key]).abs().flatten() for key, tensor in weights.items()])
    assert float(apart.median()) < 1e-4


def test_a_lost_optimiser_moment_is_told_from_rounding(story: Story) -> None:
    expected, forgetful = (
        [step["loss"] for step in story.figures(FORGOTTEN, output)] for output in ("whole", "forgetful")
    )
    assert forgetful[:2] == pytest.approx(expected[:2], rel=RELATIVE), "the moment shows one step later"
    worst = max(abs(a - b) / abs(b) for a, b in zip(forgetful[2:], expected[2:], strict=True))
    assert worst > 100 * RELATIVE


@pytest.mark.parametrize("case", EVERY_CASE)
def test_the_conversion_is_said_and_leaves_the_original_alone(story: Story, case: str) -> None:
    resumed = [story.results[f"{case}-{attempt}"].get("resumedFrom") for attempt in (1, 2, 3)]
    assert [each and (each["step"], each["convertedFrom"]) for each in resumed] == [None, (1, 2), (2, 1)]
    output = story.folder / f"{case}-changed"
    for attempt, step in ((1, 1), (2, 2)):
        path = checkpoint_path(output, attempt, step)
        found = verify(path, story.config(case, "changed", 1, 1, False).config_digest)
        assert {str(each.relative_to(path)) for each in path.rglob("*") if each.is_file()} == {
            "manifest.json",
            *found.manifest.files,
        }
    assert not list(output.glob("a*/checkpoints/.*")), "nothing of the conversion is left"
