"""transformers' samplers: padded generation and continuous batching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
from transformers.generation.stopping_criteria import StopStringCriteria

from una_fast.head.ops import gather_logps
from una_fast.model.policy import Policy
from una_fast.model.scoring import Scoring
from una_fast.online.sampling import Completion, SamplerError, Sampling

if TYPE_CHECKING:
    pass


_PAGE = 32  # tokens per page of the cache of continuous batching


# --- transformers ----------------------------------------------------------------------------------------------------


class TransformersSampler:
    """`model.generate` on left-padded batches: any model, LoRA, FSDP2 (every rank must call it equally often).

    batch_size: sequences that are generated at a time; None: all.
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
        self.policy, self.tokenizer, self.sampling = policy, tokenizer, sampling
        self.scoring, self.batch_size = scoring or Scoring(), batch_size
        strings = list(sampling.stop_strings)
        self.stop_strings = StopStringCriteria(tokenizer, strings) if strings else None

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        *,
        seed: int,
        samples: int | None = None,
        version: int = 0,
    ) -> list[list[Completion]]:
        samples = samples or self.sampling.samples
        per_call = len(prompts) if self.batch_size is None else max(1, self.batch_size // samples)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[list[Completion]] = [[] for _ in prompts]
        with _sampling_from(self.policy, self.scoring, seed):
            for start in range(0, len(prompts), per_call):
                chunk = by_length[start : start + per_call]
                drawn = iter(self._generate([prompts[i] for i in chunk], samples))
                for i in chunk:
                    found[i] = [Completion(*next(drawn), version) for _ in range(samples)]
        return found

    def _generate(
        self, prompts: list[np.ndarray], samples: int
    ) -> list[tuple[np.ndarray, bool, float]]:
        """(ids, finished, log-prob) of every sample, prompt after prompt."""
        model, asked = self.policy.causal_lm, self.sampling
        ids, mask = self._padded_left(prompts, model.device)
        config = _generation_config(asked, self.tokenizer)
        with _own_generation_config(model, config):
            cache = _shared_prefill(model, ids, mask, samples)
            ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
            recorder = _Recorder(asked.temperature)
            stops = [_StopStrings(self.stop_strings, ids.shape[1])] if self.stop_strings else []
            output = model.generate(
                ids,
                generation_config=config,
                attention_mask=mask,
                past_key_values=cache,
                logits_processor=[recorder],
                stopping_criteria=stops,
            )
        logps = recorder.logps(output[:, -1]).cpu().numpy()
        rows = output[:, ids.shape[1] :].cpu().numpy()
        ended = stops[0].ended.cpu().numpy() if stops else np.zeros(len(rows), dtype=np.int64)
        drawn = []
        for row, values, stopped in zip(rows, logps, ended, strict=True):
            row = row[:stopped] if stopped > 0 else row
            ends = np.flatnonzero(np.isin(row, asked.stop_ids))
            kept = int(ends[0]) + 1 if ends.size else len(row)
            drawn.append(
                (
                    row[:kept].astype(np.int32),
                    bool(ends.size or stopped > 0),
                    float(values[:kept].sum()),
                )
            )
        return drawn

    def _padded_left(
        self, prompts: list[np.ndarray], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


class ContinuousSampler(TransformersSampler):
    """transformers' continuous batching: nothing is padded, and finished sequences make room at once. One process, a
    model whose attention goes through transformers' attention interface, no stop_strings and no top_p (its log-probs
    would be those of the cut distribution)."""

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        *,
        seed: int,
        samples: int | None = None,
        version: int = 0,
    ) -> list[list[Completion]]:
        samples = samples or self.sampling.samples
        config = _generation_config(self.sampling, self.tokenizer)
        config.num_return_sequences = samples
        batching = ContinuousBatchingConfig(
            return_logprobs=True, seed=seed, max_requests_per_batch=self.batch_size, page_size=_PAGE
        )
        model = self.policy.causal_lm
        if model.device.type == "cpu":  # what is not sized by the memory of a GPU
            longest = max(map(len, prompts)) + self.sampling.max_new_tokens
            batching.num_blocks = len(prompts) * samples * (longest // _PAGE + 1)
            batching.max_batch_tokens = sum(map(len, prompts)) + len(prompts) * samples
        with _sampling_from(self.policy, self.scoring, seed), _own_generation_config(model, config):
            outputs = model.generate_batch(
                [prompt.tolist() for prompt in prompts],
                generation_config=config,
                continuous_batching_config=batching,
                warmup=False,
            )
        drawn = [
            self._completion(output, version) for output in outputs.values()
        ]  # prompt after prompt
        if len(drawn) != len(prompts) * samples:
            raise SamplerError(
                f"continuous batching gave {len(drawn)} of {len(prompts) * samples} samples; set generation=padded"
            )
        return [drawn[start : start + samples] for start in range(0, len(drawn), samples)]

    def _completion(self, output: Any, version: int) -> Completion:
        if output.error or not output.generated_tokens:
            raise SamplerError(
                f"continuous batching failed ({output.error or 'no token'}); set generation=padded"
            )
        ids = np.array(output.generated_tokens, dtype=np.int32)
        return Completion(
            ids, int(ids[-1]) in self.sampling.stop_ids, float(sum(output.logprobs)), version
        )


@contextmanager
def _sampling_from(policy: Policy, scoring: Scoring, seed: int) -> Iterator[None]:
    """The policy in eval mode (checkpointing off, caches on), without gradient, drawing from a random stream of its
    own that depends on the seed alone."""
    device = policy.causal_lm.device
    training = policy.model.training
    policy.model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            scoring.context(device),
        ):
            torch.manual_seed(seed)
            yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise SamplerError(
            f"the policy gives no probabilities ({error}): it has diverged; lower learning_rate or raise beta"
        ) from error
    finally:
        policy.model.train(training)


def _generation_config(asked: Sampling, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=asked.temperature,
        top_k=0,  # unset, it would be 50
        top_p=asked.top_p,
        max_new_tokens=asked.max_new_tokens,
        eos_token_id=list(asked.stop_ids) or None,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def _own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Whatever the model's own generation config says (repetition penalties, top_k, suppressed tokens) would silently
    make the samples those of another distribution."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def _shared_prefill(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, samples: int
) -> DynamicCache | None:
    """The cache of all prompt tokens but the last, computed once per prompt and repeated for its samples; None where
    generate has to do it (a model with another kind of cache, or nothing to share)."""
    if samples == 1:
        return None
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    most = max(
        ids.shape[1] - 1, 1
    )  # of a single token the call is for the ranks that have more, and wait
    output = model(
        input_ids=ids[:, :most],
        attention_mask=mask[:, :most],
        position_ids=positions[:, :most],
        use_cache=True,
        logits_to_keep=1,
    )
    cache = getattr(output, "past_key_values", None)
    if ids.shape[1] == 1 or type(cache) is not DynamicCache:
        return None
    if not all(
        hasattr(layer, "batch_repeat_interleave") for layer in cache.layers
    ):  # states of recurrent layers
        return None
    cache.batch_repeat_interleave(samples)
    return cache


class _Recorder(LogitsProcessor):
    """Log-probs of the drawn tokens under the logits as the model gives them, before any cut of the distribution: one
    [B, V] at a time."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.scores: Tensor | None = None
        self.found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.scores is not None:
            self._take(input_ids[:, -1])
        self.scores = scores
        return scores

    def _take(self, drawn: Tensor) -> None:
        self.found.append(gather_logps(self.scores, drawn, self.temperature).double())

    def logps(self, last: Tensor) -> Tensor:
        """[B, T] of all steps; last: [B] the tokens of the last one."""
        self._take(last)
        return torch.stack(self.found, dim=1)


class _StopStrings(StoppingCriteria):
    """transformers' criterion, which also remembers where each sequence ended: padding may follow, and a policy can
    draw the pad token too. It sees the completions alone, behind `prompt` columns. ended: [B] tokens of a completion
    when a stop string was complete, 0 if never."""

    def __init__(self, inner: StopStringCriteria, prompt: int) -> None:
        self.inner, self.prompt = inner, prompt
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        drawn = input_ids[:, self.prompt :]
        done = self.inner(drawn, scores, **kwargs)
        ended = torch.where(done, drawn.shape[1], 0)
        self.ended = ended if self.ended is None else torch.where(self.ended > 0, self.ended, ended)
        return done
