"""Reward models: heads on causal language models, K of them, and the calibrated scorer that others load.

On disk: ``members/<k>/`` are ordinary Hugging Face sequence-classification folders (label 0 is the reward, one more
label for each aspect; tokenizer included), ``calibration.json`` says how text becomes tokens and how raw scores become
one reward, ``manifest.json`` where everything came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_trainer.data.encoding import Encoder, pad_right
from rlhf_trainer.data.recipe import Recipe
from rlhf_trainer.exits import Invalid
from rlhf_trainer.models.packing import row_states
from rlhf_trainer.randomness import Stream, torch_generator

OVERALL = "reward"  # label 0 of every member
CALIBRATION_FILE = "calibration.json"


class RewardMember(nn.Module):
    """One backbone and its heads. Scores come from the last real token, found by length, never by pad id."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_base(
        cls, path: Path, pad_id: int, generator: torch.Generator, aspects: Sequence[str] = ()
    ) -> RewardMember:
        """A causal LM's backbone with fresh heads of std 1/sqrt(h+1) (Stiennon et al. 2020): the reward, then the
        aspects. Dropout is off: noise in the scores of a pair is noise in its label."""
        names = dict(enumerate((OVERALL, *aspects)))
        model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=len(names), id2label=names, pad_token_id=pad_id, dtype=torch.float32
        )
        head = _head(model, path)
        with torch.no_grad():
            head.weight.normal_(0.0, 1.0 / math.sqrt(head.in_features + 1), generator=generator)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return cls(model)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Right-padded ids [B, T] and lengths [B] → float32 scores [B, H]: the reward, then the aspects."""
        states, places = row_states(self.model.base_model, ids, lengths)
        last = places.gather(1, lengths[:, None] - 1)[:, 0]
        scores: Tensor = self.model.score(states[last]).float()
        return scores


class RewardEnsemble(nn.Module):
    """K members in one module, so one engine trains them all: K times the memory of one, sharded by ZeRO.

    They share no parameter; a loss that sums over members trains each on its own rows.
    """

    def __init__(self, members: Sequence[RewardMember]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @classmethod
    def from_base(cls, path: Path, count: int, pad_id: int, seed: int, aspects: Sequence[str] = ()) -> RewardEnsemble:
        generators = [torch_generator(seed, Stream.INITIALISATION, step=index) for index in range(count)]
        return cls([RewardMember.from_base(path, pad_id, generator, aspects) for generator in generators])

    @property
    def heads(self) -> int:
        """H: the reward and the aspects."""
        member: Any = self.members[0]
        return int(member.model.config.num_labels)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids [K, B, T] and lengths [K, B], one batch per member → scores [K, B, H]: the reward, then the aspects."""
        pairs = zip(self.members, ids, lengths, strict=True)
        return torch.stack([member(rows, row_lengths) for member, rows, row_lengths in pairs])


@dataclass(frozen=True)
class RewardCalibration:
    """reward = mean over members of (raw - offset) / temperature: calibrated log-odds, centred on a reference set.

    The reference set (the held-out responses) is frozen with the model: nothing that is scored later moves the zero.
    """

    temperature: float
    offsets: tuple[float, ...]
    disagreement: float  # 95th percentile of the members' spread on the reference set
    scale: float = 1.0  # standard deviation of the reward on the reference set

    def apply(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """raw [K, B] → mean [B] and standard deviation over members [B] (zero for one member)."""
        offsets = torch.tensor(self.offsets, dtype=torch.float32, device=raw.device)
        scaled = (raw.float() - offsets[:, None]) / self.temperature
        return scaled.mean(dim=0), scaled.std(dim=0, unbiased=False)

    def standardise(self, rewards: Tensor) -> Tensor:
        """Rewards in standard deviations of the reference set: comparable between reward models."""
        return rewards / self.scale


def normaliser(raw: Tensor, temperature: float) -> RewardCalibration:
    """The calibration whose reference set scored ``raw`` [K, N]; the identity but for temperature when it is empty."""
    members, count = raw.shape
    if not count:
        return RewardCalibration(temperature, (0.0,) * members, 0.0)
    offsets = tuple(raw.double().mean(dim=1).tolist())
    mean, spread = RewardCalibration(temperature, offsets, 0.0).apply(raw)
    scale = float(mean.double().std(unbiased=False))
    return RewardCalibration(temperature, offsets, float(spread.double().quantile(0.95)), scale or 1.0)


class RewardScorer:
    """A loaded reward model: texts in, rewards out."""

    def __init__(self, ensemble: RewardEnsemble, encoder: Encoder, calibration: RewardCalibration) -> None:
        self.ensemble = ensemble.eval().requires_grad_(False)
        self.encoder = encoder
        self.calibration = calibration

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = 256
    ) -> tuple[Tensor, Tensor]:
        """Reward and ensemble disagreement of each finished response: two float32 tensors [B] on the CPU."""
        return self.score_ids(self.encoder.pairs(prompts, responses), batch_size)

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]], batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """As calling with texts, for token ids of prompt, response and end of sequence."""
        device = next(self.ensemble.parameters()).device
        parts = []
        for start in range(0, len(rows), batch_size):
            ids, lengths = to_batch(rows[start : start + batch_size], self.encoder.pad_id)
            count = len(self.ensemble.members)
            raw = self.ensemble(*(each.to(device).expand(count, *each.shape) for each in (ids, lengths)))
            parts.append(raw[..., 0])
        mean, spread = self.calibration.apply(torch.cat(parts, dim=1))
        return mean.cpu(), spread.cpu()


