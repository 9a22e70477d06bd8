"""vLLM behind the ``Generator`` protocol: the optional engine of training images that bring it along.

The engine runs in the trainer's process (colocated) and is given the policy's weights before every rollout. Whether it
holds them is not believed but measured: the loops compare its log-probabilities with the trainer's after each sync.
Its draws are its own, so a run is repeatable only with the same vLLM.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_trainer.exits import Invalid
from rlhf_trainer.generate.base import Completion, FinishReason, Request, SampleKey, SamplingParams
from rlhf_trainer.randomness import generator


class VLLMGenerator:
    """One engine per rank, made once; ``load`` gives it weights, ``generate`` samples."""

    def __init__(self, path: Path | str, *, eos_id: int, max_length: int, memory_share: float = 0.3) -> None:
        """``path``: the base policy's folder; ``max_length``: prompt and response; ``memory_share`` of the GPU.

        Raises Invalid where vLLM is not installed.
        """
        # In one process, so that weights can be handed over as tensors.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise Invalid(
                f"training.generation.engine is vllm, which this trainer image does not have ({error}); "
                "use an image with vllm, or engine local"
            ) from error
        self._eos_id = eos_id
        self._engine = self._vllm.LLM(
            model=str(path),
            skip_tokenizer_init=True,
            max_model_len=max_length,
            gpu_memory_utilization=memory_share,
            # Of the distribution that tokens are drawn from, at temperature, as the trainer's are.
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=False,
        )

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the engine's weights by these, under the names of the Hugging Face checkpoint."""
        worker = self._engine.llm_engine.model_executor.driver_worker
        worker.model_runner.model.load_weights(list(weights))

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        asked = [self._params(request.key, params) for request in requests]
        outputs = self._engine.generate(prompts, asked, use_tqdm=False)
        return [self._completion(output.outputs[0]) for output in outputs]

    def _params(self, key: SampleKey, params: SamplingParams) -> Any:
        """No top-p, top-k or penalty: the trainer differentiates the whole distribution."""
        seed = int(generator(key.seed, key.stream, key.step, key.sample).integers(2**31))
        return self._vllm.SamplingParams(
            max_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=1.0,
            top_k=0,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=[self._eos_id],
            detokenize=False,
            seed=seed,
        )

    def _completion(self, output: Any) -> Completion:
        tokens = tuple(int(token) for token in output.token_ids)
        logprobs = tuple(float(found[token].logprob) for token, found in zip(tokens, output.logprobs, strict=True))
        reason: FinishReason = "stop" if tokens[-1:] == (self._eos_id,) else "length"
        if reason != output.finish_reason:
            raise RuntimeError(
                f"vllm ended a response for the reason {output.finish_reason!r} with token {tokens[-1:]}, "
                f"end of sequence is {self._eos_id}"
            )
        return Completion(tokens, logprobs, reason)
