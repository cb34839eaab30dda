"""Run a worker on several ranks that share an import, which takes longer than most cases.

    python fork_ranks.py RANKS WORKER ARGUMENT

WORKER is a Python file with a function main(), called in every rank as torchrun would call the
file. The first rank that fails ends the others.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import ModuleType


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_rank(module: ModuleType, rank: int, ranks: int, port: int) -> int:
    """Run the worker as a rank; return the exit status."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    try:
        module.main()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Import the worker, fork the ranks, and wait for them."""
    ranks, worker = int(sys.argv[1]), Path(sys.argv[2])
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(worker.parent))
    module = importlib.import_module(worker.stem)
    port = free_port()
    running = set()
    for rank in range(ranks):
        process = os.fork()
        if not process:
            status = run_rank(module, rank, ranks, port)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        running.add(process)
    while running:
        process, status = os.wait()
        running.discard(process)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"a rank ended with status {status}")


if __name__ == "__main__":
    main()
