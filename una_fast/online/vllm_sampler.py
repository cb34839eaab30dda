"""Sample by vLLM in this process, with the policy's weights handed over before every call.

Imported only with `generation: vllm`; vLLM is installed by the user.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from una_fast.model.export import whole_weights
from una_fast.model.places import split_revision
from una_fast.model.policy import Policy
from una_fast.online.sampling import Completion, SamplerError, Sampling

try:
    import vllm
except ImportError:
    vllm = None

GPU_MEMORY_SHARE = 0.3  # of the device, for vLLM's copy of the weights and its cache


class VllmSampler:
    """A `sampling.Sampler` by vLLM."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        model: str,
        trust_remote_code: bool = False,
    ) -> None:
        """Start vLLM.

        policy: draws the samples
        tokenizer: of the policy
        sampling: settings of the samples
        model: directory or hub name; vLLM builds the model from this before the first call
        trust_remote_code: run code that comes with the model

        ValueError without vLLM.
        """
        if vllm is None:
            raise ValueError(
                "generation=vllm, but vllm is not installed; pip install vllm, "
                "or set generation: padded"
            )
        self.policy = policy
        self.sampling = sampling
        # The model stays in this process, so that weights can be given to the model.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        name, revision = split_revision(model)
        self.llm = vllm.LLM(
            model=name,
            revision=revision,
            tokenizer=tokenizer.name_or_path,
            tokenizer_revision=revision,
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
        """Return the completions of every prompt; parameters as in `sampling.Sampler`."""
        self._hand_over()
        samples = samples or self.sampling.samples
        # vLLM draws sample k of a prompt with seed + k.
        settings = [
            self._settings(samples, (seed + number * samples) % 2**31)
            for number in range(len(prompts))
        ]
        asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        outputs = self.llm.generate(asked, settings, use_tqdm=False)
        completions = []
        for output in outputs:
            completions.append([self._completion(sample, version) for sample in output.outputs])
        return completions

    def _settings(self, samples: int, seed: int) -> Any:
        sampling = self.sampling
        return vllm.SamplingParams(
            n=samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.stop_ids),
            stop=list(sampling.stop_strings) or None,
            include_stop_str_in_output=True,
            seed=seed,
            logprobs=0,  # of the drawn tokens alone
        )

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Give vLLM the policy's weights, adapters added in, under the names of the model."""
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(iter(whole_weights(self.policy).items()))
        self.llm.reset_prefix_cache()

    def _completion(self, sample: Any, version: int) -> Completion:
        ids = np.array(sample.token_ids, dtype=np.int32)
        if not len(ids):
            raise SamplerError("vLLM gave a response without tokens; set generation: padded")
        logp = 0.0
        for token, logprobs in zip(ids, sample.logprobs, strict=True):
            logp += logprobs[int(token)].logprob
        return Completion(ids, sample.finish_reason == "stop", float(logp), version)
