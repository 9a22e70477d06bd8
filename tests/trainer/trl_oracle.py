"""TRL's trainers on the tiny world, as an independent second opinion on losses and advantages.

Every function returns ours and TRL's numbers on the same recorded batch; those of groups of samples are what the loop
makes of it. TRL is a development dependency alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from rlhf_trainer.algos.bradley_terry import preference_loss
from rlhf_trainer.algos.preference import dpo_losses, ipo_losses, margins
from rlhf_trainer.config import PolicyTraining
from rlhf_trainer.loops.estimators import Prices, Targets, estimate, kl_loss_coefficient
from rlhf_trainer.loops.objective import Objective, Slice, loss_weights
from rlhf_trainer.loops.rollout import Experience
from rlhf_trainer.models.policy import Batch, score_tokens
from rlhf_trainer.models.reward import RewardMember, to_batch
from tests.trainer.ppo_world import experience_of

CPU = torch.device("cpu")
GROUP, LONGEST, KL = 4, 9, 0.2
PAIRS = [
    {"prompt_ids": [1, 9, 12], "chosen_ids": [20, 21, 22, 2], "rejected_ids": [30, 2]},
    {"prompt_ids": [1, 9, 12, 40, 41], "chosen_ids": [25, 2], "rejected_ids": [31, 33, 35, 37, 2]},
    {"prompt_ids": [1, 17], "chosen_ids": [50, 51, 52, 53, 54, 55, 2], "rejected_ids": [30, 31, 2]},
]
TEXTS = [{"prompt": "hello refund", "chosen": " glad", "rejected": " sad"}] * 4


def common(folder: Path, **fields: Any) -> dict[str, Any]:
    quiet = {"report_to": [], "use_cpu": True, "logging_steps": 1000, "save_strategy": "no", "disable_tqdm": True}
    return {"output_dir": str(folder / "trl"), "gradient_checkpointing": False, "bf16": False, **quiet, **fields}


def causal(base: Path, moved: int = 0) -> Any:
    """The base policy, or one that has moved away from it."""
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    random = torch.Generator().manual_seed(moved)
    with torch.no_grad():
        for parameter in lm.parameters():
            scale = 0.3 * float(parameter.std()) if moved and parameter.dim() > 1 else 0.0
            parameter += scale * torch.randn(parameter.shape, generator=random)
    return lm.eval()


def gradients(model: Any, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([each.flatten() for each in found if each is not None])


# ---- reward model --------------------------------------------------------------------------------------------------


def reward_losses(base: Path, folder: Path, centering: float, margin: list[float] | None) -> tuple[Any, Any]:
    """(loss, gradient) of ours and of RewardTrainer on three pairs of unequal lengths."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    arguments = RewardConfig(**common(folder), center_rewards_coefficient=centering or None)
    trainer = RewardTrainer(model, args=arguments, train_dataset=Dataset.from_list(TEXTS), processing_class=tokenizer)
    rows = [
        {
            "chosen_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "rejected_ids": pair["prompt_ids"] + pair["rejected_ids"],
        }
        for pair in PAIRS
    ]
    if margin is not None:
        rows = [{**row, "margin": each} for row, each in zip(rows, margin, strict=True)]
    theirs = trainer.compute_loss(model, trainer.data_collator(rows))
    ids, lengths = to_batch([row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows], 0)
    a, b = RewardMember(model)(ids, lengths)[:, 0].chunk(2)
    asked = torch.tensor(margin) if margin is not None else None
    ours = preference_loss(a, b, torch.ones(len(rows)), centering, asked)
    return (ours.detach(), gradients(model, ours)), (theirs.detach(), gradients(model, theirs))


# ---- preferences ---------------------------------------------------------------------------------------------------


