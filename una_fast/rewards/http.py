"""Rewards by servers: a language model as a judge, or an endpoint with JSON requests."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import Any

from una_fast.rewards.outcome import EXCERPT, Failure, Outcome, PromptText, Reward, as_number
from una_fast.rewards.settings import RewardError, RewardSpec, shown_url

BACKOFF = 0.5  # seconds before the first retry, doubled before every further one
MAX_WAIT = 60.0  # seconds that a retry waits at most, whatever Retry-After asks for

# Answers to a text that is too long for the server, or otherwise not to be had.
THIS_SAMPLE = (400, 413, 422)

ADVICE = {
    401: "check api_key_env",
    403: "check api_key_env",
    404: "check the URL (a judge's is the base, such as http://localhost:8000/v1) and judge_model",
}

# Templates may have opened the thinking in the prompt.
THINKING = re.compile(r"\A\s*(?:<think>)?.*?</think>", re.DOTALL)

SCORE = re.compile(
    r"\s*(?:score\s*:)?\s*(\d{1,3}(?:\.\d+)?)\s*(?:/\s*100)?\s*", re.ASCII | re.IGNORECASE
)


def _httpx() -> ModuleType:
    """Import the HTTP library of huggingface-hub: httpx2 since version 2.0, httpx before."""
    try:
        return importlib.import_module("httpx2")
    except ModuleNotFoundError:
        return importlib.import_module("httpx")


def _parallel(
    function: Callable[[Any, threading.Event], Any], items: Sequence[Any], threads: int
) -> list[Any]:
    """Return function(item, stop) for every item, in order, with `threads` calls at a time.

    The first error is raised, and sets `stop` for all calls. The threads are daemons: an executor
    joins threads at exit, and an interrupted run would wait for a server.
    """
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()
    for pair in enumerate(items):
        todo.put(pair)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not stop.is_set():
                number, item = todo.get_nowait()
                try:
                    done.put((number, function(item, stop), None))
                except BaseException as error:
                    stop.set()  # here, or this thread takes another item before the error is seen
                    done.put((number, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, name="una-fast-reward", daemon=True).start()
    results: list[Any] = [None] * len(items)
    try:
        for _ in items:
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = result
    finally:
        stop.set()
    return results


class HttpReward(Reward):
    """A server of JSON requests: bounded concurrency, retries with back-off, answers in order."""

    def __init__(self, spec: RewardSpec, url: str) -> None:
        """Open a client; ValueError if the key is missing. The server is not asked yet.

        spec: an entry of kind "judge" or "endpoint"
        url: the address of the requests
        """
        self.spec = spec
        self.url = url
        self.where = f"reward {spec.name}: {spec.kind} {shown_url(url)}"
        self.httpx = _httpx()
        # The global generator belongs to the run, and only the run's seed must decide it.
        self.random = random.Random()
        headers = {"Content-Type": "application/json"}
        self.key = self._key(spec.api_key_env)
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        # The threads bound the requests; a bound of connections as well could only make them time
        # out.
        limits = self.httpx.Limits(max_connections=None, max_keepalive_connections=spec.concurrency)
        self.client = self.httpx.Client(timeout=spec.timeout, limits=limits, headers=headers)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _key(self, variable: str | None) -> str:
        if variable is None:
            return ""
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ValueError(
                f"{self.where} needs its key in the environment variable {variable}, "
                "which is not set"
            )
        if not key.isascii() or not key.isprintable():
            # The key is not shown: it is secret even if it is wrong.
            raise ValueError(
                f"{self.where}: the environment variable {variable} holds characters that no key "
                "has"
            )
        return key

    def post_all(self, payloads: list[dict[str, Any]]) -> list[Any]:
        """Return the parsed answer to every payload, or the `Failure` of the request.

        Raises RewardError for payloads beyond JSON, and for a server's refusal of every request.
        """
        try:
            bodies = [json.dumps(payload, allow_nan=False).encode() for payload in payloads]
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"{self.where} cannot be sent the records as JSON: {error}; leave out or convert "
                "such columns"
            ) from error
        return _parallel(self._post, bodies, self.spec.concurrency)

    def _post(self, body: bytes, stop: threading.Event) -> Any:
        failure = Failure("stopped")
        for attempt in range(self.spec.retries + 1):
            asked_wait = 0.0
            try:
                response = self.client.post(self.url, content=body)
            except self.httpx.TimeoutException as error:
                failure = Failure("timeout", f"{type(error).__name__} after {self.spec.timeout} s")
            except self.httpx.RequestError as error:
                failure = Failure("no connection", f"{type(error).__name__}: {error}")
            else:
                if response.is_success:
                    return self._parse(response)
                failure = Failure(f"HTTP {response.status_code}", self._excerpt(response))
                if not self._passes(response):
                    return failure
                asked_wait = _retry_after(response.headers.get("Retry-After"))
            if attempt == self.spec.retries:
                break
            wait = max(asked_wait, BACKOFF * 2**attempt * self.random.uniform(0.5, 1.5))
            if stop.wait(min(wait, MAX_WAIT)):
                break
        return failure

    def _passes(self, response: Any) -> bool:
        """Return whether an error is worth a retry; RewardError if every request will fail."""
        status = response.status_code
        if status in THIS_SAMPLE:
            return False
        if status < 500 and status not in (408, 429):
            advice = ADVICE.get(status, "check its URL and settings")
            raise RewardError(
                f"{self.where} answered HTTP {status}: {self._excerpt(response)!r}; {advice}"
            )
        return True

    def _parse(self, response: Any) -> Any:
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            return Failure("wrong JSON", self._excerpt(response))

    def _excerpt(self, response: Any) -> str:
        """Return the beginning of a body, without the key: servers like to repeat the key."""
        text = response.text.replace(self.key, "***") if self.key else response.text
        return text[:EXCERPT]


def _retry_after(value: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 if absent or unreadable."""
    if value is None:
        return 0.0
    if re.fullmatch(r"\s*\d{1,9}\s*", value, re.ASCII):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


