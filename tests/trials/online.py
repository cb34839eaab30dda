#!/usr/bin/env python3
"""Ask judges, endpoints and reward functions that fail in every way.

    .venv/bin/python tests/trials/online.py [--seed N] [--short]

Every server listens on 127.0.0.1. A case ends by itself, with samples left out and counted or with
one line that names the reward; weights stay finite, and the key is in no output and in no file. The
short form asks the rewards alone; the long form takes two steps of an online run.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Result, Trial, forked, main, online_words, preload

KEY = "sk-SECRET-0123456789abcdef"
LIMIT = 40.0  # seconds of a case
OK, REFUSED = "ok", "refusal"


# ---- servers -----------------------------------------------------------------------------------


def reply(body: object, status: str = "200 OK", *headers: str) -> bytes:
    """Return the bytes of a reply; body: bytes, or a value that becomes JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def rewards(literal: str, count: int) -> bytes:
    """Return the reply of an endpoint with `count` equal rewards, a literal of JSON."""
    return reply(f'{{"rewards": [{",".join([literal] * count)}]}}'.encode())


def chat(text: object) -> bytes:
    """Return the reply of a judge."""
    return reply({"choices": [{"message": {"content": text}}]})


LITERALS = {
    "a number": "0.5",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "1e999": "1e999",
    "1e200": "1e200",
    "1e30": "1e30",
    "an int of 400 digits": "9" * 400,
    "an int of 5000 digits": "9" * 5000,
    "a text": '"0.5"',
    "true": "true",
    "null": "null",
    "a list": "[0.5]",
}

REPLIES = {
    "500": reply(b"boom", "500 E"),
    "429": reply(b"x", "429 T", "Retry-After: 1"),
    "429 huge": reply(b"x", "429 T", "Retry-After: 999999999"),
    "429 negative": reply(b"x", "429 T", "Retry-After: -5"),
    "429 junk": reply(b"x", "429 T", "Retry-After: Fri, 99 Foo 99999 99:99:99 GMT"),
    "429 year 1": reply(b"x", "429 T", "Retry-After: Mon, 1 Jan 0001 00:00:00 -0000"),
    "403": reply(b"no", "403 F"),
    "404 with escapes": reply(b"\x1b[31m" + b"x" * 10_000, "404 N"),
    "302": reply(b"", "302 F", "Location: /good"),
    "307": reply(b"", "307 F", "Location: http://127.0.0.1:9/"),
    "garbage": reply(bytes(range(256))),
    "empty": reply(b""),
    "no HTTP": b"\x00\x01 what\r\n\r\n",
    "nothing": b"",
    "half": b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"rew',
    "too short": rewards("0.5", 1),
    "too long": rewards("0.5", 100),
    "an object": reply({"rewards": {"0": 0.5}}),
    "deep": reply(b"[" * 200_000),
    "twice": reply(b'{"rewards": [9], "rewards": [0.5, 0.5, 0.5, 0.5]}'),
    "latin-1": reply(b'{"x": "\xe9"}'),
    "no gzip": reply(b"hello", "200 OK", "Content-Encoding: gzip"),
    "gzip bomb": reply(gzip.compress(b" " * 2**27), "200 OK", "Content-Encoding: gzip"),
    "headers": b"HTTP/1.1 200 OK\r\n"
    + b"X-Y: yyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 50_000
    + b"\r\n",
}

JUDGED = {
    "50": (chat("50"), OK),
    "a score": (chat("Score: 88.5/100"), OK),
    "a thought": (chat("<think>" + "50 " * 1000 + "</think> 70"), OK),
    "NaN": (chat("NaN"), REFUSED),
    "too many digits": (chat("9" * 50), REFUSED),
    "101": (chat("101"), REFUSED),
    "-5": (chat("-5"), REFUSED),
    "wide digits": (chat("\uff15\uff10"), REFUSED),
    "talk": (chat("I would say 50, or \U0001f600"), REFUSED),
    "null": (chat(None), REFUSED),
    "no choices": (reply({"choices": []}), REFUSED),
    "a surrogate": (chat("\ud800"), REFUSED),
    "spaces": (chat(" " * 200_000 + "x"), REFUSED),
    "thoughts": (chat("<think>" * 30_000), REFUSED),
    "a comma": (chat("50,5"), REFUSED),
}


