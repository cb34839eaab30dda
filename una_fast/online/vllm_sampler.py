"""Sampling by vLLM in this process, with the weights of the policy handed over before every rollout.

Imported only when `generation: vllm` is chosen; vLLM is installed by the user.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from una_fast.model.export import whole_weights
from una_fast.model.policy import Policy
from una_fast.online.sampling import Completion, SamplerError, Sampling

with contextlib.suppress(ImportError):
    import vllm

GPU_MEMORY_SHARE = 0.3  # of the device, for vLLM's copy of the weights and its cache


class VllmSampler:
    """A `rollout.Sampler`. model: directory or hub name that vLLM builds the model from, before it gets the policy's
    weights."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        model: str,
        trust_remote_code: bool = False,
    ) -> None:
        if "vllm" not in globals():
            raise ValueError(
                "generation=vllm, but vllm is not installed; pip install vllm, or set generation: padded"
            )
        self.policy, self.sampling = policy, sampling
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
            "0"  # the model in this process, where weights can be given to it
        )
        self.llm = vllm.LLM(
            model=model,
            tokenizer=tokenizer.name_or_path,
            trust_remote_code=trust_remote_code,
            dtype=str(policy.causal_lm.dtype).removeprefix("torch."),
            gpu_memory_utilization=GPU_MEMORY_SHARE,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
        )

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        *,
        seed: int,
        samples: int | None = None,
        version: int = 0,
    ) -> list[list[Completion]]:
        self._hand_over()
        asked = self.sampling
        samples = samples or asked.samples
        settings = [
            vllm.SamplingParams(
                n=samples,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=0,
                max_tokens=asked.max_new_tokens,
                stop_token_ids=list(asked.stop_ids),
                stop=list(asked.stop_strings) or None,
                include_stop_str_in_output=True,
                seed=(seed + number * samples)
                % 2**31,  # sample k of a prompt is drawn with seed + k
                logprobs=0,  # of the drawn tokens alone
            )
            for number in range(len(prompts))
        ]
        given = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        outputs = self.llm.generate(given, settings, use_tqdm=False)
        return [
            [self._completion(sample, version) for sample in output.outputs] for output in outputs
        ]

    @torch.no_grad()
    def _hand_over(self) -> None:
        """The weights of the policy, adapters added in, under the names of the model."""
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(iter(whole_weights(self.policy).items()))
        self.llm.reset_prefix_cache()

    def _completion(self, sample: Any, version: int) -> Completion:
        ids = np.array(sample.token_ids, dtype=np.int32)
        if not len(ids):
            raise SamplerError("vLLM gave a response without tokens; set generation: padded")
        logp = sum(
            step[int(token)].logprob for step, token in zip(sample.logprobs, ids, strict=True)
        )
        return Completion(ids, sample.finish_reason == "stop", float(logp), version)
