"""What a user may say about learning from given texts: preferences, demonstrations, a teacher."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from rlhf_trainer.config.base import Fraction, Spec

Beta = Annotated[float, Field(gt=0.0, le=100.0)]


class PreferenceLoss(StrEnum):
    """sigmoid: DPO (Rafailov et al. 2023), with labelSmoothing cDPO (Mitchell 2023); ipo: Azar et al. 2023."""

    SIGMOID = "sigmoid"
    IPO = "ipo"


class DPO(Spec):
    """Direct preference optimisation: the pairs of spec.preferences train the policy without a reward model."""

    loss: PreferenceLoss = PreferenceLoss.SIGMOID
    beta: Beta = Field(0.1, description="Strength of the pull to the reference; for ipo its tau.")
    label_smoothing: Annotated[float, Field(ge=0.0, le=0.49)] = Field(
        0.0, description="Share of labels taken to be flipped (cDPO); soft labels of the data come on top."
    )


class KTO(Spec):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024): every response of spec.preferences is good or bad."""

    beta: Beta = Field(0.1, description="Risk aversion: sharpness of the value function.")
    desirable_weight: Annotated[float, Field(gt=0.0, le=100.0)] = Field(1.0, description="Weight of good responses.")
    undesirable_weight: Annotated[float, Field(gt=0.0, le=100.0)] = Field(1.0, description="Weight of bad ones.")


class DistillationMode(StrEnum):
    """sequence: learn the teacher's samples (Kim & Rush 2016); onPolicy: match it on the student's own (GKD)."""

    SEQUENCE = "sequence"
    ON_POLICY = "onPolicy"


class Divergence(StrEnum):
    """Per token: forward KL(teacher‖student), reverse KL(student‖teacher), or generalised Jensen-Shannon."""

    FORWARD = "forward"
    REVERSE = "reverse"
    JENSEN_SHANNON = "jensenShannon"


class Distillation(Spec):
    """A smaller policy learns from spec.teacher."""

    mode: DistillationMode = DistillationMode.ON_POLICY
    divergence: Divergence = Divergence.FORWARD
    on_policy_fraction: Fraction = Field(
        0.5, description="Share of prompts answered by the student; the teacher answers the rest (onPolicy)."
    )
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="Weight of the teacher in the mixture of jensenShannon (Agarwal et al. 2023)."
    )
