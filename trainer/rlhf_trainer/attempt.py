"""Reading the attempt's configuration and writing its result: the edges that launcher, worker and reporter share.

No torch. Paths come from the environment so that tests and other clusters can move them.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rlhf_trainer.checkpoint import attempt_folder, sync_folder
from rlhf_trainer.exits import Invalid
from rlhf_trainer.wire import ATTEMPT_CONFIG_PATH, STATUS_PORT, AttemptConfig, Result

CONFIG_VARIABLE = "RLHF_ATTEMPT_CONFIG"
TERMINATION_LOG_VARIABLE = "RLHF_TERMINATION_LOG"
STATUS_PORT_VARIABLE = "RLHF_STATUS_PORT"
RESULT_FILE = "result.json"


def read_config() -> AttemptConfig:
    """Raises Invalid naming the file and the first field that is wrong."""
    path = Path(os.environ.get(CONFIG_VARIABLE, ATTEMPT_CONFIG_PATH))
    try:
        return AttemptConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}; the pod needs the attempt's ConfigMap mounted there") from error
    except ValidationError as error:
        raise Invalid(f"{path}: {describe(error)}; correct the resource it comes from and create it anew") from error


def describe(error: ValidationError) -> str:
    """The first thing that is wrong with an AttemptConfig, in one line; an unknown field with the nearest known one."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "the document"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] != "extra_forbidden":
        return f"{field}: {' '.join(first['msg'].split())}{more}"
    name, known = str(first["loc"][-1]), _fields_at(AttemptConfig, first["loc"][:-1])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
    return f"{field}: there is no such field; {hint}{more}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The names a user may write at ``location``: the aliases of the model that lies there."""
    for part in location:
        field = next((each for name, each in model.model_fields.items() if part in (name, each.alias)), None)
        if field is not None:
            model = next(_models_in(field.annotation), model)
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside an annotation: ``Lora | None``, ``list[Constraint]``, ``Annotated[...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def status_port() -> int:
    return int(os.environ.get(STATUS_PORT_VARIABLE, str(STATUS_PORT)))


def result_path(config: AttemptConfig) -> Path:
    return attempt_folder(Path(config.output.path), config.attempt) / RESULT_FILE


def write_result(path: Path, result: Result) -> None:
    """Atomically: a reader sees the whole result or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w") as file:
        file.write(json.dumps(json.loads(result.to_json()), indent=1))
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync_folder(path.parent)


def write_termination_message(result: Result) -> None:
    path = Path(os.environ.get(TERMINATION_LOG_VARIABLE, "/dev/termination-log"))
    path.write_text(result.compact())
