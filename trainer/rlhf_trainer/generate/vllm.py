"""vLLM behind the ``Generator`` protocol: the optional engine of training images that bring it along.

One engine per rank runs in the trainer's process (colocated), in the process group that is there, and is given the
policy's weights before every rollout. Whether it holds them is not believed but measured: the loops compare its
log-probabilities with the trainer's after each sync. Its draws are its own, so a run is repeatable only with the same
vLLM.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_trainer.exits import Invalid
from rlhf_trainer.generate.base import Completion, FinishReason, Request, SampleKey, SamplingParams
from rlhf_trainer.randomness import generator

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # training pods tell nobody what they run
    # Its warnings are for servers, and after every sync they tell of rotary embeddings that no checkpoint has.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RANK": "0",  # torchrun's, which the external launcher insists on; missing where one process runs without it
}
# On CPU a share of memory would be taken whole, and at once. VLLM_CPU_KVCACHE_SPACE, in GiB, goes before this.
_CPU_CACHE_BYTES = 256 << 20


class VLLMGenerator:
    """Made once per run, by all ranks together; ``load`` gives it weights, ``generate`` samples."""

    def __init__(
        self,
        path: Path | str,
        *,
        eos_id: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
        memory_share: float = 0.3,
    ) -> None:
        """``path``: the base policy's folder; ``max_length``: prompt and response; ``dtype``: of weights and cache;
        ``memory_share`` of the GPU.

        Raises Invalid where vLLM is not installed or cannot run the policy.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._vllm = _import()
        self._eos_id = eos_id
        try:
            self._engine = self._vllm.LLM(
                model=str(path),
                skip_tokenizer_init=True,
                max_model_len=max_length,
                dtype=str(dtype).removeprefix("torch."),
                # An engine for each process of torchrun, in that process: weights are handed over as tensors.
                distributed_executor_backend="external_launcher",
                # Of the distribution that tokens are drawn from, at temperature, as the trainer's are.
                logprobs_mode="processed_logprobs",
                enable_prefix_caching=False,
                **_memory(device, memory_share),
            )
        except (ValueError, NotImplementedError) as error:
            if "memory" in str(error).lower():  # not the policy's fault: the GPU's last owner may not be gone yet
                raise RuntimeError(f"vllm: {error}") from error
            raise Invalid(
                f"training.generation.engine is vllm, which cannot run the policy with {max_length} tokens of prompt "
                f"and response ({error}); choose engine local"
            ) from error
        _keep_process_group(self._engine)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the engine's weights by these, under the names of the Hugging Face checkpoint."""
        # Not the model's own load_weights(): it knows nothing of weights that were packed for kernels.
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

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
            ignore_eos=True,  # those that generation_config.json names beside the tokenizer's
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


def _import() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise Invalid(
            f"training.generation.engine is vllm, which this trainer image does not have ({error}); "
            "use an image with vllm, or engine local"
        ) from error


def _keep_process_group(engine: Any) -> None:
    """An engine that is collected, or still there at the end of the process, would destroy all process groups: the
    trainer's too."""
    finalizer = getattr(engine.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()


def _memory(device: torch.device, share: float) -> dict[str, Any]:
    """Options of the engine that bear on its memory; on CPU also none of its compiling, which wants a compiler."""
    if device.type == "cpu":
        return {"kv_cache_memory_bytes": _CPU_CACHE_BYTES, "enforce_eager": True}
    return {"gpu_memory_utilization": share}
