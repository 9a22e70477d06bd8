"""What a model folder says about itself without its weights being loaded: config.json and the tensors' headers."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_trainer.exits import Invalid

_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder. ``shapes``: every tensor of its safetensors files by name; empty where there are none."""

    name: str  # the field of the spec
    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model was made for; None where its config does not say."""
        values = [self.config.get(field) for field in _LENGTH_FIELDS]
        return next((value for value in values if isinstance(value, int) and value > 0), None)


def read_model(name: str, path: Path) -> ModelFolder:
    """Raises Invalid for a folder that no model can be loaded from, naming the file that is at fault."""
    config = _read_json(path / "config.json", name)
    if not isinstance(config.get("model_type"), str):
        raise Invalid(f"spec.{name}: {path / 'config.json'}: field 'model_type' is missing; give a Hugging Face model")
    if config.get("is_encoder_decoder"):
        raise Invalid(f"spec.{name}: {path / 'config.json'}: an encoder-decoder; give a decoder-only model")
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index, name).get("weight_map")
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        for shard in sorted(str(shard) for shard in shards):
            if not (path / shard).is_file():
                raise Invalid(f"spec.{name}: {path / shard} is missing, {index.name} names it; copy the whole folder")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        shapes |= _read_shapes(file, name)
    if not shapes and not list(path.glob("*.bin")):
        raise Invalid(f"spec.{name}: {path} holds no *.safetensors; save the model's weights there")
    model = ModelFolder(name, path, config, shapes)
    _check_embeddings(model)
    return model


def parameters_in(path: Path, name: str = "model") -> int:
    """Parameters in a folder's safetensors files, by their headers."""
    shapes = (shape for file in path.glob("*.safetensors") for shape in _read_shapes(file, name).values())
    return sum(math.prod(shape) for shape in shapes)


def check_context(model: ModelFolder, needed: int, fields: str) -> None:
    """``needed`` tokens must fit the positions the model knows."""
    if model.max_positions is not None and needed > model.max_positions:
        raise Invalid(
            f"spec.{model.name}: {model.path / 'config.json'} allows {model.max_positions} positions, {fields} need "
            f"{needed}; lower them or choose a model with a longer context"
        )


def check_lora_targets(model: ModelFolder, targets: list[str]) -> None:
    """Every name must end the path of some linear layer, or the adapters would silently train nothing there."""
    matrices = {name.removesuffix(".weight") for name, shape in model.shapes.items() if len(shape) == 2}
    if not matrices:
        return
    known = sorted({name.rsplit(".", 1)[-1] for name in matrices})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in matrices):
            raise Invalid(
                f"training.lora.targetModules names '{target}', which {model.path} does not have; "
                f"its layers are {', '.join(known[:20])}"
            )


def _check_embeddings(model: ModelFolder) -> None:
    vocabulary = model.config.get("vocab_size")
    for name, shape in model.shapes.items():
        if name.endswith(_EMBEDDINGS) and isinstance(vocabulary, int) and shape and shape[0] != vocabulary:
            raise Invalid(
                f"spec.{model.name}: {model.path}: tensor '{name}' has {shape[0]} rows, config.json says vocab_size "
                f"{vocabulary}; the two files are of different models"
            )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise Invalid(f"spec.{name}: {path}: {error.strerror}; give a Hugging Face model folder") from error
    except ValueError as error:
        raise Invalid(f"spec.{name}: {path}: not JSON ({error}); copy the model again") from error
    if not isinstance(document, dict):
        raise Invalid(f"spec.{name}: {path}: a JSON {type(document).__name__}, not an object; copy the model again")
    return document


def _read_shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor; a file whose size is not what its header says was cut while it was copied."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = {key: value for key, value in json.loads(file.read(length)).items() if key != "__metadata__"}
        shapes = {key: tuple(int(each) for each in value["shape"]) for key, value in header.items()}
        end = 8 + length + max((int(value["data_offsets"][1]) for value in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise Invalid(f"spec.{name}: {path}: not a safetensors file ({error}); copy the model again") from error
    if path.stat().st_size != end:
        raise Invalid(f"spec.{name}: {path} has {path.stat().st_size} bytes, its header says {end}; copy it again")
    return shapes