def drip(connection: socket.socket, start: bytes) -> None:
    connection.sendall(start)
    while True:
        time.sleep(0.3)
        connection.sendall(b"x")


def endless(connection: socket.socket, start: bytes) -> None:
    connection.sendall(start)
    while True:
        connection.sendall(b" " * 2**20)


BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n"

STREAMS: dict[str, Callable[[socket.socket], None]] = {
    "never": lambda connection: time.sleep(45),
    "a body that drips": lambda connection: drip(connection, BODY),
    "headers that drip": lambda connection: drip(connection, b"HTTP/1.1 200 OK\r\nX: "),
    "a status that drips": lambda connection: drip(connection, b"H"),
    "a gigabyte": lambda connection: endless(connection, BODY),
}


class Handler(socketserver.BaseRequestHandler):
    """Answers with the mode that the path names by number."""

    def handle(self) -> None:
        try:
            data = b""
            while b"\r\n\r\n" not in data:
                data += self._part()
            head, _, body = data.partition(b"\r\n\r\n")
            headers = {}
            for line in head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                headers[name.lower()] = value.strip()
            while len(body) < int(headers.get(b"content-length", 0)):
                body += self._part()
            path = head.split(b" ")[1].decode()
            mode = self.server.modes[int(path.strip("/").split("/")[0].split("?")[0])]
            if callable(mode):
                mode(self.request)
            else:
                self.request.sendall(mode.replace(b"$KEY$", headers.get(b"authorization", b"")))
        except (OSError, EOFError):
            pass

    def _part(self) -> bytes:
        part = self.request.recv(65536)
        if not part:
            raise EOFError
        return part


class Server(socketserver.ThreadingTCPServer):
    """A server of all modes; `url_of` gives a mode its address."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.modes: list[Any] = []

    def url_of(self, mode: object, user: str = "") -> str:
        self.modes.append(mode)
        return f"http://{user}127.0.0.1:{self.server_address[1]}/{len(self.modes) - 1}"


# ---- functions ---------------------------------------------------------------------------------

FUNCTIONS = """
import decimal, fractions, os, random, signal, sys, threading, time
import numpy as np, torch
values = lambda completions: [0.5 * (i % 2) for i, _ in enumerate(completions)]
class Silent(BaseException):
    def __str__(self): raise RuntimeError("no text")
def error(completions): raise ValueError("two\\nlines \\ud800 \\x1b[31m")
def key(completions): raise RuntimeError("cannot connect with " + os.environ["JKEY"])
def exit0(completions): sys.exit(0)
def exit1(completions): sys.exit("bye")
def exits(completions): os._exit(0)
def keyboard(completions): raise KeyboardInterrupt
def group(completions): raise ExceptionGroup("g", [ValueError(1)])
def silent(completions): raise Silent
def recursion(completions): return recursion(completions)
def memory(completions): raise MemoryError
def alarm(completions): signal.setitimer(signal.ITIMER_REAL, 0.1); time.sleep(5)
def none(completions): return None
def short(completions): return [0.5]
def mapping(completions): return {c: 0.5 for c in completions}
def text(completions): return "0.5"
def texts(completions): return ["1" for c in completions]
def infinite(completions):
    while True: yield 0.5
