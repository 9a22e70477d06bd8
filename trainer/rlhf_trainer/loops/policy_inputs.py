"""What optimising a policy starts from: checked inputs, encoded prompts, the holdout, and their lineage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from rlhf_trainer.config import ONLINE, Algorithm, Evaluation, PolicyTraining
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.data.rows import load_prompts
from rlhf_trainer.data.split import split
from rlhf_trainer.digests import dataset_digest, file_digest, folder_digest
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.given_texts import Limits, Pair, Text, read_demonstrations, read_pairs
from rlhf_trainer.loops.policy_needs import SAMPLING, check_needs
from rlhf_trainer.loops.rollout import Prompt
from rlhf_trainer.loops.suite_inputs import Suite, read_suite
from rlhf_trainer.preflight import check_attempt, check_batch, check_too_long
from rlhf_trainer.safety.scorer import FormatError, LinearFilter
from rlhf_trainer.wire import AttemptConfig, Located

HOLDOUT_FRACTION = 0.2  # of prompts: never trained on, the evaluation draws from them


@dataclass(frozen=True)
class PolicyInputs:
    """Which of the texts are there depends on the algorithm; prompts are held out by the same hash in all of them."""

    training: PolicyTraining
    policy: Located
    encoder: Encoder
    training_prompts: tuple[Prompt, ...]  # of spec.prompts
    holdout_prompts: tuple[Prompt, ...]  # for the evaluation
    given_reward_model: Located | None = None
    teacher: Located | None = None
    pairs: tuple[Pair, ...] = ()  # to train on
    demonstrations: tuple[Text, ...] = ()  # to train on
    suite: Suite | None = None  # for the gate

    @property
    def reward_model(self) -> Located:
        """What online algorithms optimise; ``prepare`` has made sure that they have it."""
        return _given(self.given_reward_model, "rewardModel")


@dataclass(frozen=True)
class _Sides:
    """One file's rows to train on and its held-out prompts."""

    path: str
    prompts: tuple[Prompt, ...] = ()
    holdout: tuple[Prompt, ...] = ()
    pairs: tuple[Pair, ...] = ()
    demonstrations: tuple[Text, ...] = ()
    dropped: int = 0

    def trained(self, algorithm: Algorithm) -> Iterator[Prompt]:
        """Prompts that weights are learnt on; without sampling those of spec.prompts are there to be judged on."""
        yield from self.prompts if algorithm in SAMPLING else ()
        yield from (pair.prompt for pair in self.pairs)
        yield from (text.prompt for text in self.demonstrations)


def prepare(session: Session) -> PolicyInputs:
    """Preflight, then encoded rows. Raises Invalid with the field and the remedy."""
    config, world = session.config, session.world
    training = config.policy_training
    if training is None:
        raise Invalid("the attempt's configuration has no policyTraining; recreate the resource")
    policy = _given(config.policy, "policy")
    check_needs(config, training)
    session.first_on_main(lambda: _check_files(config))
    mini_batches = training.ppo.mini_batches if training.algorithm in ONLINE else 1
    check_batch(training.prompts_per_step, world.size, mini_batches, "promptsPerStep")
    encoder = _open_encoder(policy)
    sides = [read(config, encoder, training) for read in (_read_texts, _read_prompts)]
    found = [side for side in sides if side is not None]
    _check_looks(config.evaluation, found[-1])
    session.board.figures({"droppedRows": float(sum(side.dropped for side in found))})
    return PolicyInputs(
        training=training,
        policy=policy,
        encoder=encoder,
        training_prompts=tuple(prompt for side in found for prompt in side.prompts),
        holdout_prompts=found[-1].holdout,  # of spec.prompts where they are given
        given_reward_model=config.reward_model,
        teacher=config.teacher,
        pairs=tuple(pair for side in found for pair in side.pairs),
        demonstrations=tuple(text for side in found for text in side.demonstrations),
        suite=_read_suite(config, encoder, training, found),
    )


def _read_suite(
    config: AttemptConfig, encoder: Encoder, training: PolicyTraining, sides: Sequence[_Sides]
) -> Suite | None:
    wanted = None if config.evaluation is None else config.evaluation.safety_suite
    if config.safety_suite is None or wanted is None:  # ``check_needs`` has refused one of them alone
        return None
    trained = (prompt.text for side in sides for prompt in side.trained(training.algorithm))
    return read_suite(config.safety_suite.path, wanted, encoder, training.max_prompt_length, trained)


