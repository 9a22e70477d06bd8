"""How much continuous batching gives the builtin policy server.

    python -m benchmarks gateway_serving

The desk's base model with random weights, greedy, 40 tokens an answer; all rows join at once. One row at a time is what
a plain worker queue would give. Processor time is reported beside wall time, because other work on the machine moves
the latter.
"""

from __future__ import annotations

import os
import statistics
import time

import torch

from benchmarks.report import Report
from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.serve.batch import Batch, Row

TOKENS = 40
REPEATS = 9
SIZES = (1, 4, 16, 64)
PACKAGES = ("torch", "transformers")


def once(model: object, pad_id: int, prompt: tuple[int, ...], size: int) -> tuple[float, float]:
    """Seconds of (wall, processor) for `size` answers."""
    wall, processor = time.perf_counter(), time.process_time()
    batch = Batch(model, pad_id)
    batch.join([Row(prompt, 0.0, seed) for seed in range(size)])
    for _ in range(TOKENS - 1):
        batch.step()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).eval()
    prompt = tuple(tokenizer("hello my parcel is late be warm").input_ids)
    report = Report("gateway_serving", "Continuous batching in the builtin policy server", PACKAGES)
    for size in SIZES:
        once(model, tokenizer.pad_token_id, prompt, size)
        found = [once(model, tokenizer.pad_token_id, prompt, size) for _ in range(REPEATS)]
        for label, place in (("wall", 0), ("processor", 1)):
            rates = sorted(size * TOKENS / pair[place] for pair in found)
            spread = f"{rates[0]:.0f} to {rates[-1]:.0f} tokens/s"
            name = f"{size} answers at once, by {label} time"
            report.add(name, statistics.median(rates), "tokens/s", samples=REPEATS, spread=spread)
    report.note(
        "One thread; a 60,000-parameter Llama, so almost all of it is the cost of a call, which batching shares."
    )
    report.note(f"Load average of the machine meanwhile: {os.getloadavg()[0]:.1f}.")
    report.write()


if __name__ == "__main__":
    main()
