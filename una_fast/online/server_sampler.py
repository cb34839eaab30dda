"""Sample by a vLLM server, with the policy's weights handed over as files.

    hand_over   all ranks together: weights -> directory -> server -> proof
    ask         a rank alone: a request per prompt, several at a time

The proof has two parts. The server stamps every sample with a label, given to the weights after
loading; an adapter's label is the adapter's name. And the server's log-probs of a prompt must be
the policy's: a label proves nothing if the loading had no effect.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.distributed import World
from una_fast.feedback import Feedback
from una_fast.generation_server import ServerOptions
from una_fast.head.ops import token_logps
from una_fast.model.export import save_pretrained
from una_fast.model.policy import Policy
from una_fast.model.scoring import Scoring
from una_fast.model.whole_weights import whole_weights
from una_fast.online.ahead import Ahead, Drawn
from una_fast.online.sampling import Completion, Sampling, ServerError
from una_fast.online.served import AnswerReader, Weights, probe_request, sampling_request
from una_fast.online.server import VllmServer
from una_fast.rewards.http import parallel

LONGEST_PROBE = 512  # tokens
CLOSING = 5.0  # seconds for a last word to the server


class ServerSampler:
    """A `sampling.Sampler` by a vLLM server; all ranks share the server."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        options: ServerOptions,
        scoring: Scoring,
        world: World,
        directory: Path,
    ) -> None:
        """Look for the server; ValueError without an answer, on all ranks.

        policy: draws the samples
        tokenizer: of the policy
        sampling: settings of the samples
        options: the server
        scoring: computes the policy's log-probs
        world: the ranks
        directory: for weights, seen by the server too
        """
        self.policy = policy
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.options = options
        self.scoring = scoring
        self.world = world
        self.directory = directory
        self.server = VllmServer(options)
        vocab_size = policy.causal_lm.get_output_embeddings().weight.shape[0]
        self.reader = AnswerReader(self.server, sampling, vocab_size)
        self.base, self.run = world.on_main(self._meet)
        self.weights: Weights | None = None  # that the server has proved
        self._given: list[Weights] = []  # not taken away again, newest last
        self._ahead: Ahead | None = None

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        *,
        seed: int,
        samples: int | None = None,
        version: int = 0,
    ) -> Drawn:
        """Return the completions of every prompt; parameters as in `sampling.Sampler`.

        All ranks must call. The server's numbers depend on the requests in its batches: equal seeds
        give equal samples as far as the server says so.
        """
        self.hand_over(version, prompts[0])
        return self._ask(prompts, seed, samples, self.weights, threading.Event())

    def sample_ahead(self, prompts: Sequence[np.ndarray], *, seed: int, version: int) -> Ahead:
        """Return samples on their way, drawn from now on; parameters as in `sample`."""
        self.hand_over(version, prompts[0])
        weights = self.weights
        self._ahead = Ahead(lambda stop: self._ask(prompts, seed, None, weights, stop))
        return self._ahead

    def close(self) -> None:
        """Take the last weights away from the server and the disk."""
        if self._ahead is not None:
            self._ahead.stop.set()
        # A server that hangs does not hold up the end of a run.
        unload = threading.Thread(target=self._unload, args=(self._given,), daemon=True)
        unload.start()
        unload.join(CLOSING)
        self._remove(self._given)
        self.server.close()

    # ---- samples ----

    def _ask(
        self,
        prompts: Sequence[np.ndarray],
        seed: int,
        samples: int | None,
        weights: Weights,
        stop: threading.Event,
    ) -> Drawn:
        """Return the completions of every prompt by weights at the server."""
        count = samples or self.sampling.samples

        def ask(number: int, failed: threading.Event) -> list[Completion]:
            if stop.is_set():
                raise ServerError("the samples are not wanted any more")
            prompt = prompts[number]
            first = seed + number * count
            request = sampling_request(weights, self.sampling, prompt, count, first)
            answer = self.server.complete(request, failed)
            return self.reader.completions(answer, prompt, count, weights)

        return parallel(ask, range(len(prompts)), self.options.concurrency)

    # ---- weights ----

    @torch.no_grad()
    def hand_over(self, version: int, prompt: np.ndarray) -> None:
        """Give the server the policy's weights, and have it prove them; all ranks together.

        version: optimizer steps of the policy; a served version is not handed over again
        prompt: [P] int32 token ids, for the proof

        ServerError, on all ranks, without a proof.
        """
        if self._ahead is not None:
            self._ahead.settle()  # its samples are of the weights before
            self._ahead = None
        if self.weights is not None and self.weights.version == version:
            return
        self.weights = None
        self.world.barrier()  # the other ranks have their samples too
        tensors = whole_weights(self.policy, self.world)
        probe = self._probe(prompt)
        logps = self._logps(probe)
        error = None
        weights = self._named(version)
        if self.world.is_main:
            self._given.append(weights)
            try:
                self._load(weights, tensors)
                self._check_proof(weights, probe, logps)
            except (ServerError, ValueError, OSError) as found:
                error = str(found)
        error = self.world.gather(error)[0]
        if error is not None:
            raise ServerError(f"{error}. The step is refused")
        self.weights = weights
        self._unload(self._given[:-1])
        self._remove(self._given[:-1])
        self._given = self._given[-1:]

    def _meet(self) -> tuple[str, str]:
        """Return (name of the model at the server, a new name for this start of the run)."""
        try:
            served = self.server.served()
        except ServerError as error:
            raise ValueError(str(error)) from None
        if not served:
            raise ValueError(f"{self.server.where} serves no model")
        base = self.options.model or served[0]
        if base not in served:
            raise ValueError(
                f"generation_server.model={base} is not served: the server has {', '.join(served)}"
            )
        return base, uuid.uuid4().hex[:8]

    def _named(self, version: int) -> Weights:
        """Return new names for the weights of a version."""
        label = f"una-{self.run}-{version}"
        if self.policy.is_adapter:
            return Weights(model=label, label=None, version=version)
        return Weights(model=self.base, label=label, version=version)

    def _place(self, weights: Weights) -> Path:
        return self.directory / (weights.label or weights.model)

    def _load(self, weights: Weights, tensors: dict[str, Tensor]) -> None:
        """Write the weights, and have the server load them."""
        place = self._place(weights)
        place.mkdir(parents=True, exist_ok=True)
        save_pretrained(self.policy, place, self.tokenizer, tensors)
        if weights.label is None:
            self.server.load_adapter(place, weights.model)
        else:
            self.server.load_weights(place, weights.label)

    def _unload(self, given: Sequence[Weights]) -> None:
        """Take adapters away from the server; whole weights stay until others come."""
        for weights in given:
            if weights.label is None:
                with contextlib.suppress(ServerError):  # an adapter or a server that is gone
                    self.server.unload_adapter(weights.model)

    def _remove(self, given: Sequence[Weights]) -> None:
        """Remove weights from the disk."""
        for weights in given:
            shutil.rmtree(self._place(weights), ignore_errors=True)

    # ---- the proof ----

    def _probe(self, prompt: np.ndarray) -> np.ndarray:
        """Return token ids to compare log-probs of, at least two."""
        end = np.array(self.sampling.stop_ids[:1] or [0], dtype=np.int32)
        return np.concatenate([prompt[:LONGEST_PROBE], end])

    def _logps(self, probe: np.ndarray) -> np.ndarray:
        """Return the policy's log-probs of probe[1:] at temperature 1; on all ranks together."""
        example = Example(probe[:1], (probe[1:],), Feedback.merge([]), None, "probe")
        batch = collate(
            [example],
            packed=self.policy.packed,
            device=self.world.device,
            pad_id=self.tokenizer.pad_token_id,
        )
        head = self.policy.head

        def scorer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return token_logps(
                hidden,
                weight,
                batch.targets,
                bias=bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                engine=self.scoring.engine,
                workspace_mb=self.scoring.workspace_mb,
            )

        with self.scoring.context(batch.input_ids.device):
            return self.policy.score(batch, scorer).double().cpu().numpy()

    def _check_proof(self, weights: Weights, probe: np.ndarray, logps: np.ndarray) -> None:
        """Compare the server's log-probs of the probe with the policy's."""
        answer = self.server.complete(probe_request(weights, probe))
        served = self.reader.prompt_logps(answer, probe, weights)
        gap = np.abs(served - logps).mean()
        if not gap <= self.options.tolerance:
            raise ServerError(
                f"{self.server.where} loaded the weights of step {weights.version}, and its "
                f"log-probs differ from the policy's by {gap:.3g} nats per token, above "
                f"generation_server.tolerance={self.options.tolerance:g}: it serves other weights, "
                "or another model"
            )