def preference_losses(base: Path, folder: Path, loss: str, smoothing: float = 0.0) -> tuple[Any, Any]:
    """(loss, gradient) of ours and of DPOTrainer; cDPO is TRL's loss on the pairs and on the flipped pairs."""
    policy, reference = causal(base, moved=1), causal(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    arguments = DPOConfig(**common(folder), loss_type=[loss], beta=0.3)
    data = Dataset.from_list(TEXTS)
    trainer = DPOTrainer(policy, reference, args=arguments, train_dataset=data, processing_class=tokenizer)
    flipped = [{**p, "chosen_ids": p["rejected_ids"], "rejected_ids": p["chosen_ids"]} for p in PAIRS]
    theirs = (1 - smoothing) * trainer.compute_loss(trainer.model, trainer.data_collator(PAIRS))
    if smoothing:
        theirs = theirs + smoothing * trainer.compute_loss(trainer.model, trainer.data_collator(flipped))
    prompts = [pair["prompt_ids"] for pair in PAIRS]
    responses = [pair["chosen_ids"] for pair in PAIRS] + [pair["rejected_ids"] for pair in PAIRS]
    batch = Batch.of(prompts * 2, responses, 0, CPU)
    sums = [score_tokens(lm, batch, 1.0).logprobs.sum(dim=1) for lm in (policy, reference)]
    if loss == "ipo":  # TRL averages over tokens where the paper, and we, sum
        sums = [each / batch.lengths for each in sums]
    (chosen, rejected), (first, second) = (each.chunk(2) for each in sums)
    margin, sure = margins(chosen, rejected, first.detach(), second.detach()), torch.ones(len(PAIRS))
    if loss == "ipo":
        ours = ipo_losses(margin, sure, tau=0.3).mean()
    else:
        ours = dpo_losses(margin, sure, beta=0.3, label_smoothing=smoothing).mean()
    return (ours.detach(), gradients(policy, ours)), (theirs.detach(), gradients(policy, theirs))


# ---- groups of samples ---------------------------------------------------------------------------------------------


def recorded_reward(completion_ids: list[list[int]], **_given: Any) -> list[float]:
    """Some reward that differs within groups: a function of the tokens."""
    return [((7 * sum(ids) + len(ids)) % 13) / 4.0 for ids in completion_ids]


def sampled(base: Path, folder: Path, kind: str, moved: int = 0, **options: Any) -> tuple[Any, dict[str, Any]]:
    """TRL's trainer and a batch that it generated, with its advantages and log-probs of a reference that may have
    moved."""
    torch.manual_seed(3)
    trainer_class, config_class = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    fields = {"per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP, "max_completion_length": LONGEST}
    arguments = config_class(**common(folder), **{**fields, "beta": KL, "temperature": 1.0, **options})
    prompts = [{"prompt": text} for text in ("hello refund", "hello delivery refund glad")]
    trainer = trainer_class(
        str(base),
        reward_funcs=recorded_reward,
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    if moved:
        trainer.ref_model.load_state_dict(causal(base, moved).state_dict())
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    record = trainer._generate_and_score_completions([row for row in prompts for _ in range(GROUP)])
    return trainer, record


def real(record: dict[str, Any], part: str) -> list[list[int]]:
    """Token ids of the batch's prompts or completions without padding."""
    rows = zip(record[f"{part}_ids"], record[f"{part}_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def our_batch(record: dict[str, Any]) -> Batch:
    return Batch.of(real(record, "prompt"), real(record, "completion"), 0, CPU)


def cut(record: dict[str, Any]) -> Batch:
    """Makes the recorded replies of different lengths (an untrained policy never ends one); returns the batch."""
    for row, length in enumerate((9, 4, 7, 2, 8, 3, 5, 1)):
        record["completion_mask"][row, length:] = 0
    return our_batch(record)


def training_of(algorithm: str, **changes: Any) -> PolicyTraining:
    """As TRL is configured in ``sampled``."""
    fields = {
        "algorithm": algorithm,
        "prompts_per_step": 2,
        "samples_per_prompt": GROUP,
        "generation": {"max_new_tokens": LONGEST},
        "missing_eos_penalty": 0.0,
    }
    return PolicyTraining.model_validate({**fields, **changes})


def our_loss(
    training: PolicyTraining, experience: Experience, targets: Targets, batch: Batch, logprobs: Tensor
) -> Tensor:
    """The loop's loss of a batch as one mini batch; its replies may be cut shorter than they were in ``experience``."""
    weights = loss_weights(batch.lengths, batch.width, training)
    part = Slice.of(experience, targets, weights, targets.rows.tolist(), batch.width, CPU)
    objective = Objective(training, kl_loss_coefficient(training, Prices(KL)))
    return objective(logprobs, torch.zeros_like(logprobs), part).total


def grpo(base: Path, folder: Path, loss_type: str, scale: str) -> dict[str, tuple[Tensor, Tensor]]:
    """name → (ours, TRL's): advantages, reference log-probs, loss and gradient off policy, with the KL in the loss."""
    trainer, record = sampled(
        base, folder, "grpo", loss_type=loss_type, scale_rewards=scale, use_bias_correction_kl=True, epsilon=0.1
    )
    scores = recorded_reward(real(record, "completion"))
    batch = cut(record)
    mask = batch.mask()
    reference = score_tokens(causal(base), batch, 1.0).logprobs.detach()
    old = reference + 0.2 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(9)) * mask
    record["old_per_token_logps"] = old
    record["num_items_in_batch"] = mask.sum()
    policy = trainer.model
    policy.load_state_dict(causal(base, moved=2).state_dict())
    theirs = trainer._compute_loss(policy, record)
    training = training_of(
        "GRPO",
        grpo={"scale": scale},
        kl={"placement": "loss", "estimator": "k3"},
        loss_normalization={"grpo": "sequence", "dapo": "token", "dr_grpo": "maxLength"}[loss_type],
        ppo={"clip": 0.1},
    )
    experience = experience_of(real(record, "completion"), scores, logprobs=old, sampled=old, reference=reference)
    targets = estimate(experience, training, Prices(KL))
    loss = our_loss(training, experience, targets, batch, score_tokens(policy, batch, 1.0).logprobs)
    return {
        "advantages": (targets.advantages[:, 0], record["advantages"]),
        "reference": (reference, record["ref_per_token_logps"] * mask),
        "loss": (loss.detach(), theirs.detach()),
        "gradient": (gradients(policy, loss), gradients(policy, theirs)),
    }


def rloo(base: Path, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Advantages with the KL to a reference elsewhere in the reward, and the gradient of the first update. Later
    updates differ by design: TRL clips one ratio per reply, we clip one per token."""
    trainer, record = sampled(base, folder, "rloo", moved=3)
    training, policy, whole = training_of("RLOO", loss_normalization="maxLength"), trainer.model, our_batch(record)
    responses = real(record, "completion")
    before, reference = (score_tokens(lm, whole, 1.0).logprobs.detach() for lm in (policy, causal(base, moved=3)))
    experience = experience_of(
        responses, recorded_reward(responses), logprobs=before, sampled=before, reference=reference
    )
    targets = estimate(experience, training, Prices(KL))
    recorded = record["old_logps"]
    batch = cut(record)
    logprobs = score_tokens(policy, batch, 1.0).logprobs
    record["old_logps"] = logprobs.detach().sum(dim=1)
    loss = LONGEST * our_loss(training, experience, targets, batch, logprobs)  # TRL sums over a reply's tokens
    return {
        "advantages": (targets.advantages[:, 0], record["advantages"]),
        "old": (before.sum(dim=1), recorded),
        "gradient": (gradients(policy, loss), gradients(policy, trainer._compute_loss(policy, record))),
    }
