"""Reading the attempt's configuration and writing its result: the edges that launcher, worker and reporter share.

No torch. Paths come from the environment so that tests and other clusters can move them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError

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
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise Invalid(f"{path}: {field}: {first['msg']} ({error.error_count()} errors)") from error


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