def matrix(completions): return np.zeros((len(completions), 1))
def scalar(completions): return np.float64(1)
def imaginary(completions): return [1j for c in completions]
def nan(completions): return [float("nan") for c in completions]
def inf(completions): return [float("inf") for c in completions]
def huge(completions): return [1.7e308 for c in completions]
def integers(completions): return [10**400 for c in completions]
async def coroutine(completions): return values(completions)
def arguments(texts): return [0.5]
def column(completions, nosuch): return values(completions)
def generator(completions): return (x for x in values(completions))
def floats(completions): return np.array(values(completions), dtype=np.float32)
def scalars(completions): return [np.float32(x) for x in values(completions)]
def gradient(completions): return torch.tensor(values(completions), requires_grad=True)
def tensors(completions): return [torch.tensor(x) for x in values(completions)]
def bools(completions): return [bool(x) for x in values(completions)]
def numpy_bools(completions): return [np.bool_(x) for x in values(completions)]
def decimals(completions): return [decimal.Decimal(1) for c in completions]
def parts(completions): return [fractions.Fraction(1, 2) for c in completions]
def some(completions): return [float("nan"), 1e200] + [0.5] * (len(completions) - 2)
def mutates(prompts, completions): prompts.clear(); completions[:] = "x"; return values("aaaa")
def chdir(completions): os.chdir("/"); return values(completions)
def no_gradients(completions): torch.set_grad_enabled(False); return values(completions)
def double(completions): torch.set_default_dtype(torch.float64); return values(completions)
def reseeds(completions): torch.manual_seed(0); np.random.seed(0); return values(completions)
def closes(completions): sys.stdout.close(); return values(completions)
def thread(completions):
    def f(): raise ValueError("in a thread")
    t = threading.Thread(target=f); t.start(); t.join(); return values(completions)
class Called:
    def __call__(self, completions): return values(completions)
called = Called()
number = 3
"""

FINE = (
    "generator floats scalars gradient tensors bools numpy_bools decimals parts some mutates chdir "
    "no_gradients double reseeds closes thread called"
)
WRONG = (
    "error key exit0 exit1 exits keyboard group silent recursion memory alarm none short mapping "
    "text texts infinite matrix scalar imaginary nan inf huge integers coroutine arguments column "
    "number Called absent"
)
TARGETS = (
    "os.system builtins.print builtins.dict os.path.join subprocess.run absent.f json:loads "
    "/etc/passwd.py:x una_fast.cli.main builtins.eval this.x"
)


# ---- the trial ---------------------------------------------------------------------------------


class Asked:
    """Runs cases, and looks for what must not be."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.root = trial.new_folder("online")

    def case(self, name: str, entry: dict[str, Any], *allowed: str, **variables: str) -> None:
        """Run a case, and report it.

        entry: of the setting `rewards`
        allowed: kinds of ends
        variables: of the environment
        """
        entry = {"name": "r", **entry}
        out = self.root / "out"

        def run() -> int:
            os.environ.update({"JKEY": KEY, **variables})
            if self.trial.short:
                return _ask(entry)
            from una_fast.cli import main

            words = online_words(
                self.trial.fixtures,
                rewards=json.dumps([entry]),
                output_dir=out,
                batch_size=2,
                max_steps=2,
            )
            return main(words)

        result = forked(run, timeout=LIMIT)
        faults = list(self._faults(result, allowed, out))
        self.trial.report(name, not faults, "; ".join(faults))
        shutil.rmtree(out, ignore_errors=True)

    def _faults(self, result: Result, allowed: tuple[str, ...], out: Path) -> Any:
        if result.kind not in allowed:
            yield f"{result.kind} {result.code}: {result.last[:150]}"
        if KEY in result.out + result.err:
            yield "the key is printed"
        if "\x1b" in result.err:
            yield "escapes are printed"
        if result.kind == REFUSED and "r: " not in result.err:
            yield f"the reward is not named: {result.last[:150]}"
        for path in out.rglob("*") if out.exists() else ():
            if path.is_file() and KEY.encode() in path.read_bytes():
                yield f"the key is in {path.name}"
        metrics = out / "metrics.jsonl"
        if metrics.exists() and any(x in metrics.read_text() for x in ("NaN", "Infinity")):
            yield "metrics are not finite"


