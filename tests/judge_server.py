"""A real HTTP server on a free port of this machine, for the tests of judges and endpoints."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any, dict[str, str]]


def chat(content: Any) -> Answer:
    """The answer of an OpenAI-compatible server."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]}, {}


class JudgeServer:
    """Answers every POST with answer(payload, number of the request) = (status, JSON or bytes, headers).

    requests: (path, headers, payload) in the order of arrival. most_in_flight: how many it worked on at a time. delay:
    seconds before an answer; `with` ends them all.
    """

    def __init__(self, answer: Callable[[Any, int], Answer], delay: float = 0.0) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, dict(self.headers), payload))
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                outer.closing.wait(delay)
                status, body, headers = answer(payload, number)
                with (
                    outer.lock
                ):  # before it is sent: who waits for it may send the next request at once
                    outer.in_flight -= 1
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True  # the client has given up

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()
