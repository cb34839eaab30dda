"""Turns: a thread alone, or many readers; no wait without an end."""

from __future__ import annotations

import os
import threading
import time

import pytest

from una_fast import turns
from una_fast.turns import enter, is_alone, leave, turn


class Owner:
    """Something that threads share."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(turns, "_LONGEST_WAIT", 5.0)


def in_thread(function) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_readers_that_keep_coming_let_a_thread_that_waits_to_be_alone_go_first():
    owner, stop = Owner(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            with turn(owner, alone=False):
                time.sleep(0.01)

    readers = [in_thread(read) for _ in range(6)]
    for _ in range(5):
        with turn(owner, alone=True):
            assert is_alone(owner)
    assert not is_alone(owner)
    stop.set()
    for reader in readers:
        reader.join(5)
    assert not turns._turns_of(owner).inside


def test_a_thread_inside_enters_again_while_another_waits():
    owner = Owner()
    first = enter(owner, alone=False)
    waiting = in_thread(lambda: leave(owner, enter(owner, alone=True)))
    while not turns._turns_of(owner).waiting:
        time.sleep(0.001)
    with turn(owner, alone=False):
        pass
    leave(owner, first)
    waiting.join(5)
    assert not waiting.is_alive()


def test_two_threads_that_would_wait_for_each_other_are_told():
    owner, raised = Owner(), []
    both = threading.Barrier(2)

    def upgrade() -> None:
        with turn(owner, alone=False):
            both.wait()
            try:
                with turn(owner, alone=True):
                    pass
            except RuntimeError as error:
                raised.append(str(error))

    threads = [in_thread(upgrade) for _ in range(2)]
    for thread in threads:
        thread.join(4)
        assert not thread.is_alive()
    (message,) = raised
    assert "another thread is in a call of this Owner, and both wait" in message


def test_a_child_has_none_of_the_turns_of_its_parent():
    owner = Owner()
    inside, leaving = threading.Event(), threading.Event()

    def hold() -> None:
        with turn(owner, alone=True):
            inside.set()
            leaving.wait(5)

    thread = in_thread(hold)
    inside.wait(5)
    child = os.fork()
    if not child:
        try:
            with turn(owner, alone=True):
                os._exit(0)
        finally:
            os._exit(1)
    leaving.set()
    thread.join(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
