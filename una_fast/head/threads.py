"""Row operations of a CPU on a few threads, each of which runs whole blocks by itself.

An operation that OpenMP splits over the cores ends with its slowest part. Row operations take a
millisecond: a part that waits for a core, because another program has it, holds the others up a
thousand times a call. Here every thread takes blocks from a common list and runs all operations of
a block alone, so that nobody waits for anybody before the last block.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

# Python runs one thread at a time between operations: more threads would wait for each other there.
MOST = 8

Item = TypeVar("Item")
_making = threading.Lock()


def share(work: Callable[[Item], None], items: Iterable[Item], device: torch.device) -> None:
    """Call work(item) for every item: on a CPU on as many threads as operations may use here.

    work: writes what belongs to its item alone, without autograd
    items: blocks of rows
    device: of the rows
    """
    waiting = deque(items)
    cores = torch.get_num_threads()
    workers = min(cores, len(waiting), MOST)
    # A GPU has a queue of its own. Modes that count or fake operations see the caller's alone.
    if device.type != "cpu" or workers < 2 or _get_current_dispatch_mode() is not None:
        for item in waiting:
            work(item)
        return
    is_inference = torch.is_inference_mode_enabled()

    def drain() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            while True:
                try:
                    item = waiting.popleft()
                except IndexError:
                    return
                work(item)

    pool = _pool(cores)
    running = [pool.submit(drain) for _ in range(workers)]
    wait(running)  # after an error, too: nobody writes any more when the caller goes on
    for worker in running:
        worker.result()


def _pool(cores: int) -> ThreadPoolExecutor:
    """Return the threads for so many cores: started once in a process."""
    with _making:
        return _start(cores)


@functools.cache
def _start(cores: int) -> ThreadPoolExecutor:
    """Start threads that divide the cores among them.

    torch keeps one number of cores per thread, and a default that a thread copies when it first
    asks for its number. A worker asks before it sets its own, which the default would overwrite
    later. Setting a number also sets the default: the caller restores it.
    """
    workers = min(cores, MOST)
    started = threading.Barrier(workers + 1)

    def begin() -> None:
        torch.get_num_threads()
        torch.set_num_threads(cores // workers)
        started.wait()

    pool = ThreadPoolExecutor(workers, "una_fast rows", initializer=begin)
    for _ in range(workers):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(cores)
    return pool


def _forget() -> None:
    """Drop the pools in a forked process, which has none of their threads."""
    global _making
    _making = threading.Lock()
    _start.cache_clear()


os.register_at_fork(after_in_child=_forget)
