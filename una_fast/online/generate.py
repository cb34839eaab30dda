"""Sample by transformers: padded generation and continuous batching.

Both samplers compute a prompt once for all samples of the prompt: `padded` repeats the prompt's
cache, `continuous` shares the pages of the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.generation.stopping_criteria import StopStringCriteria

from una_fast.head.ops import gather_logps
from una_fast.model.policy import Policy
from una_fast.model.scoring import Scoring
from una_fast.online.sampling import Completion, SamplerError, Sampling

PAGE = 32  # tokens per page of the cache of continuous batching


class TransformersSampler:
    """Samples by `model.generate` on left-padded batches, of any model, with LoRA and FSDP2.

    Under FSDP2 all ranks must call `sample` equally often.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        scoring: Scoring | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Keep the policy.

        policy: draws the samples
        tokenizer: of the policy
        sampling: settings of the samples
        scoring: dtype of autocast
        batch_size: sequences generated at a time; None: all
        """
        self.policy = policy
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.scoring = scoring or Scoring()
        self.batch_size = batch_size
        self.stop_strings = None
        if sampling.stop_strings:
            self.stop_strings = StopStringCriteria(tokenizer, list(sampling.stop_strings))

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        *,
        seed: int,
        samples: int | None = None,
        version: int = 0,
    ) -> list[list[Completion]]:
        """Return the completions of every prompt; parameters as in `sampling.Sampler`."""
        samples = samples or self.sampling.samples
        per_call = len(prompts)
        if self.batch_size is not None:
            per_call = max(1, self.batch_size // samples)
        # Prompts of similar length need little padding.
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        completions: list[list[Completion]] = [[] for _ in prompts]
        with _sampling_from(self.policy, self.scoring, seed):
            for start in range(0, len(prompts), per_call):
                chosen = by_length[start : start + per_call]
                drawn = iter(self._generate([prompts[i] for i in chosen], samples, version))
                for i in chosen:
                    completions[i] = [next(drawn) for _ in range(samples)]
        return completions

    def _generate(self, prompts: list[np.ndarray], samples: int, version: int) -> list[Completion]:
        """Return the samples of all prompts, prompt after prompt."""
        model = self.policy.causal_lm
        ids, mask = self._padded_left(prompts, model.device)
        config = _generation_config(self.sampling, self.tokenizer)
        with _own_generation_config(model, config):
            cache = _shared_prefill(model, ids, mask, samples)
            ids = ids.repeat_interleave(samples, 0)
            mask = mask.repeat_interleave(samples, 0)
            recorder = _Recorder(self.sampling.temperature)
            stops = []
            if self.stop_strings is not None:
                stops.append(_StopStrings(self.stop_strings, ids.shape[1]))
            output = model.generate(
                ids,
                generation_config=config,
                attention_mask=mask,
                logits_processor=[recorder],
                stopping_criteria=stops,
                **cache,
            )
        logps = recorder.logps(output[:, -1]).cpu().numpy()
        rows = output[:, ids.shape[1] :].cpu().numpy()
        ended = np.zeros(len(rows), dtype=np.int64)
        if stops:
            ended = stops[0].ended.cpu().numpy()
        return [
            self._cut(row, row_logps, int(end), version)
            for row, row_logps, end in zip(rows, logps, ended, strict=True)
        ]

    def _cut(self, row: np.ndarray, logps: np.ndarray, end: int, version: int) -> Completion:
        """Return a generated row up to the end.

        row: [T] token ids, with padding after the end
        logps: [T] float64
        end: tokens up to the end of a stop string; 0 without a stop string
        version: of the policy
        """
        if end > 0:
            row = row[:end]
        stops = np.flatnonzero(np.isin(row, self.sampling.stop_ids))
        kept = int(stops[0]) + 1 if stops.size else len(row)
        return Completion(
            ids=row[:kept].astype(np.int32),
            finished=bool(stops.size or end > 0),
            logp=float(logps[:kept].sum()),
            version=version,
        )

    def _padded_left(
        self, prompts: list[np.ndarray], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask of prompts padded on the left, [B, P] int64 each."""
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


class ContinuousSampler(TransformersSampler):
    """Samples by transformers' continuous batching: no padding, finished sequences make room.

    For one process, and for models with attention by transformers' attention interface. Without
    stop_strings, and without top_p: log-probs would be of the cut distribution.
    """

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        *,
        seed: int,
        samples: int | None = None,
        version: int = 0,
    ) -> list[list[Completion]]:
        """Return the completions of every prompt; parameters as in `sampling.Sampler`."""
        samples = samples or self.sampling.samples
        config = _generation_config(self.sampling, self.tokenizer)
        config.num_return_sequences = samples
        batching = ContinuousBatchingConfig(
            return_logprobs=True,
            seed=seed,
            max_requests_per_batch=self.batch_size,
            **{page_setting(ContinuousBatchingConfig): PAGE},
        )
        model = self.policy.causal_lm
        if model.device.type == "cpu":  # the sizes that transformers takes from a GPU's memory
            longest = max(map(len, prompts)) + self.sampling.max_new_tokens
            batching.num_blocks = len(prompts) * samples * (longest // PAGE + 1)
            batching.max_batch_tokens = sum(map(len, prompts)) + len(prompts) * samples
        with _sampling_from(self.policy, self.scoring, seed), _own_generation_config(model, config):
            outputs = _batched(model, prompts, config, batching)
        drawn = [self._completion(output, version) for output in outputs]
        if len(drawn) != len(prompts) * samples:
            raise SamplerError(
                f"continuous batching gave {len(drawn)} of {len(prompts) * samples} samples; "
                "set generation=padded"
            )
        return [drawn[start : start + samples] for start in range(0, len(drawn), samples)]

    def _completion(self, output: Any, version: int) -> Completion:
        if output.error or not output.generated_tokens:
            raise SamplerError(
                f"continuous batching failed ({output.error or 'no token'}); set generation=padded"
            )
        ids = np.array(output.generated_tokens, dtype=np.int32)
        finished = int(ids[-1]) in self.sampling.stop_ids
        return Completion(ids, finished, float(sum(output.logprobs)), version)


def _batched(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    config: GenerationConfig,
    batching: ContinuousBatchingConfig,
) -> list[Any]:
    """Return the outputs of continuous batching, prompt after prompt.

    As transformers' `generate_batch`, which up to 5.17 returns one sample per prompt alone.
    """
    number = len(prompts) * config.num_return_sequences
    hints = WorkloadHints(
        max_prompt_length=max(map(len, prompts)),
        max_generated_length=config.max_new_tokens,
        num_requests=number,
    )
    outputs = {}
    with model.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=batching,
        timeout=5,
        warmup=False,
        workload_hints=hints,
    ) as manager:
        requests = manager.add_requests(
            [prompt.tolist() for prompt in prompts], max_new_tokens=config.max_new_tokens
        )
        while len(outputs) < number:
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                outputs[output.request_id] = output
            elif output is None and not manager.is_running():
                break
    # The samples of "req_0" are it and its forks, "req_0__child#0" and so on.
    places = {request: place for place, request in enumerate(requests)}
    order = sorted(outputs, key=lambda name: (places[name.partition("__child#")[0]], name))
    return [outputs[name] for name in order]


