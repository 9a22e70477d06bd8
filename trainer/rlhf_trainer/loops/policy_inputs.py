"""What optimising a policy starts from: checked inputs, encoded prompts, the holdout, and their lineage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from rlhf_trainer.config import Algorithm, Critic, PolicyTraining
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.data.rows import load_prompts
from rlhf_trainer.data.split import split
from rlhf_trainer.digests import DigestMismatchError, check_digest, dataset_digest, file_digest, folder_digest
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.rollout import Prompt
from rlhf_trainer.preflight import check_attempt, check_batch, check_too_long, warn_of_memory
from rlhf_trainer.safety.scorer import FormatError, LinearFilter
from rlhf_trainer.wire import AttemptConfig, Located

HOLDOUT_FRACTION = 0.2  # of prompts: never trained on, the evaluation draws from them


@dataclass(frozen=True)
class PolicyInputs:
    training: PolicyTraining
    policy: Located
    reward_model: Located
    encoder: Encoder
    training_prompts: tuple[Prompt, ...]
    holdout_prompts: tuple[Prompt, ...]


def prepare(session: Session) -> PolicyInputs:
    """Preflight, then encoded prompts. Raises Invalid with the field and the remedy."""
    config, world = session.config, session.world
    training = config.policy_training
    if training is None:
        raise Invalid("the attempt's configuration has no policyTraining; recreate the resource")
    policy = _given(config.policy, "policy")
    reward_model = _given(config.reward_model, "rewardModel")
    prompts = _given(config.prompts, "prompts")
    session.first_on_main(lambda: _check_files(config))
    check_batch(training.prompts_per_step, world.size, training.ppo.mini_batches, "promptsPerStep")
    if world.is_main:
        separate = training.algorithm is Algorithm.PPO and training.ppo.critic is Critic.SEPARATE
        warn_of_memory(Path(policy.path), 1 + separate, training.deepspeed.zero_stage, world.size)
    encoder = _open_encoder(policy)
    encoded = [Prompt(text, tuple(encoder.prompt(text))) for text in load_prompts(prompts.path)]
    fitting = [prompt for prompt in encoded if len(prompt.ids) <= training.max_prompt_length]
    dropped = len(encoded) - len(fitting)
    check_too_long(prompts.path, dropped, len(encoded), training.max_prompt_length, "maxPromptLength")
    train, holdout = split(fitting, lambda prompt: prompt.text, HOLDOUT_FRACTION)
    _check_sides(prompts.path, train, holdout)
    return PolicyInputs(training, policy, reward_model, encoder, tuple(train), tuple(holdout))


def lineage(config: AttemptConfig) -> dict[str, str]:
    """name → digest of everything the policy came from."""
    folders = {
        "policy": config.policy,
        "rewardModel": config.reward_model,
        "auditRewardModel": config.audit_reward_model,
    }
    digests = {name: at.digest or folder_digest(at.path) for name, at in folders.items() if at is not None}
    if config.prompts is not None:
        digests["prompts"] = config.prompts.digest or dataset_digest(config.prompts.path)
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
        if located.digest is not None:
            check_digest(file_digest(located.path), located.digest, f"spec.evaluation.safetyFilter ({located.uri})")
    except DigestMismatchError as error:
        raise Invalid(str(error), reason="DigestMismatch") from error
    except (OSError, FormatError) as error:
        raise Invalid(f"spec.evaluation.safetyFilter ({located.uri or located.path}): {error}") from error


def _check_sides(path: str, train: Sequence[Prompt], holdout: Sequence[Prompt]) -> None:
    if not train or not holdout:
        raise Invalid(
            f"{path}: {len(train)} prompts to train on and {len(holdout)} held out for evaluation; "
            "give more prompts (about a fifth is held out by a hash of the text)"
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
