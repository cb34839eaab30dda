"""A server with the addresses and answers of `vllm serve` that una_fast uses, on a real tiny model.

Written after vLLM 0.33 (entrypoints/openai/completion, entrypoints/rl/online, entrypoints/serve):
the seed of sample k is seed + k, samples include their stop token, every sample carries the label
of the weights that drew it, and the label is "default" until it is set.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Answer = tuple[int, Any]

FAILED = {"error": {"message": "the engine is not well", "type": "InternalServerError"}}


class StandInServer:
    """`vllm serve DIRECTORY --enable-lora`, in development mode.

    before: called with (path, payload, number of the request of this path); an answer of its own
        is sent in the place of the server's
    after: called with (path, answer); may change the answer
    ignores_weights: says that weights are loaded, and keeps the old ones
    raw_logprobs: of the model, and not of the distribution that is sampled from
    eos: token ids that end a response whatever is asked for, as a generation config may
    requests: (path, payload) in the order of arrival
    """

    def __init__(self, directory: str, name: str = "the-model") -> None:
        self.directory = directory
        self.name = name
        self.before: Callable[[str, Any, int], Answer | None] = lambda *_: None
        self.after: Callable[[str, Any], Any] = lambda path, answer: answer
        self.ignores_weights = False
        self.raw_logprobs = False
        self.eos: list[int] = []
        self.closing = False
        self.lock = threading.Lock()
        self.requests: list[tuple[str, Any]] = []
        self.start()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                text = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(json.loads(text) if text else None)

            def answer(self, payload: Any) -> None:
                status, answer = outer.answer_to(self.path, payload)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True  # the client has given up

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def start(self) -> None:
        """Load the model of the directory: a new start forgets weights, adapters and label."""
        self.model = AutoModelForCausalLM.from_pretrained(self.directory).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        self.label = "default"
        self.adapters: dict[str, Any] = {}

    def asked(self, path: str) -> list[Any]:
        """Return the payloads of a path."""
        return [payload for found, payload in self.requests if found == path]

    def answer_to(self, path: str, payload: Any) -> Answer:
        """Return the status and the answer to a request."""
        with self.lock:
            number = len(self.asked(path))
            self.requests.append((path, payload))
        special = self.before(path, payload, number)
        if special is not None:
            return special
        kinds = {
            "/v1/models": self._models,
            "/v1/completions": self._completions,
            "/v1/load_lora_adapter": self._load_adapter,
            "/v1/unload_lora_adapter": self._unload_adapter,
            "/collective_rpc": self._reload,
            "/reset_prefix_cache": lambda payload: (200, b""),
            "/update_weight_version": self._relabel,
        }
        if path not in kinds:
            return 404, {"detail": "Not Found"}
        with self.lock:
            if self.closing:
                return 503, FAILED
            status, answer = kinds[path](payload)
        return status, self.after(path, answer) if status == 200 else answer

    # ---- weights ----

    def _models(self, payload: Any) -> Answer:
        names = [self.name, *self.adapters]
        return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}

    def _reload(self, payload: Any) -> Answer:
        assert payload["method"] == "reload_weights"
        files = list(Path(payload["kwargs"]["weights_path"]).glob("*.safetensors"))
        assert files, "vLLM loads safetensors"
        if self.ignores_weights:
            return 200, {"results": [None]}
        for file in files:
            try:
                self.model.load_state_dict(load_file(file), strict=False)
            except RuntimeError as error:
                return 500, {"error": {"message": str(error)}}
        return 200, {"results": [None]}

    def _relabel(self, payload: Any) -> Answer:
        self.label = payload["new_version"]
        return 200, {"success": True, "new_version": self.label}

    def _load_adapter(self, payload: Any) -> Answer:
        name = payload["lora_name"]
        if name in self.adapters and not payload.get("load_inplace"):
            return 400, {"error": {"message": f"'{name}' has already been loaded."}}
        base = AutoModelForCausalLM.from_pretrained(self.directory)
        self.adapters[name] = PeftModel.from_pretrained(base, payload["lora_path"]).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def _unload_adapter(self, payload: Any) -> Answer:
        if self.adapters.pop(payload["lora_name"], None) is None:
            return 404, {"error": {"message": "The lora adapter cannot be found."}}
        return 200, b"Success"

    # ---- samples ----

    @torch.no_grad()
    def _completions(self, payload: Any) -> Answer:
        name, prompt = payload["model"], payload["prompt"]
        if name != self.name and name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        model = self.adapters.get(name, self.model)
        choices = []
        for k in range(payload.get("n", 1)):
            choices.append({"index": k, **self._choice(model, payload, k)})
            if "prompt_logprobs" in payload:
                choices[-1]["prompt_logprobs"] = _prompt_logprobs(model, prompt)
        return 200, {"object": "text_completion", "model": name, "choices": choices}

    def _choice(self, model: Any, payload: Any, k: int) -> dict[str, Any]:
        """Draw a sample token by token, without a cache."""
        generator = torch.Generator().manual_seed(payload.get("seed", 0) + k)
        temperature = payload.get("temperature", 1.0)
        ends = {*payload.get("stop_token_ids", []), *self.eos}
        drawn, logps, reason, stop_reason = [], [], "length", None
        while reason == "length" and len(drawn) < payload["max_tokens"]:
            ids = torch.tensor([payload["prompt"] + drawn])
            logits = model(ids).logits[0, -1].float()
            distribution = torch.log_softmax(logits / temperature, -1)
            token = int(torch.multinomial(distribution.exp(), 1, generator=generator))
            told = torch.log_softmax(logits, -1) if self.raw_logprobs else distribution
            drawn.append(token)
            logps.append(float(told[token]))
            if token in ends:
                reason, stop_reason = "stop", token
            text = self.tokenizer.decode(drawn)
            for string in payload.get("stop", []):
                if string in text:
                    reason, stop_reason = "stop", string
        return {
            "text": self.tokenizer.decode(drawn, skip_special_tokens=True),
            "token_ids": drawn,
            "prompt_token_ids": payload["prompt"],
            "logprobs": {
                "tokens": [f"token_id:{token}" for token in drawn],
                "token_logprobs": logps,
            },
            "finish_reason": reason,
            "stop_reason": stop_reason,
            "weight_versions": [{"version": self.label, "start": 0, "end": len(drawn)}],
        }

    def __enter__(self) -> StandInServer:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        with self.lock:  # no thread computes when the process ends
            self.closing = True
        self.server.shutdown()
        self.server.server_close()


def _prompt_logprobs(model: Any, prompt: list[int]) -> list[Any]:
    """Return the log-prob of every token after the first, as vLLM writes them."""
    logps = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1)
    entries: list[Any] = [None]
    for place, token in enumerate(prompt[1:]):
        entries.append({str(token): {"logprob": float(logps[place, token]), "rank": 1}})
    return entries