def page_setting(config: type) -> str:
    """Return the name of the setting for the tokens per page.

    config: transformers' ContinuousBatchingConfig; up to 5.17 the setting is `block_size`, which
        later versions keep as a deprecated name of `page_size`
    """
    names = inspect.signature(config).parameters
    return "page_size" if "page_size" in names else "block_size"


@contextmanager
def _sampling_from(policy: Policy, scoring: Scoring, seed: int) -> Iterator[None]:
    """Prepare the policy for sampling: eval mode (checkpointing off, caches on), no gradient.

    Samples come from a random stream of the seed alone; the run's random state stays unchanged.
    SamplerError for a policy with probabilities that are not numbers.
    """
    device = policy.causal_lm.device
    devices = [device] if device.type == "cuda" else []
    training = policy.model.training
    policy.model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            scoring.context(device),
        ):
            torch.manual_seed(seed)
            yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise SamplerError(
            f"the policy gives no probabilities ({error}): it has diverged; "
            "lower learning_rate or raise beta"
        ) from error
    finally:
        policy.model.train(training)


def _generation_config(sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,  # unset, it would be 50
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_ids) or None,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def _own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation config for a while.

    Repetition penalties, top_k or suppressed tokens in the model's config would silently change
    the distribution of the samples.
    """
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def _shared_prefill(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, samples: int
) -> dict[str, DynamicCache]:
    """Return the cache of all prompt tokens but the last, repeated for the samples of a prompt.

    The cache is an argument of `generate`: "cache", or "past_key_values" up to transformers 5.23.

    model: any causal language model
    ids, mask: [B, P] int64, padded on the left
    samples: per prompt

    Without the argument `generate` has to compute the prompts: a model with another kind of cache,
    or nothing to share.
    """
    if samples == 1:
        return {}
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    # With one token there is nothing to share; the call is for ranks with longer prompts, that
    # wait for all ranks.
    shared = max(ids.shape[1] - 1, 1)
    output = model(
        input_ids=ids[:, :shared],
        attention_mask=mask[:, :shared],
        position_ids=positions[:, :shared],
        use_cache=True,
        return_dict=True,
        logits_to_keep=1,
    )
    name = "cache" if "cache" in output else "past_key_values"
    cache = output.get(name)
    if ids.shape[1] == 1 or type(cache) is not DynamicCache:
        return {}
    # States of recurrent layers cannot be repeated.
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
        return {}
    cache.batch_repeat_interleave(samples)
    return {name: cache}


class _Recorder(LogitsProcessor):
    """Records the log-probs of drawn tokens, before any cut of the distribution.

    Holds one [B, V] tensor of logits at a time: the token drawn from the logits is seen in the
    next call.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._scores: Tensor | None = None
        self._logps: list[Tensor] = []  # [B] of every token so far

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take [B, V] logits of the next token; return them unchanged."""
        if self._scores is not None:
            self._take(input_ids[:, -1])
        self._scores = scores
        return scores

    def _take(self, drawn: Tensor) -> None:
        self._logps.append(gather_logps(self._scores, drawn, self.temperature).double())

    def logps(self, last: Tensor) -> Tensor:
        """Return [B, T] log-probs of all tokens; last: [B], the tokens drawn last."""
        self._take(last)
        return torch.stack(self._logps, dim=1)


class _StopStrings(StoppingCriteria):
    """transformers' criterion for stop strings, with a record of every sequence's end.

    The end must be recorded: padding may follow, and a policy can draw the pad token, too. A stop
    string that begins in the prompt does not count.

    ended: [B] tokens of the completion at the end of its first stop string; 0 without a stop string
    """

    def __init__(self, inner: StopStringCriteria, prompt_width: int) -> None:
        self.inner = inner
        self.prompt_width = prompt_width
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return [B] bool, whether a sequence has ended."""
        completions = input_ids[:, self.prompt_width :]
        done = self.inner(completions, scores, **kwargs)
        ended = torch.where(done, completions.shape[1], 0)
        if self.ended is not None:
            ended = torch.where(self.ended > 0, self.ended, ended)
        self.ended = ended
        return done