def _read_prompts(config: AttemptConfig, encoder: Encoder, training: PolicyTraining) -> _Sides | None:
    if config.prompts is None:
        return None
    path = config.prompts.path
    encoded = [Prompt(text, tuple(encoder.prompt(text))) for text in load_prompts(path)]
    fitting = [prompt for prompt in encoded if len(prompt.ids) <= training.max_prompt_length]
    dropped = len(encoded) - len(fitting)
    check_too_long(path, dropped, len(encoded), training.max_prompt_length, "maxPromptLength")
    train, holdout = split(fitting, lambda prompt: prompt.text, HOLDOUT_FRACTION)
    _check_sides(path, "prompts", len(train), 1, len(holdout))
    return _Sides(path, tuple(train), tuple(holdout), dropped=dropped)


def _read_texts(config: AttemptConfig, encoder: Encoder, training: PolicyTraining) -> _Sides | None:
    """The pairs or demonstrations of an algorithm that learns from them, and their held-out prompts."""
    limits, batch = Limits.of(training), training.prompts_per_step
    if training.algorithm in (Algorithm.DPO, Algorithm.KTO):
        path = _given(config.preferences, "preferences").path
        pairs, dropped = read_pairs(path, encoder, limits)
        train_pairs, held_pairs = split(
            pairs, lambda pair: pair.prompt.text, HOLDOUT_FRACTION, side_of=lambda pair: pair.side
        )
        least = batch if training.algorithm is Algorithm.DPO else 1  # KTO counts responses, once it has them
        _check_sides(path, "pairs", len(train_pairs), least, len(held_pairs))
        holdout = dict.fromkeys(pair.prompt for pair in held_pairs)
        return _Sides(path, holdout=tuple(holdout), pairs=tuple(train_pairs), dropped=dropped)
    if training.algorithm is Algorithm.SFT:
        path = _given(config.demonstrations, "demonstrations").path
        texts, dropped = read_demonstrations(path, encoder, limits)
        train, held = split(texts, lambda text: text.prompt.text, HOLDOUT_FRACTION)
        _check_sides(path, "demonstrations", len(train), batch, len(held))
        holdout = dict.fromkeys(text.prompt for text in held)
        return _Sides(path, holdout=tuple(holdout), demonstrations=tuple(train), dropped=dropped)
    return None


def lineage(config: AttemptConfig) -> dict[str, str]:
    """name → digest of everything the policy came from."""
    folders = {
        "policy": config.policy,
        "rewardModel": config.reward_model,
        "auditRewardModel": config.audit_reward_model,
        "teacher": config.teacher,
    }
    digests = {name: at.digest or folder_digest(at.path) for name, at in folders.items() if at is not None}
    datasets = {
        "prompts": config.prompts,
        "preferences": config.preferences,
        "demonstrations": config.demonstrations,
        "safetySuite": config.safety_suite,
    }
    digests |= {name: at.digest or dataset_digest(at.path) for name, at in datasets.items() if at is not None}
    if config.safety_filter is not None:
        digests["safetyFilter"] = config.safety_filter.digest or file_digest(config.safety_filter.path)
    return digests | {"config": config.config_digest}


def _check_files(config: AttemptConfig) -> None:
    check_attempt(config)
    located = config.safety_filter
    if located is None:
        return
    try:
        LinearFilter.read(Path(located.path))
    except (OSError, FormatError) as error:
        raise Invalid(f"spec.evaluation.safetyFilter ({located.uri or located.path}): {error}") from error


def _check_sides(path: str, rows: str, train: int, least: int, holdout: int) -> None:
    if 0 < train < least and holdout:
        raise Invalid(
            f"{path}: {train} {rows} to train on are fewer than training.promptsPerStep {least}; "
            "lower it or give more rows"
        )
    if not train or not holdout:
        raise Invalid(
            f"{path}: {train} {rows} to train on and {holdout} held out for evaluation; "
            "give more prompts (about a fifth is held out by a hash of the text)"
        )


def _check_looks(evaluation: Evaluation | None, side: _Sides) -> None:
    """Both compare replies over prompts: one prompt has no spread."""
    given = evaluation or Evaluation()
    wanted = {"bestOfN": given.best_of_n, "overOptimization": given.over_optimization}
    asking = [f"evaluation.{name}" for name, looks in wanted.items() if looks is not None]
    if asking and len(side.holdout) < 2:
        raise Invalid(
            f"{side.path}: 1 prompt held out for evaluation, {' and '.join(asking)} need at least 2; give more prompts "
            "(about a fifth is held out by a hash of the text)"
        )


def _open_encoder(policy: Located) -> Encoder:
    try:
        return Encoder(AutoTokenizer.from_pretrained(policy.path))
    except (OSError, ValueError) as error:
        raise Invalid(f"spec.policy ({policy.uri or policy.path}): no tokenizer can be loaded: {error}") from error


def _given(located: Located | None, name: str) -> Located:
    if located is None:
        raise Invalid(f"the attempt's configuration has no {name}; recreate the resource")
    return located
