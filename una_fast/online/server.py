"""Talk to a vLLM server: weights by path, completions as token ids with log-probs.

    GET  /v1/models                the names that the server serves
    POST /v1/completions           token ids in; token ids, log-probs and weight versions out
    POST /v1/load_lora_adapter     an adapter by path, under a name; /v1/unload_lora_adapter
    POST /collective_rpc           reload_weights of every worker: whole weights by path
    POST /reset_prefix_cache       forget keys and values of the weights before
    POST /update_weight_version    the label that the server stamps on samples from then on

All of them are of vLLM 0.33, and documented at docs.vllm.ai: training/async_rl.md says how samples
are stamped, features/lora.md how adapters are loaded, usage/security.md which of the addresses need
VLLM_SERVER_DEV_MODE=1.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from una_fast.generation_server import ServerOptions
from una_fast.online.sampling import ServerError
from una_fast.rewards.client import Client, NoReplyError
from una_fast.rewards.outcome import excerpt
from una_fast.rewards.settings import shown_url

BACKOFF = 0.5  # seconds before the first further attempt, doubled before the next
MAX_WAIT = 30.0  # seconds
LARGEST_REPLY = 2**28  # bytes: a token takes about 100, with its log-prob

COMPLETIONS = "/v1/completions"
LOAD_ADAPTER = "/v1/load_lora_adapter"
UNLOAD_ADAPTER = "/v1/unload_lora_adapter"
DEV_MODE = "start the server with VLLM_SERVER_DEV_MODE=1"
ADAPTERS = "start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"

# What mends an address that the server does not know.
UNKNOWN = {
    "/v1/models": "check generation_server.url, the address without /v1",
    COMPLETIONS: "the server was started anew, or serves another model; resume: true goes on",
    LOAD_ADAPTER: ADAPTERS,
    UNLOAD_ADAPTER: ADAPTERS,
    "/collective_rpc": DEV_MODE,
    "/reset_prefix_cache": DEV_MODE,
    "/update_weight_version": f"{DEV_MODE}; vLLM 0.33 or later is needed",
}


@dataclass(frozen=True)
class _Failure:
    """A request without an answer.

    text: the reason, for the message
    advice: the mend
    passes: the server may answer later
    """

    text: str
    advice: str
    passes: bool


class VllmServer:
    """The requests of a run to a vLLM server; threads may share a server."""

    def __init__(self, options: ServerOptions) -> None:
        """Prepare requests; ValueError if the key is missing. The server is not asked yet.

        options: address, key and patience
        """
        self.options = options
        self.where = f"the generation_server {shown_url(options.url)}"
        headers = {"Content-Type": "application/json"}
        key = _key(options.api_key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.secrets = [key, urlsplit(options.url).password or ""]
        self.client = Client(
            options.url,
            headers,
            timeout=options.timeout,
            connections=options.concurrency,
            largest=LARGEST_REPLY,
        )

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def served(self) -> list[str]:
        """Return the names of the models and adapters that the server serves."""
        answer = self.json("GET", "/v1/models")
        try:
            return [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError):
            raise self.error("/v1/models", f"no list of models: '{self.excerpt(answer)}'") from None

    def load_weights(self, path: Path, label: str) -> None:
        """Load whole weights in the place of the weights before, and label them.

        path: directory of safetensors, at the server
        label: stamped on the samples from then on
        """
        arguments = {"weights_path": str(path), "is_checkpoint_format": True}
        self.ask("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        self.ask("POST", "/reset_prefix_cache")
        self.ask("POST", "/update_weight_version", {"new_version": label})

    def load_adapter(self, path: Path, name: str) -> None:
        """Load an adapter beside the weights.

        path: directory of a PEFT adapter, at the server
        name: under which the adapter is asked for
        """
        adapter = {"lora_name": name, "lora_path": str(path), "load_inplace": True}
        self.ask("POST", LOAD_ADAPTER, adapter)

    def unload_adapter(self, name: str) -> None:
        """Take an adapter away."""
        self.ask("POST", UNLOAD_ADAPTER, {"lora_name": name})

    def complete(
        self, payload: dict[str, Any], stop: threading.Event | None = None
    ) -> dict[str, Any]:
        """Return the answer to a request for completions of a prompt.

        payload: of /v1/completions
        stop: when set, there are no further attempts

        ServerError for an answer under another name than the one that was asked for.
        """
        answer = self.json("POST", COMPLETIONS, payload, stop)
        found = answer.get("model") if isinstance(answer, dict) else None
        if found != payload["model"]:
            raise self.error(
                COMPLETIONS,
                f"{payload['model']} was asked, and '{self.excerpt(found)}' answered",
                UNKNOWN[COMPLETIONS],
            )
        return answer

    def json(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Any:
        """Return the parsed answer to a request; parameters as in `ask`."""
        body = self.ask(method, path, payload, stop)
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            text = body.decode("utf-8", errors="replace")
            raise self.error(path, f"no JSON: '{self.excerpt(text)}'") from None

    def ask(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> bytes:
        """Return the answer to a request after several attempts.

        method: GET or POST
        path: below the address of the server
        payload: body of the request
        stop: when set, there are no further attempts

        ServerError when no attempt got an answer.
        """
        stop = stop or threading.Event()
        body = b"" if payload is None else json.dumps(payload, allow_nan=False).encode()
        wait = BACKOFF
        answer = self._ask_once(method, path, body)
        for _ in range(self.options.retries):
            if isinstance(answer, bytes) or not answer.passes or stop.wait(wait):
                break
            wait = min(2 * wait, MAX_WAIT)
            answer = self._ask_once(method, path, body)
        if isinstance(answer, bytes):
            return answer
        raise self.error(path, answer.text, answer.advice)

    def _ask_once(self, method: str, path: str, body: bytes) -> bytes | _Failure:
        """Return the answer to a request, or the failure."""
        try:
            reply = self.client.send(method, path, body)
        except NoReplyError as error:
            detail = self.excerpt(error.detail)
            text = f"{error.reason} ({detail})" if detail else error.reason
            return _Failure(text, "see that the server answers, and resume", error.passes)
        if 200 <= reply.status < 300:
            return reply.body
        text = self.excerpt(reply.body.decode("utf-8", errors="replace"))
        passes = reply.status >= 500 or reply.status in (408, 429)
        return _Failure(f"HTTP {reply.status}: '{text}'", _advice(reply.status, path), passes)

    def error(self, path: str, text: str, advice: str = "look at its log") -> ServerError:
        """Return the error of a request.

        path: of the request
        text: the reason
        advice: the mend
        """
        return ServerError(f"{self.where} at {path}: {text}; {advice}")

    def excerpt(self, value: object) -> str:
        """Return the beginning of an answer, without the key."""
        return excerpt(value, self.secrets)


def _advice(status: int, path: str) -> str:
    """Return the mend of a refused request."""
    if status in (401, 403):
        return "check generation_server.api_key_env"
    if status in (404, 405):
        return UNKNOWN[path]
    return "look at the server's log"


def _key(variable: str | None) -> str:
    """Return the key in an environment variable; ValueError for a variable that is not set."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"generation_server.api_key_env names the environment variable {variable}, which "
            "holds no key"
        )
    return key
