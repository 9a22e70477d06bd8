"""What a user can get wrong about an attempt's inputs, and words of the one line that it ends with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from rlhf_trainer.config import BestOfNPreflight, Evaluation, OverOptimization
from rlhf_trainer.wire import AttemptConfig, Located
from tests.trainer.bench import (
    Bench,
    another_token,
    cut,
    edit_json,
    edit_tokenizer,
    one_more_token,
    overwrite,
    pad_is_eos,
    policy_training,
    rail,
    remove,
    shared_lineage,
    template,
    ties,
    training,
    wider,
    wraps,
)
from tests.trainer.training_world import preference_rows, write_rows

Edit = Callable[[Bench], AttemptConfig]

# name → (how the attempt is spoilt, words of its one line: what, where, remedy)
PREFERENCES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no file": (lambda b: b.reward(preferences=Located(path=str(b.folder / "gone.jsonl"))), ("gone.jsonl", "check")),
    "a folder": (lambda b: b.reward(preferences=Located(path=str(b.folder))), ("spec.preferences", "check the path")),
    "empty file": (lambda b: b.reward(preferences=b.lines("")), ("data.jsonl", "no rows", "check")),
    "blank lines": (lambda b: b.reward(preferences=b.lines("\n\n  \n")), ("data.jsonl", "no rows")),
    "not JSON": (lambda b: b.reward(preferences=b.lines('{"prompt": \n')), ("data.jsonl:1", "each line must be one")),
    "a list": (lambda b: b.reward(preferences=b.lines("[1]\n")), ("data.jsonl:1", "JSON list")),
    "a number": (lambda b: b.reward(preferences=b.lines("7\n")), ("data.jsonl:1", "each line must be one")),
    "NaN": (lambda b: b.reward(preferences=b.lines('{"a": NaN}\n')), ("data.jsonl:1", "NaN is not JSON")),
    "not UTF-8": (lambda b: b.reward(preferences=b.lines(b'{"prompt": "\xff\xfe"}\n')), ("data.jsonl:1", "UTF-8")),
    "binary": (lambda b: b.reward(preferences=b.lines(b"\x00\x01\x02\n")), ("data.jsonl:1",)),
    "deep nesting": (lambda b: b.reward(preferences=b.lines("[" * 100_000 + "\n")), ("data.jsonl:1",)),
    "no prompt": (lambda b: b.reward(preferences=b.row(prompt=None)), ("data.jsonl:3", "'prompt'", "missing")),
    "empty prompt": (lambda b: b.reward(preferences=b.row(prompt=" ")), ("data.jsonl:3", "'prompt'", "non-empty")),
    "prompt a number": (lambda b: b.reward(preferences=b.row(prompt=5)), ("data.jsonl:3", "'prompt'", "int")),
    "no response": (lambda b: b.reward(preferences=b.row(response_b=None)), ("data.jsonl:3", "response_b")),
    "response a list": (lambda b: b.reward(preferences=b.row(response_a=["x"])), ("data.jsonl:3", "response_a")),
    "half a character": (lambda b: b.reward(preferences=b.row(prompt="\ud83d")), ("data.jsonl:3", "surrogate pair")),
    "half a character in a role": (
        lambda b: b.reward(preferences=b.row(response_a=[{"role": "\ud83d", "content": "glad"}])),
        ("data.jsonl:3", "turns of \\ud83d", "assistant's turns"),
    ),
    "half a character in an aspect": (
        lambda b: b.reward(preferences=b.row(aspects={"tone \ud83d": "left"})),
        ("data.jsonl:3", "aspects.tone \\ud83d", "give a, b, tie"),
    ),
    "unknown choice": (lambda b: b.reward(preferences=b.row(preference="left")), ("data.jsonl:3", "preference")),
    "choice missing": (lambda b: b.reward(preferences=b.row(preference=None)), ("data.jsonl:3", "preference")),
    "choice a number": (lambda b: b.reward(preferences=b.row(preference=1)), ("data.jsonl:3", "preference")),
    "same texts": (
        lambda b: b.reward(preferences=b.row(response_a="glad happy", response_b="glad  happy")),
        ("data.jsonl:3", "same text", "drop the row"),
    ),
    "chosen without rejected": (
        lambda b: b.reward(preferences=b.row(chosen="glad", response_a=None, response_b=None)),
        ("data.jsonl:3", "'rejected'"),
    ),
    "too few rows": (
        lambda b: b.reward(preferences=Located(path=str(write_rows(b.folder / "d.jsonl", preference_rows(9, 1))))),
        ("d.jsonl", "globalBatchSize", "lower it"),
    ),
    "all too long": (
        lambda b: b.reward(preferences=b.row(), training=training(max_length=8)),
        ("data.jsonl", "more than 8 tokens", "raise training.maxLength"),
    ),
    "score a text": (
        lambda b: b.reward(human_scores=b.lines('{"prompt": "hello", "response": "glad", "score": "high"}\n')),
        ("data.jsonl:1", "'score'", "finite number"),
    ),
    "score missing": (
        lambda b: b.reward(human_scores=b.lines('{"prompt": "hello", "response": "glad"}\n')),
        ("data.jsonl:1", "'score'"),
    ),
    "no human scores": (
        lambda b: b.reward(human_scores=Located(path=str(b.folder / "gone.jsonl"))),
        ("spec.validation.humanScores", "gone.jsonl"),
    ),
}


def _held_out_once(bench: Bench, **changes: Any) -> AttemptConfig:
    """Of these prompts the hash holds out one."""
    prompts = ("hello", "hello my parcel is late", "my parcel is late", "parcel", "is", "hello parcel")
    return bench.policy(
        prompts=bench.lines("".join(json.dumps({"prompt": each}) + "\n" for each in prompts)),
        audit_reward_model=Located(path=str(bench.policies.audit)),
        evaluation=Evaluation(samples=16, **changes),
    )


POLICY_DATA: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no prompts file": (lambda b: b.policy(prompts=Located(path=str(b.folder / "gone.jsonl"))), ("spec.prompts",)),
    "prompt missing": (lambda b: b.policy(prompts=b.lines('{"text": "hello"}\n')), ("data.jsonl:1", "'prompt'")),
    "prompts empty": (lambda b: b.policy(prompts=b.lines("")), ("data.jsonl", "no rows")),
    "one prompt": (lambda b: b.policy(prompts=b.lines('{"prompt": "hello"}\n')), ("data.jsonl", "more prompts")),
    "one held-out prompt to look at": (
        lambda b: _held_out_once(b, over_optimization=OverOptimization()),
        ("data.jsonl", "1 prompt held out", "evaluation.overOptimization", "more prompts"),
    ),
    "one held-out prompt for best of n": (
        lambda b: _held_out_once(b, best_of_n=BestOfNPreflight()),
        ("data.jsonl", "1 prompt held out", "evaluation.bestOfN", "more prompts"),
    ),
    "prompts too long": (
        lambda b: b.policy(training=policy_training(max_prompt_length=1)),
        ("prompts.jsonl", "more than 1 tokens", "maxPromptLength"),
    ),
    "no prompts field": (lambda b: b.policy(prompts=None), ("spec.prompts is missing", "JSONL")),
    "no policy field": (lambda b: b.policy(policy=None), ("policy", "recreate")),
    "no rewardModel field": (lambda b: b.policy(reward_model=None), ("spec.rewardModel is missing", "jobRef")),
}

MODELS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no folder": (lambda b: b.reward(base_model=Located(path=str(b.folder / "gone"))), ("spec.baseModel", "gone")),
    "a file": (
        lambda b: b.reward(base_model=Located(path=str(b.tiny.preferences))),
        ("spec.baseModel", "not a folder"),
    ),
    "no config": (lambda b: b.reward(base_model=b.model(remove("config.json"))), ("config.json", "Hugging Face")),
    "config not JSON": (
        lambda b: b.reward(base_model=b.model(overwrite("config.json", b"{"))),
        ("config.json", "JSON"),
    ),
    "config a list": (lambda b: b.reward(base_model=b.model(overwrite("config.json", b"[]"))), ("config.json", "list")),
    "no model type": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", model_type=...))),
        ("config.json", "model_type"),
    ),
    "unknown model type": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", model_type="sphinx"))),
        ("spec.baseModel", "sphinx"),
    ),
    "encoder-decoder": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", is_encoder_decoder=True))),
        ("config.json", "decoder-only"),
    ),
    "other vocabulary size": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", vocab_size=5000))),
        ("vocab_size 5000", "different models"),
    ),
    "no weights": (lambda b: b.reward(base_model=b.model(remove("model.safetensors"))), ("spec.baseModel", "weights")),
    "weights cut": (lambda b: b.reward(base_model=b.model(cut("model.safetensors"))), ("model.safetensors", "bytes")),
    "weights empty": (
        lambda b: b.reward(base_model=b.model(overwrite("model.safetensors", b""))),
        ("model.safetensors", "copy the model again"),
    ),
    "weights garbage": (
        lambda b: b.policy(policy=b.model(overwrite("model.safetensors", b"\xff" * 64))),
        ("spec.policy", "model.safetensors", "copy"),
    ),
    "shard missing": (
        lambda b: b.reward(
            base_model=b.model(
                overwrite("model.safetensors.index.json", b'{"weight_map": {"x": "model-00002.safetensors"}}')
            )
        ),
        ("model-00002.safetensors is missing", "copy the whole folder"),
    ),
    "no tokenizer": (
        lambda b: b.policy(policy=b.model(lambda f: (remove("tokenizer.json")(f), remove("tokenizer_config.json")(f)))),
        ("spec.policy", "tokenizer"),
    ),
    "tokenizer not JSON": (
        lambda b: b.reward(base_model=b.model(overwrite("tokenizer.json", b"{{"))),
        ("spec.baseModel", "no tokenizer can be loaded"),
    ),
    "pad is eos": (
        lambda b: b.reward(base_model=b.model(pad_is_eos)),
        ("tokenizer_config.json", "pad_token is the eos_token", "one of its own"),
    ),
    "two bos": (
        lambda b: b.reward(base_model=b.model(wraps("<bos>", "<bos>", "$"))),
        ("spec.baseModel", "tokenizer_config.json", "starts with 2 bos tokens", "turn add_bos_token"),
    ),
    "eos after every text": (
        lambda b: b.policy(policy=b.model(wraps("<bos>", "$", "<eos>"))),
        ("spec.policy", "ends every text with eos", "set add_eos_token to false"),
    ),
    "eos is a word": (
        lambda b: b.reward(base_model=b.model(edit_json("tokenizer_config.json", eos_token="hello"))),
        ("tokenizer_config.json", "eos token even without special tokens"),
    ),
    "more tokens than embeddings": (
        lambda b: b.policy(policy=b.model(edit_tokenizer(one_more_token))),
        ("spec.policy", "the tokenizer gives ids up to", "do not belong together"),
    ),
    "no pad": (
        lambda b: b.policy(policy=b.model(edit_json("tokenizer_config.json", pad_token=...))),
        ("tokenizer_config.json", "pad_token is not set"),
    ),
    "template not a prefix": (
        lambda b: b.reward(
            base_model=b.model(template("{% if messages | length == 1 %}hello{% else %}glad{% endif %}"))
        ),
        ("chat template", "prefix"),
    ),
    "template writes two bos": (
        lambda b: b.reward(base_model=b.model(template("<bos><bos>{{ messages[-1]['content'] }}"))),
        ("chat template writes 2 bos tokens", "exactly one"),
    ),
    "template broken": (
        lambda b: b.reward(base_model=b.model(template("{% for %}"))),
        ("chat template cannot be rendered", "correct it"),
    ),
    "context too short": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", max_position_embeddings=8))),
        ("8 positions", "training.maxLength", "lower them"),
    ),
    "context too short for replies": (
        lambda b: b.policy(policy=b.model(edit_json("config.json", max_position_embeddings=20))),
        ("20 positions", "generation.maxNewTokens", "lower them"),
    ),
    "context too short for a reply and its end": (
        lambda b: b.policy(reward_model=b.scorer(edit_json("members/0/config.json", max_position_embeddings=22))),
        ("spec.rewardModel", "22 positions", "generation.maxNewTokens and its end need 23", "lower them"),
    ),
    "audit's context too short": (
        lambda b: b.policy(
            audit_reward_model=b.scorer(edit_json("members/0/config.json", max_position_embeddings=8), b.policies.audit)
        ),
        ("spec.auditRewardModel", "8 positions", "lower them"),
    ),
    "changed digest": (
        lambda b: b.reward(base_model=Located(path=str(b.tiny.base), digest="sha256:" + "0" * 64)),
        ("spec.baseModel", "is pinned", "pin the new digest"),
    ),
    "changed data digest": (
        lambda b: b.policy(prompts=Located(path=str(b.policies.prompts), digest="sha256:" + "0" * 64)),
        ("spec.prompts", "is pinned"),
    ),
    "no calibration": (
        lambda b: b.policy(reward_model=b.scorer(remove("calibration.json"))),
        ("calibration.json", "RewardModelJob"),
    ),
    "calibration broken": (
        lambda b: b.policy(reward_model=b.scorer(overwrite("calibration.json", b"{}"))),
        ("calibration.json", "RewardModelJob"),
    ),
    "other formatting": (
        lambda b: b.policy(reward_model=b.scorer(edit_json("calibration.json", formatting="chatml/v9"))),
        ("calibration.json", "chatml/v9"),
    ),
    "member missing": (
        lambda b: b.policy(reward_model=b.scorer(lambda f: shutil.rmtree(f / "members" / "1"))),
        ("not a complete reward model", "members/1"),
    ),
    "audit is the judged": (
        lambda b: b.policy(audit_reward_model=Located(path=str(b.policies.reward_model))),
        ("auditRewardModel is the same model", "other preferences"),
    ),
    "audit of the same preferences": (shared_lineage, ("auditRewardModel", "same preferences", "train it on other")),
    "no safety filter": (
        lambda b: b.policy(safety_filter=Located(path=str(b.folder / "gone.json"))),
        ("spec.evaluation.safetyFilter", "gone.json"),
    ),
    "safety filter not JSON": (
        lambda b: b.policy(safety_filter=b.lines("{")),
        ("spec.evaluation.safetyFilter", "data.jsonl"),
    ),
}

GIVEN_TEXTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "DPO: choice missing": (
        lambda b: b.offline("DPO", preferences=b.row(preference=None)),
        ("data.jsonl:3", "preference"),
    ),
    "DPO: no preferences": (lambda b: b.offline("DPO", preferences=None), ("spec.preferences is missing", "JSONL")),
    "DPO: a teacher": (
        lambda b: b.offline("DPO", teacher=Located(path=str(b.texts.teacher))),
        ("spec.teacher is given", "remove it"),
    ),
    "DPO: responses too long": (
        lambda b: b.offline("DPO", {"generation": {"max_new_tokens": 2}}),
        ("preferences.jsonl", "more than 2 tokens", "raise training.generation.maxNewTokens"),
    ),
    "DPO: safety filter of another format": (
        lambda b: b.offline("DPO", safety_filter=b.lines('{"format": "other"}')),
        ("spec.evaluation.safetyFilter", "data.jsonl", "not a safety filter", "rlhf_trainer.safety train"),
    ),
    "KTO: ties alone": (
        lambda b: b.offline(
            "KTO", preferences=b.lines("".join(json.dumps(row) + "\n" for row in ties(preference_rows(60, seed=4))))
        ),
        ("data.jsonl", "every training row is a tie", "add decided rows"),
    ),
    "KTO: too few": (
        lambda b: b.offline("KTO", {"prompts_per_step": 1000}),
        ("preferences.jsonl", "promptsPerStep 1000", "lower it"),
    ),
    "KTO: response a list": (
        lambda b: b.offline("KTO", preferences=b.row(response_a=["x"])),
        ("data.jsonl:3", "response_a"),
    ),
    "SFT: no demonstrations": (
        lambda b: b.offline("SFT", demonstrations=None),
        ("spec.demonstrations is missing", "JSONL"),
    ),
    "SFT: response missing": (
        lambda b: b.offline("SFT", demonstrations=b.lines('{"prompt": "hello"}\n')),
        ("data.jsonl:1", "'response'", "missing"),
    ),
    "SFT: response empty": (
        lambda b: b.offline("SFT", demonstrations=b.lines('{"prompt": "hello", "response": " "}\n')),
        ("data.jsonl:1", "'response'", "empty"),
    ),
    "SFT: not JSON": (
        lambda b: b.offline("SFT", demonstrations=b.lines("hello: glad\n")),
        ("data.jsonl:1", "each line must be one"),
    ),
    "SFT: too few": (
        lambda b: b.offline("SFT", {"prompts_per_step": 1000}),
        ("demonstrations.jsonl", "promptsPerStep 1000", "lower it"),
    ),
    "Distillation: no teacher": (lambda b: b.offline("Distillation", teacher=None), ("spec.teacher is missing",)),
    "Distillation: teacher gone": (
        lambda b: b.offline("Distillation", teacher=Located(path=str(b.folder / "gone"))),
        ("spec.teacher", "gone", "check the path"),
    ),
    "Distillation: teacher cut": (
        lambda b: b.offline("Distillation", teacher=b.teacher(cut("model.safetensors"))),
        ("spec.teacher", "model.safetensors", "copy it again"),
    ),
    "Distillation: teacher's context too short": (
        lambda b: b.offline("Distillation", teacher=b.teacher(edit_json("config.json", max_position_embeddings=20))),
        ("spec.teacher", "20 positions", "generation.maxNewTokens", "lower them"),
    ),
    "Distillation: teacher of other tokens": (
        lambda b: b.offline("Distillation", teacher=b.teacher(edit_tokenizer(another_token))),
        ("spec.teacher", "2 tokens", "'bonjour' is", "None here", "policy's own tokenizer"),
    ),
    "Distillation: other tokens, sequences": (
        lambda b: b.offline(
            "Distillation", {"distillation": {"mode": "sequence"}}, teacher=b.teacher(edit_tokenizer(another_token))
        ),
        ("spec.teacher", "2 tokens", "'bonjour' is", "None here", "policy's own tokenizer"),
    ),
    "Distillation: teacher pads otherwise": (
        lambda b: b.offline("Distillation", teacher=b.teacher(edit_json("tokenizer_config.json", pad_token="<unk>"))),
        ("spec.teacher", "its pad and eos are tokens 3 and 2, those of spec.policy are 0 and 2"),
    ),
    "Distillation: teacher predicts more": (
        lambda b: b.offline("Distillation", teacher=b.teacher(wider)),
        ("spec.teacher", "config.json", "predicts", "of one size"),
    ),
    "Distillation: no prompts": (lambda b: b.offline("Distillation", prompts=None), ("spec.prompts is missing",)),
}

CONFIGURATION: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "batch and ranks": (
        lambda b: b.policy(training=policy_training(prompts_per_step=9)),
        ("promptsPerStep is 9", "choose 8 or 10"),
    ),
    "micro batch": (
        lambda b: b.reward(training=training(micro_batch_size=5)),
        ("microBatchSize is 5", "16 rows", "choose 4 or 8"),
    ),
    "micro batch of rollouts": (
        lambda b: b.policy(training=policy_training(algorithm="GRPO", samples_per_prompt=3, micro_batch_size=5)),
        ("microBatchSize is 5", "12 rows", "choose 4 or 6"),
    ),
    "greedy sampling": (
        lambda b: b.policy(training=policy_training(generation={"max_new_tokens": 6, "temperature": 0.01})),
        ("generation.temperature", "choose at least"),
    ),
    "LoRA on nothing": (
        lambda b: b.reward(training=training(lora={"target_modules": ["q_prj"]})),
        ("lora.targetModules", "'q_prj'", "q_proj"),
    ),
    "guardrail never reported": (
        lambda b: b.reward(**rail(metric="reward")),
        ("spec.guardrails[0].metric is reward", "gradientNorm"),
    ),
    "guardrail without groups": (
        lambda b: b.policy(**rail(metric="zeroVarianceFraction")),
        ("guardrails[0].metric is zeroVarianceFraction", "choose one of"),
    ),
    "guardrail without a limit": (lambda b: b.policy(**rail(above=None)), ("guardrails[0]", "set one of them")),
    "guardrail that always acts": (
        lambda b: b.policy(**rail(above=1.0, below=2.0)),
        ("guardrails[0]", "every value", "exchange"),
    ),
    "no training": (
        lambda b: b.reward().model_copy(update={"reward_model_training": None}),
        ("rewardModelTraining", "recreate"),
    ),
    "no preferences": (lambda b: b.reward(preferences=None), ("preferences", "recreate")),
}

ATTEMPTS = PREFERENCES | POLICY_DATA | MODELS | GIVEN_TEXTS | CONFIGURATION