def to_batch(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] and lengths [B]."""
    ids, mask = pad_right(rows, pad_id)
    return ids, mask.sum(dim=1)


def load_reward_model(
    path: Path | str, device: torch.device | str = "cpu", encoder: Encoder | None = None
) -> RewardScorer:
    """The scorer of the artifact at ``path``, for text that ``encoder`` (the policy's) reads and writes.

    Raises Invalid where it is not one this version can score with, and where text would become other tokens than in
    its training: in its own folder's tokenizer, or in ``encoder``.
    """
    root = Path(path)
    calibration, recipe = _read_calibration(root / CALIBRATION_FILE)
    folders = _members(root, calibration)
    own = Encoder(AutoTokenizer.from_pretrained(folders[0]))
    _require(root, recipe, Recipe.of(own), "the tokenizer in its own folder")
    if encoder is not None:
        _require(root, recipe, Recipe.of(encoder), "the policy's tokenizer")
    models = [AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    ensemble = RewardEnsemble([RewardMember(model) for model in models]).to(device)
    return RewardScorer(ensemble, own, calibration)


def check_reward_model(path: Path | str, encoder: Encoder) -> None:
    """Raises Invalid where the reward model at ``path`` is not whole, or was trained on text laid out otherwise than
    by ``encoder``. Loads no weights."""
    root = Path(path)
    calibration, recipe = _read_calibration(root / CALIBRATION_FILE)
    _members(root, calibration)
    _require(root, recipe, Recipe.of(encoder), "the policy's tokenizer")


def _members(root: Path, calibration: RewardCalibration) -> list[Path]:
    """The folders of the ensemble's members, all of which must be there."""
    folders = [root / "members" / str(index) for index in range(len(calibration.offsets))]
    missing = [str(folder) for folder in folders if not (folder / "config.json").is_file()]
    if missing:
        raise Invalid(f"{root}: not a complete reward model, missing {', '.join(missing)}", "DigestMismatch")
    return folders


def _require(root: Path, stored: Recipe, found: Recipe, whose: str) -> None:
    differences = stored.differences(found)
    if differences:
        raise Invalid(
            f"{root}: scores text laid out as in its training, and {whose} lays it out otherwise: "
            f"{'; '.join(differences)}; train the reward model from the same base"
        )


def save_reward_model(
    folder: Path,
    ensemble: RewardEnsemble,
    weights: Mapping[str, Tensor],
    encoder: Encoder,
    calibration: RewardCalibration,
) -> None:
    """Writes members and calibration; ``weights`` is the engine's consolidated state dict of the ensemble."""
    for index, member in enumerate(ensemble.members):
        prefix = f"members.{index}.model."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        target = folder / "members" / str(index)
        model: Any = member.model
        model.save_pretrained(target, state_dict=own)
        encoder.tokenizer.save_pretrained(target)
    document = {
        "formatting": Recipe.of(encoder).document(),
        "temperature": calibration.temperature,
        "offsets": list(calibration.offsets),
        "disagreement": calibration.disagreement,
        "scale": calibration.scale,
    }
    (folder / CALIBRATION_FILE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _read_calibration(path: Path) -> tuple[RewardCalibration, Recipe]:
    try:
        document = json.loads(path.read_text())
        recipe = Recipe.from_document(document["formatting"])
        calibration = RewardCalibration(
            float(document["temperature"]),
            tuple(map(float, document["offsets"])),
            float(document["disagreement"]),
            float(document["scale"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Invalid(
            f"{path}: not the calibration of a reward model ({error}); give a RewardModelJob's artifact"
        ) from error
    return calibration, recipe


def _head(model: Any, path: Path) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise Invalid(
            f"{path}: {type(model).__name__} has no linear 'score' head; use a decoder-only model "
            "(Llama, Qwen, Mistral, GPT-2, GPT-NeoX, ...)"
        )
    return head
