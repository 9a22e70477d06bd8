"""DeepSpeed, imported in the one place and way in which it neither looks for GPUs nor starts compilers nor chatters."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

# DeepSpeed probes the accelerator by import; say "cpu" before that where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops

# Answered before the first question, which would start compilers: no optional op is wanted, least of all the
# shared-memory all-reduce, which is compiled on first use (over a minute) and adds in an order of its own.
vars(deepspeed.ops).setdefault("__compatible_ops__", {})

# DeepSpeed's own use of torch; a reader of the log can do nothing about it.
warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)


def _import_without_compiler(module: str) -> None:
    """Imports a module whose ``torch.compile`` decorators would load all of the compiler, seconds per process."""
    patched: Any = torch
    compiler = patched.compile
    patched.compile = lambda function=None, **_: (lambda same: same) if function is None else function
    try:
        importlib.import_module(module)
    finally:
        patched.compile = compiler


# The first ZeRO engine imports this optimiser only to ask whether it was given it.
_import_without_compiler("deepspeed.runtime.zero.muon.original_muon")


def make_universal(source: Path, target: Path) -> None:
    """DeepSpeed's offline conversion, in this process and without its chatter."""
    converter = importlib.import_module("deepspeed.checkpoint.ds_to_universal")
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: children would load torch and DeepSpeed once more
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # the version entry that ZeRO-1 and 2 need; nothing else is known to be missing
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        converter.main(options)


__all__ = ["deepspeed", "make_universal"]