class Judge(HttpReward):
    """A language model behind an OpenAI-compatible server; replies of 0 to 100 become 0 to 1."""

    def __init__(self, spec: RewardSpec) -> None:
        super().__init__(spec, spec.target.rstrip("/") + "/chat/completions")

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        """Return [S] outcomes; a reply other than a number from 0 to 100 fails."""
        pairs = zip(prompts, completions, strict=True)
        payloads = [self._payload(prompt, completion) for prompt, completion in pairs]
        return [self._outcome(answer) for answer in self.post_all(payloads)]

    def _payload(self, prompt: PromptText, completion: str) -> dict[str, Any]:
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        texts = {"{prompt}": prompt, "{completion}": completion}

        def text_of(marker: re.Match[str]) -> str:
            return texts[marker[0]]

        # In one go, and not by str.format: texts hold braces, and may hold the other marker.
        content = re.sub(r"\{prompt\}|\{completion\}", text_of, self.spec.instruction)
        return {
            "model": self.spec.judge_model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.spec.max_tokens or 16,
        }

    @staticmethod
    def _outcome(answer: Any) -> Outcome:
        if isinstance(answer, Failure):
            return answer
        try:
            reply = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return Failure("wrong JSON", f"no choices[0].message.content in {answer!r:.{EXCERPT}}")
        if not isinstance(reply, str):
            return Failure("no text in the reply", f"{reply!r:.{EXCERPT}}")
        score = SCORE.fullmatch(THINKING.sub("", reply, count=1))
        if score is None or float(score[1]) > 100:
            return Failure("the reply is no number from 0 to 100", f"{reply!r:.{EXCERPT}}")
        return float(score[1]) / 100


class Endpoint(HttpReward):
    """A URL for {"prompts": [...], "completions": [...], columns}.

    The answer is {"rewards": [...]}, with a number or null per sample.
    """

    def __init__(self, spec: RewardSpec) -> None:
        super().__init__(spec, spec.target)

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        """Return [S] outcomes, asked for in requests of `batch_size` samples."""
        given = {**columns, "prompts": prompts, "completions": completions}
        payloads = []
        for start in range(0, len(completions), self.spec.batch_size):
            stop = start + self.spec.batch_size
            payloads.append({name: values[start:stop] for name, values in given.items()})
        outcomes: list[Outcome] = []
        for payload, answer in zip(payloads, self.post_all(payloads), strict=True):
            outcomes += self._outcomes(answer, len(payload["completions"]))
        return outcomes

    @staticmethod
    def _outcomes(answer: Any, count: int) -> list[Outcome]:
        """Return the outcomes of the `count` samples of a request."""
        if isinstance(answer, Failure):
            return [answer] * count
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            failure = Failure("wrong JSON", f"no list of rewards in {answer!r:.{EXCERPT}}")
            return [failure] * count
        if len(rewards) != count:
            failure = Failure("wrong number of rewards", f"{len(rewards)} for {count} completions")
            return [failure] * count
        return [_number_or_failure(reward) for reward in rewards]


def _number_or_failure(reward: object) -> Outcome:
    number = as_number(reward)
    if number is not None:
        return number
    reason = "null" if reward is None else "not a number"
    return Failure(reason, f"{reward!r:.50}")
