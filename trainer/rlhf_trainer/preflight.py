"""What can be found wrong before any weight is loaded: digests, tokenizer, rows, batch arithmetic, memory.

Every refusal is Invalid (exit 11) and names the file, the row and field where there is one, and the remedy.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from rlhf_trainer.config import Lora
from rlhf_trainer.digests import MANIFEST, folder_digest
from rlhf_trainer.exits import Invalid
from rlhf_trainer.inputs import inputs_of
from rlhf_trainer.preflight_memory import check_memory
from rlhf_trainer.preflight_models import ModelFolder, check_context, check_lora_targets, read_model
from rlhf_trainer.preflight_text import (
    check_same_outputs,
    check_same_vocabulary,
    check_vocabulary,
    open_config,
    open_tokenizer,
)
from rlhf_trainer.preflight_training import check_batch, check_training
from rlhf_trainer.wire import AttemptConfig, Located

__all__ = ["check_attempt", "check_batch", "check_most_fit", "check_too_long", "check_too_long_for"]

log = logging.getLogger(__name__)

_TOO_LONG_SHARE = 0.5  # of the rows; beyond it the data does not fit the job rather than a row the model


def check_attempt(config: AttemptConfig) -> None:
    """Everything about the attempt that needs no rows. Run by rank 0, before the others go on; cheap checks first."""
    check_training(config)
    models = {name: _read_model(name, located) for name, located in _trained_from(config)}
    for each in inputs_of(config):
        each.check()
    _check_audit(config)
    _check_models(config, models)
    check_memory(config)


def _check_models(config: AttemptConfig, models: Mapping[str, ModelFolder]) -> None:
    configs = {name: open_config(name, model.path) for name, model in models.items()}
    sizes: dict[str, int | None] = {name: getattr(config, "vocab_size", None) for name, config in configs.items()}
    tokenizers = {name: open_tokenizer(name, model.path) for name, model in models.items()}
    for name, model in models.items():
        check_vocabulary(name, model.path, tokenizers[name], sizes[name])
    training, reward = config.policy_training, config.reward_model_training
    if reward is not None and "baseModel" in models:
        _check_adapters(models["baseModel"], reward.lora)
        check_context(models["baseModel"], reward.max_length, "training.maxLength")
    if training is not None and "policy" in models:
        _check_adapters(models["policy"], training.lora)
        longest = training.max_prompt_length + training.generation.max_new_tokens
        for name in ("policy", "teacher"):  # a teacher reads the student's replies, and writes as long ones
            if name in models:
                check_context(models[name], longest, "training.maxPromptLength and generation.maxNewTokens")
    if "policy" in models and "teacher" in models:
        check_same_vocabulary(tokenizers["policy"], tokenizers["teacher"], models["teacher"].path)
        check_same_outputs(sizes["policy"], sizes["teacher"], models["teacher"].path)


def _check_adapters(model: ModelFolder, lora: Lora | None) -> None:
    if lora is not None:
        check_lora_targets(model, lora.target_modules)


def check_too_long(path: str, dropped: int, total: int, limit: int, field: str) -> None:
    """Rows longer than the limit are dropped and counted, never cut; losing most of the data is refused."""
    check_too_long_for(path, dropped, total, limit, f"raise training.{field}")


def check_too_long_for(path: str, dropped: int, total: int, limit: int, remedy: str) -> None:
    """``check_too_long`` where no field of the training is the limit."""
    if not dropped:
        return
    if dropped / total > _TOO_LONG_SHARE:
        raise Invalid(f"{path}: {dropped} of {total} rows have more than {limit} tokens and would be dropped; {remedy}")
    log.warning("%s: %d of %d rows have more than %d tokens and are dropped", path, dropped, total, limit)


def check_most_fit(path: str, lost: Mapping[str, int], total: int) -> None:
    """Several limits together may lose no more than one alone; ``lost`` says how many rows each took."""
    dropped = sum(lost.values())
    if dropped / total > _TOO_LONG_SHARE:
        parts = " and ".join(f"{count} by {limit}" for limit, count in lost.items())
        raise Invalid(f"{path}: {dropped} of {total} rows are too long and would be dropped, {parts}; raise them")


def _check_audit(config: AttemptConfig) -> None:
    if config.reward_model is None or config.audit_reward_model is None:
        return
    digests = {folder_digest(config.reward_model.path), folder_digest(config.audit_reward_model.path)}
    if len(digests) == 1:
        raise Invalid(
            "spec.auditRewardModel is the same model as spec.rewardModel, so it cannot catch what that one misses; "
            "train one on other preferences"
        )
    lineages = {_preferences_of(config.reward_model), _preferences_of(config.audit_reward_model)}
    if len(lineages) == 1 and None not in lineages:
        raise Invalid(
            f"spec.auditRewardModel was trained on the same preferences as spec.rewardModel ({lineages.pop()}), so it "
            "shares its mistakes; train it on other preferences"
        )


def _preferences_of(model: Located) -> str | None:
    """The digest of the data a reward model was trained on, by its manifest; None for a model from elsewhere."""
    try:
        manifest = json.loads((Path(model.path) / MANIFEST).read_bytes())
        digest = manifest["lineage"]["preferences"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) else None


def _read_model(name: str, located: Located) -> ModelFolder:
    path = Path(located.path)
    if not path.is_dir():
        raise Invalid(f"spec.{name} ({located.uri or path}): not a folder; check the path and the mounted claim")
    return read_model(name, path)


def _trained_from(config: AttemptConfig) -> Iterable[tuple[str, Located]]:
    """Models in Hugging Face's layout; reward models have a layout of their own, which their loader checks."""
    named = {"baseModel": config.base_model, "policy": config.policy, "teacher": config.teacher}
    return ((name, located) for name, located in named.items() if located is not None)
