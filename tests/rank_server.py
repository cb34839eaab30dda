"""Run workers on several ranks, forked from one process that has imported what they need.

Imports take longer than most runs, so the tests of a process share the server (tests/ranks.py).
A line of standard input is a job in JSON, and a line of standard output its end:

    {"worker": FILE, "argument": TEXT, "log": FILE, "ranks": N, "env": {...}}  ->  "0" or a reason

FILE is a Python file with a function main(), which every rank calls as torchrun would have run the
file. The first rank that fails ends the others.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = str(Path(__file__).parent)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_rank(module: ModuleType, job: dict[str, Any], place: dict[str, str]) -> int:
    """Run the worker of a job as a rank, in this process; return the exit status.

    module: the worker
    job: as above
    place: variables of torchrun
    """
    os.environ.clear()
    os.environ.update(job["env"] | place)
    sys.argv = [job["worker"], job["argument"]]
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    gc.enable()
    try:
        module.main()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def run_job(job: dict[str, Any]) -> str:
    """Fork the ranks of a job and wait for them; return "0", or the status of one that failed."""
    module = importlib.import_module(Path(job["worker"]).stem)
    Path(job["log"]).touch()
    gc.freeze()
    ranks = job["ranks"]
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    running = set()
    for rank in range(ranks):
        process = os.fork()
        if not process:
            os._exit(run_rank(module, job, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        running.add(process)
    failed = 0
    while running:
        process, status = os.wait()
        running.discard(process)
        failed = failed or status
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return str(failed)


def main() -> None:
    """Serve jobs until standard input ends."""
    sys.path.insert(0, HERE)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    gc.disable()  # collections take a fifth of the time of imports
    for line in sys.stdin:
        print(run_job(json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
