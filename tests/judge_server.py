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
    """Return the answer of an OpenAI-compatible server."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]}, {}


class JudgeServer:
    """A server that answers every POST with answer(payload, number of the request).

    answer: returns (status, JSON or bytes, headers)
    delay: seconds before an answer; leaving `with` ends all delays
    requests: (path, headers, payload) in the order of arrival
    most_in_flight: requests under way at a time, at most
    """

    def __init__(self, answer: Callable[[Any, int], Answer], delay: float = 0.0) -> None:
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.start(answer, delay)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body, headers = outer.answer_to(self.path, dict(self.headers), payload)
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
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def start(self, answer: Callable[[Any, int], Answer], delay: float = 0.0) -> None:
        """Go on with another answer, and with no requests seen so far."""
        self.answer = answer
        self.delay = delay
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.in_flight = 0
        self.most_in_flight = 0

    def answer_to(self, path: str, headers: dict[str, str], payload: Any) -> Answer:
        with self.lock:
            number = len(self.requests)
            self.requests.append((path, headers, payload))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.closing.wait(self.delay)
        found = self.answer(payload, number)
        # Before the answer is sent: a client may then send the next request at once.
        with self.lock:
            self.in_flight -= 1
        return found

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether the condition came true within a number of seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()
