"""Rewards by servers: a language model as a judge, or an endpoint with JSON requests.

A failed request is tried again (`retries`). Where no request of a batch gets an answer, the server
is down: it is asked again for `patience` seconds, and then the run is paused by RewardsDown.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from una_fast.rewards.client import Client, NoReplyError, Reply
from una_fast.rewards.outcome import (
    Failure,
    Outcome,
    PromptText,
    Reward,
    as_number,
    basic_secret,
    chat_text,
    excerpt,
    plain_json,
)
from una_fast.rewards.settings import RewardError, RewardsDown, RewardSpec, shown_url

logger = logging.getLogger(__name__)

BACKOFF = 0.5  # seconds before the first retry, doubled before every further one
MAX_WAIT = 60.0  # seconds that a retry waits at most, whatever Retry-After asks for
DOUBLINGS = 10  # of BACKOFF at most

# Answers to a text that is too long for the server, or otherwise not to be had.
THIS_SAMPLE = (400, 413, 422)

ADVICE = {
    401: "check api_key_env",
    403: "check api_key_env",
    404: "check the URL (a judge's is the base, such as http://localhost:8000/v1) and judge_model",
}

THOUGHT = "</think>"  # templates may have opened the thinking in the prompt

LONGEST_SCORE = 40  # characters of a reply that is a number

SCORE = re.compile(r"(?:score\s*:)?\s*(\d{1,3}(?:\.\d+)?)\s*(?:/\s*100)?", re.ASCII | re.IGNORECASE)

# Words in a server's refusal of a parameter.
REFUSALS = ("unsupported", "not support", "unknown", "unrecognized", "not permitted", "invalid")


def parallel(
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
        self.where = f"reward {spec.name}: {spec.kind} {shown_url(url)}"
        # The global generator belongs to the run, and only the run's seed must decide it.
        self.random = random.Random()
        headers = {"Content-Type": "application/json"}
        key = self._key(spec.api_key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.secrets = [key, *_secrets_of(url)]
        try:
            self.client = Client(url, headers, timeout=spec.timeout, connections=spec.concurrency)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None

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

        Raises RewardError for a server's refusal of every request, RewardsDown for its silence.
        """
        answers = parallel(self._post, payloads, self.spec.concurrency)
        if payloads and all(map(_is_down, answers)):
            return self._wait_for_server(payloads, answers[0])
        return answers

    def _wait_for_server(self, payloads: list[dict[str, Any]], failure: Failure) -> list[Any]:
        """Return the answers of a server that is back within `patience`, or raise RewardsDown."""
        patience = self.spec.patience
        told = f"{failure.reason} ({failure.detail})" if failure.detail else failure.reason
        if patience:
            logger.warning("%s is down: %s; it is asked again for %g s", self.where, told, patience)
        end = time.monotonic() + patience
        wait = BACKOFF
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(wait, left))
            wait = min(2 * wait, MAX_WAIT)
            probe = parallel(lambda payload, stop: self._ask(payload)[0], payloads[:1], 1)
            if _is_down(probe[0]):
                continue
            answers = parallel(self._post, payloads, self.spec.concurrency)
            if not all(map(_is_down, answers)):
                return answers
        raise RewardsDown(
            f"{self.where} is down: none of {len(payloads)} requests got an answer, and none came "
            f"for patience={patience:g} s: {told}; the run is paused: see that the server answers "
            "and resume, or raise patience"
        )

    def _post(self, payload: dict[str, Any], stop: threading.Event) -> Any:
        """Return the answer to a payload after retries, or the last failure."""
        for attempt in range(self.spec.retries + 1):
            answer, asked_wait = self._ask(payload)
            if not _is_down(answer) or attempt == self.spec.retries:
                break
            backoff = BACKOFF * 2 ** min(attempt, DOUBLINGS) * self.random.uniform(0.5, 1.5)
            if stop.wait(min(max(asked_wait, backoff), MAX_WAIT)):
                break
        return answer

    def _ask(self, payload: dict[str, Any]) -> tuple[Any, float]:
        """Return (answer to a request or its failure, seconds that the server asks to wait)."""
        while True:
            sent = self.body(payload)
            try:
                reply = self.client.post(json.dumps(sent, allow_nan=False).encode())
            except NoReplyError as error:
                detail = excerpt(error.detail, self.secrets)
                return Failure(error.reason, detail, passes=error.passes), 0.0
            if 200 <= reply.status < 300:
                return self._parse(reply.body), 0.0
            if reply.status not in (400, 422) or not self.adapt(sent, _text(reply.body)):
                break
        failure = Failure(
            f"HTTP {reply.status}", self.excerpt(_text(reply.body)), passes=self._passes(reply)
        )
        return failure, _retry_after(reply.headers.get("retry-after"))

    def body(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the request of a payload."""
        return payload

    def adapt(self, sent: dict[str, Any], refusal: str) -> bool:
        """Return whether a refused request is worth another try in another form."""
        return False

    def excerpt(self, value: object) -> str:
        """Return the beginning of an answer, without the key: servers like to repeat the key."""
        return excerpt(value, self.secrets)

    def _passes(self, reply: Reply) -> bool:
        """Return whether an error is worth a retry; RewardError if every request will fail."""
        status = reply.status
        if status in THIS_SAMPLE:
            return False
        if status < 500 and status not in (408, 429):
            advice = ADVICE.get(status, "check its URL and settings")
            raise RewardError(
                f"{self.where} answered HTTP {status}: '{self.excerpt(_text(reply.body))}'; "
                f"{advice}"
            )
        return True

    def _parse(self, body: bytes) -> Any:
        try:
            return json.loads(body, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError):
            return Failure("wrong JSON", self.excerpt(_text(body)))


def _is_down(answer: object) -> bool:
    return isinstance(answer, Failure) and answer.passes


def _text(body: bytes) -> str:
    return body.decode("utf-8", errors="replace")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _secrets_of(url: str) -> list[str]:
    """Return the secrets of a URL, in the forms in which a server may repeat them."""
    parts = urlsplit(url)
    secrets = [value for _, value in parse_qsl(parts.query, keep_blank_values=True)]
    secrets += [parts.query, unquote(parts.query)]
    if parts.password:
        user, password = unquote(parts.username or ""), unquote(parts.password)
        secrets += [parts.password, password, basic_secret(user, password)]
    return secrets


def _retry_after(value: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 if absent or unreadable."""
    value = (value or "").strip()
    if value.isascii() and value.isdecimal() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return 0.0


class Judge(HttpReward):
    """A language model behind an OpenAI-compatible server; replies of 0 to 100 become 0 to 1."""

    def __init__(self, spec: RewardSpec) -> None:
        parts = urlsplit(spec.target)
        url = parts._replace(path=parts.path.rstrip("/") + "/chat/completions").geturl()
        super().__init__(spec, url)
        self.lock = threading.Lock()
        self.options: dict[str, Any] = {"temperature": 0, "max_tokens": spec.max_tokens or 16}

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        """Return [S] outcomes; a reply other than a number from 0 to 100 fails."""
        pairs = zip(prompts, completions, strict=True)
        payloads = [self._payload(prompt, completion) for prompt, completion in pairs]
        return [self._outcome(answer) for answer in self.post_all(payloads)]

    def body(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the request of a payload, with the options that the server takes."""
        return {**payload, **self.options}

    def adapt(self, sent: dict[str, Any], refusal: str) -> bool:
        """Give up an option that the server refuses by name; return whether to ask again.

        Some models take max_completion_tokens in the place of max_tokens, and no temperature.
        """
        refusal = refusal.lower()
        with self.lock:
            options = dict(self.options)
            if "max_completion_tokens" in refusal and "max_tokens" in options:
                options["max_completion_tokens"] = options.pop("max_tokens")
                self._say("max_tokens", "max_completion_tokens is sent in its place")
            elif "temperature" in options and _refuses("temperature", refusal):
                del options["temperature"]
                self._say("temperature", "it is left out")
            self.options = options
        return any(name in sent and name not in options for name in ("max_tokens", "temperature"))

    def _say(self, name: str, mend: str) -> None:
        logger.warning("%s refuses the parameter %s: %s from now on", self.where, name, mend)

    def _payload(self, prompt: PromptText, completion: str) -> dict[str, Any]:
        if not isinstance(prompt, str):
            prompt = chat_text(prompt)
        texts = {"{prompt}": prompt, "{completion}": completion}

        def text_of(marker: re.Match[str]) -> str:
            return texts[marker[0]]

        # In one go, and not by str.format: texts hold braces, and may hold the other marker.
        content = re.sub(r"\{prompt\}|\{completion\}", text_of, self.spec.instruction)
        return {
            "model": self.spec.judge_model,
            "messages": [{"role": "user", "content": content}],
        }

    def _outcome(self, answer: Any) -> Outcome:
        if isinstance(answer, Failure):
            return answer
        try:
            reply = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            detail = f"no choices[0].message.content in {self.excerpt(answer)}"
            return Failure("wrong JSON", detail)
        if not isinstance(reply, str):
            return Failure("no text in the reply", self.excerpt(reply))
        _, thought, rest = reply.partition(THOUGHT)
        text = (rest if thought else reply).strip()
        # Long texts are never matched: the time of the expression is that of a short one.
        score = SCORE.fullmatch(text) if len(text) <= LONGEST_SCORE else None
        if score is None or float(score[1]) > 100:
            return Failure("the reply is no number from 0 to 100", self.excerpt(reply))
        return float(score[1]) / 100


def _refuses(name: str, refusal: str) -> bool:
    """Return whether a server's refusal, in lower case, is about a parameter."""
    return name in refusal and any(word in refusal for word in REFUSALS)


class Endpoint(HttpReward):
    """A URL for {"prompts": [...], "completions": [...], columns}.

    The answer is {"rewards": [...]}, with a number or null per sample. Values that JSON lacks are
    sent as `plain_json` says: NaN as null, dates as ISO 8601.
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
            payload = {name: values[start:stop] for name, values in given.items()}
            payloads.append(plain_json(payload))
        outcomes: list[Outcome] = []
        for payload, answer in zip(payloads, self.post_all(payloads), strict=True):
            outcomes += self._outcomes(answer, len(payload["completions"]))
        return outcomes

    def _outcomes(self, answer: Any, count: int) -> list[Outcome]:
        """Return the outcomes of the `count` samples of a request."""
        if isinstance(answer, Failure):
            return [answer] * count
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            failure = Failure("wrong JSON", f"no list of rewards in {self.excerpt(answer)}")
            return [failure] * count
        if len(rewards) != count:
            failure = Failure("wrong number of rewards", f"{len(rewards)} for {count} completions")
            return [failure] * count
        return [self._number_or_failure(reward) for reward in rewards]

    def _number_or_failure(self, reward: object) -> Outcome:
        number = as_number(reward)
        if number is not None:
            return number
        reason = "null" if reward is None else "not a number"
        return Failure(reason, self.excerpt(reward))
