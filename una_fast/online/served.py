"""Ask a vLLM server for samples, and check the answers before a run trains on them.

A sample counts if the server continued the very token ids of the prompt, with the weights of the
label, up to an end of the run's responses. Any other answer is a ServerError, with the mend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from una_fast.online.sampling import Completion, Sampling
from una_fast.online.server import COMPLETIONS, VllmServer

SEEDS = 2**31  # numbers of seeds

# Defaults of a model's own generation config, which the server would take otherwise.
UNCUT = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class Weights:
    """Weights at the server.

    model: name at the server
    label: stamped on every sample; None for an adapter, known by name
    version: optimizer steps of the policy
    """

    model: str
    label: str | None
    version: int


def sampling_request(
    weights: Weights, sampling: Sampling, prompt: np.ndarray, samples: int, seed: int
) -> dict[str, Any]:
    """Return the body of a request for the samples of a prompt.

    weights: draw the samples
    sampling: settings of the samples
    prompt: [P] int32 token ids
    samples: completions of the prompt
    seed: of the first sample; the server draws sample k with seed + k
    """
    return {
        "model": weights.model,
        "prompt": prompt.tolist(),
        "n": samples,
        "seed": seed % SEEDS,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        **UNCUT,
        "stop_token_ids": list(sampling.stop_ids),
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "logprobs": 0,  # of the drawn tokens alone
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "return_weight_versions": True,
    }


def probe_request(weights: Weights, ids: np.ndarray) -> dict[str, Any]:
    """Return the body of a request for the log-probs of given tokens, at temperature 1."""
    return {
        "model": weights.model,
        "prompt": ids.tolist(),
        "max_tokens": 1,
        **UNCUT,
        "prompt_logprobs": 0,
        "return_token_ids": True,
        "return_weight_versions": True,
    }


class AnswerReader:
    """Turns the server's answers into completions, or refuses them."""

    def __init__(self, server: VllmServer, sampling: Sampling, vocab_size: int) -> None:
        """Keep the rules.

        server: names itself in messages
        sampling: settings of the samples
        vocab_size: rows of the policy's head
        """
        self.server = server
        self.sampling = sampling
        self.vocab_size = vocab_size

    def completions(
        self, answer: dict[str, Any], prompt: np.ndarray, samples: int, weights: Weights
    ) -> list[Completion]:
        """Return the samples of a prompt, in the order of their seeds.

        answer: to a `sampling_request`
        prompt: [P] int32 token ids
        samples: number of samples
        weights: drew the samples
        """
        choices = self._choices(answer, samples)
        self._check_origin(choices, prompt, weights)
        return [self._completion(choice, weights.version) for choice in choices]

    def prompt_logps(self, answer: dict[str, Any], ids: np.ndarray, weights: Weights) -> np.ndarray:
        """Return [T - 1] float64, the log-probs of ids[1:].

        answer: to a `probe_request`
        ids: [T] int32 token ids
        weights: scored the tokens
        """
        choices = self._choices(answer, 1)
        self._check_origin(choices, ids, weights)
        try:
            found = choices[0]["prompt_logprobs"]
            pairs = zip(ids[1:].tolist(), found[1:], strict=True)
            return np.array([float(entry[str(token)]["logprob"]) for token, entry in pairs])
        except (KeyError, TypeError, ValueError):
            raise self._not_understood(choices[0]) from None

    def _choices(self, answer: dict[str, Any], samples: int) -> list[dict[str, Any]]:
        """Return the choices of an answer by their numbers."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            numbers = [choice["index"] for choice in choices]
        except (KeyError, TypeError):
            raise self._not_understood(answer) from None
        if numbers != list(range(samples)):
            raise self._refused(f"{samples} samples were asked for, and {len(numbers)} came")
        return choices

    def _check_origin(
        self, choices: Sequence[dict[str, Any]], prompt: np.ndarray, weights: Weights
    ) -> None:
        """Check the prompt's tokens, and the label of the weights."""
        for choice in choices:
            asked = choice.get("prompt_token_ids")
            if asked is None:
                raise self._not_understood(choice)
            if asked != prompt.tolist():
                raise self._refused("the tokens of the prompt were changed")
            if weights.label is None:
                continue
            labels = self._labels(choice)
            if labels != {weights.label}:
                raise self._refused(
                    f"the samples are of the weights {', '.join(sorted(labels))}, and not of "
                    f"{weights.label}: the server was started anew, or another run gave it weights",
                    "give the run a server of its own, and resume",
                )

    def _labels(self, choice: dict[str, Any]) -> set[str]:
        """Return the labels of the weights behind a sample."""
        try:
            labels = {str(span["version"]) for span in choice["weight_versions"]}
        except (KeyError, TypeError):
            labels = set()
        if not labels:
            raise self._refused(
                "it is not said which weights drew a sample", "vLLM 0.33 or later is needed"
            )
        return labels

    def _completion(self, choice: dict[str, Any], version: int) -> Completion:
        """Return a sample, checked; version: of the policy."""
        try:
            ids = [int(token) for token in choice["token_ids"]]
            logps = [float(logp) for logp in choice["logprobs"]["token_logprobs"]]
            reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError):
            raise self._not_understood(choice) from None
        if not ids or len(ids) != len(logps) or not all(map(math.isfinite, logps)):
            raise self._not_understood(choice)
        strange = [token for token in ids if not 0 <= token < self.vocab_size]
        if strange:
            raise self._refused(
                f"token {strange[0]} lies outside the vocabulary of {self.vocab_size}",
                "serve the run's model",
            )
        self._check_end(choice, ids, reason)
        return Completion(
            ids=np.array(ids, dtype=np.int32),
            finished=reason == "stop",
            logp=math.fsum(logps),
            version=version,
        )

    def _check_end(self, choice: dict[str, Any], ids: list[int], reason: str) -> None:
        """Check the end of a sample against the ends of responses."""
        if reason == "length" and len(ids) == self.sampling.max_new_tokens:
            return
        if reason == "length":
            raise self._refused(
                f"a sample was cut after {len(ids)} tokens, below max_new_tokens="
                f"{self.sampling.max_new_tokens}",
                "raise the server's --max-model-len, or lower max_new_tokens",
            )
        if reason != "stop":
            raise self._refused(f"a sample was ended by '{self.server.excerpt(reason)}'")
        by_text = choice.get("stop_reason") in self.sampling.stop_strings
        if ids[-1] not in self.sampling.stop_ids and not by_text:
            raise self._refused(
                f"a sample ends with token {ids[-1]}, which ends no response of this run",
                "start the server with --generation-config vllm",
            )

    def _refused(self, text: str, advice: str = "look at its log") -> Exception:
        return self.server.error(COMPLETIONS, text, advice)

    def _not_understood(self, answer: object) -> Exception:
        text = f"no completion with token ids and log-probs: '{self.server.excerpt(answer)}'"
        return self._refused(text, "vLLM 0.33 or later is needed")
