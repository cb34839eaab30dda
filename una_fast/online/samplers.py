"""Choose the sampler of a run."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from una_fast.config import RunConfig
from una_fast.distributed import World
from una_fast.model.loading import model_and_adapter
from una_fast.model.policy import Policy
from una_fast.model.scoring import Scoring
from una_fast.online.generate import ContinuousSampler, TransformersSampler
from una_fast.online.sampling import Sampler, Sampling, stop_ids

HANDED_OVER = "handed_over"  # directory of weights for a server, in output_dir


def make_sampler(
    config: RunConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    scoring: Scoring,
    world: World,
) -> Sampler:
    """Build the sampler that the settings name.

    config: settings of the run
    policy: draws the samples
    tokenizer: of the policy
    scoring: dtype of autocast, and the temperature of log-probs
    world: the ranks

    ValueError where the sampler cannot serve the run.
    """
    sampling = Sampling(
        samples=config.samples_per_prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        stop_ids=stop_ids(tokenizer, policy.causal_lm),
        stop_strings=tuple(config.stop_strings),
    )
    if config.generation == "vllm_server":
        from una_fast.online.server_sampler import ServerSampler

        options = config.generation_server
        directory = Path(options.weights_dir or Path(config.output_dir) / HANDED_OVER)
        return ServerSampler(
            policy,
            tokenizer,
            sampling,
            options=options,
            scoring=scoring,
            world=world,
            directory=directory.absolute(),
        )
    if config.generation != "padded" and world.sharded:
        raise ValueError(
            f"generation={config.generation} runs in one process, and this run has {world.size}; "
            "set generation: padded, or vllm_server"
        )
    if config.generation == "vllm":
        from una_fast.online.vllm_sampler import VllmSampler

        return VllmSampler(
            policy,
            tokenizer,
            sampling,
            model=model_and_adapter(config.model)[0],
            trust_remote_code=config.trust_remote_code,
        )
    kind = ContinuousSampler if config.generation == "continuous" else TransformersSampler
    return kind(
        policy, tokenizer, sampling, scoring=scoring, batch_size=config.generation_batch_size
    )