def _ask(entry: dict[str, Any]) -> int:
    """Ask a reward about four samples, as a step does; return the exit status of a run."""
    from una_fast.rewards import RewardError, Rewards, parse_rewards
    from una_fast.signals import requests

    logging.basicConfig(level=logging.WARNING)
    try:
        with requests.listening():
            asked = Rewards(parse_rewards([entry]))
            found = asked(["p"] * 4, ["a", "bb", "ccc", "d"], [True] * 4, {})
            if not any(value is not None for value in found.total):
                raise RewardError(f"r: no sample has a reward: {found.failures}")
    except (RewardError, ValueError) as error:
        print(f"una-fast: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(trial: Trial) -> None:
    """Ask servers and functions."""
    preload()
    if not trial.short:
        _ = trial.fixtures  # made once, before any thread runs: the cases are forked
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = Asked(trial)
        _servers(trial, server, asked)
        _functions(trial, asked)
        server.shutdown()


def _servers(trial: Trial, server: Server, asked: Asked) -> None:
    usual = {"api_key_env": "JKEY", "retries": 1, "timeout": 1.0}
    usual["patience"] = 0.1 if trial.short else 1.0
    good = rewards("0.5", 4)
    served: list[tuple[str, Any, tuple[str, ...]]] = []
    for name, literal in LITERALS.items():
        served.append((name, rewards(literal, 4), (OK if literal == "0.5" else REFUSED,)))
    served += [(name, mode, (REFUSED,)) for name, mode in REPLIES.items()]
    served += [(name, mode, (REFUSED,)) for name, mode in STREAMS.items()]
    for status in ("200 OK", "401 U", "500 E"):
        served.append((f"the key, {status}", reply(b'"bad key $KEY$"', status), (REFUSED,)))
    for name, mode, allowed in trial.some(served, 10, "served"):
        extra = {"retries": 0} if name == "429 huge" else {}
        asked.case(
            f"endpoint: {name}", {"endpoint": server.url_of(mode), **usual, **extra}, *allowed
        )
    judged = [(name, mode, kind) for name, (mode, kind) in JUDGED.items()]
    judged.append(("the key", chat("your key is $KEY$"), REFUSED))
    for name, mode, kind in trial.some(judged, 5, "judged"):
        entry = {"judge": server.url_of(mode), "judge_model": "m", **usual}
        asked.case(f"judge: {name}", entry, kind)
    plain = {"endpoint": server.url_of(good), **usual}
    asked.case("no server", {**plain, "endpoint": "http://127.0.0.1:9/x"}, REFUSED)
    asked.case("no key", {**plain, "api_key_env": "NOT_SET"}, REFUSED)
    asked.case("a key of two lines", plain, REFUSED, JKEY=f"{KEY}\nX-Evil: 1")
    url = server.url_of(good, f"user:{KEY}@")
    asked.case("a password in the URL", {**plain, "endpoint": url, "api_key_env": None}, OK)
    query = server.url_of(reply(b"boom", "500 E")) + f"?key={KEY}"
    asked.case("a key in the URL", {**plain, "endpoint": query, "retries": 0}, REFUSED)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        asked.case(f"{name} before this machine", plain, OK, **{name: "http://127.0.0.1:9"})
    asked.case("a proxy of junk", plain, OK, HTTP_PROXY="::junk::")
    asked.case("certificates of junk", plain, OK, SSL_CERT_FILE=__file__)


def _functions(trial: Trial, asked: Asked) -> None:
    file = asked.root / "bad.py"
    file.write_text(FUNCTIONS, encoding="utf-8")
    cases = [(name, OK) for name in FINE.split()] + [(name, REFUSED) for name in WRONG.split()]
    for name, kind in trial.some(cases, 16, "functions"):
        asked.case(f"function {name}", {"function": f"{file}:{name}"}, kind)
    for target in trial.some(TARGETS.split(), 4, "targets"):
        asked.case(f"target {target}", {"function": target}, REFUSED)
    imports = {"syntax": b"def f(:", "exits": b"import sys; sys.exit(0)", "nul": b"\0"}
    for name, code in imports.items():
        (asked.root / f"{name}.py").write_bytes(code)
        asked.case(f"import {name}", {"function": f"{asked.root}/{name}.py:f"}, REFUSED)


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
