"""Turns of threads at an object: a thread alone that changes the object, or many readers.

The turns stand beside the object, so that copies and pickles of the object have no turns.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# No call of a model takes as long; a wait without an end would hide what is wrong.
_LONGEST_WAIT = 600.0  # seconds


class _Turns:
    """Entries at an object by thread: all entries, and entries of threads that want to be alone.

    waiting: threads that wait to be alone
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside: Counter[int] = Counter()
        self.alone: Counter[int] = Counter()
        self.waiting: set[int] = set()

    def is_free(self, me: int, alone: bool) -> bool:
        """Return whether a thread may enter; entries of the same thread do not count.

        Threads that are not inside let those first that wait to be alone.
        """
        if not alone and self.waiting and not self.inside[me]:
            return False
        others = self.inside if alone else self.alone
        return not any(count for thread, count in others.items() if thread != me)

    def wait(self, me: int, alone: bool) -> bool:
        """Wait until a thread may enter; return whether it may."""
        if alone:
            self.waiting.add(me)
        try:
            return self.changed.wait_for(lambda: self.is_free(me, alone), _LONGEST_WAIT)
        finally:
            self.waiting.discard(me)
            self.changed.notify_all()

    def is_stuck(self, me: int) -> bool:
        """Return whether a thread inside would wait for another inside that waits to be alone."""
        others = (thread for thread in self.waiting if thread != me and self.inside[thread])
        return bool(self.inside[me]) and any(others)

    def set(self, me: int, inside: int, alone: int) -> None:
        """Set the entries of a thread."""
        self.inside[me], self.alone[me] = inside, alone
        if not inside:
            del self.inside[me], self.alone[me]
        self.changed.notify_all()


_TURNS: dict[int, _Turns] = {}
_MAKING = threading.Lock()
# The threads of a parent are not those of a child.
os.register_at_fork(after_in_child=_TURNS.clear)


def _turns_of(owner: Any) -> _Turns:
    found = _TURNS.get(id(owner))
    if found is not None:
        return found
    with _MAKING:
        if id(owner) not in _TURNS:
            _TURNS[id(owner)] = _Turns()
            weakref.finalize(owner, _TURNS.pop, id(owner), None)
        return _TURNS[id(owner)]


def enter(owner: Any, *, alone: bool) -> tuple[int, int]:
    """Wait until the running thread may enter; return the earlier entries, for `leave`.

    owner: the object, of a class with weak references
    alone: wait for every thread inside; else wait for threads alone

    RuntimeError, without an entry, after ten minutes, and where two threads would wait for each
    other.
    """
    turns, me = _turns_of(owner), threading.get_ident()
    with turns.changed:
        stuck = alone and turns.is_stuck(me)
        if stuck or not turns.wait(me, alone):
            waited = "and both wait" if stuck else f"for {_LONGEST_WAIT:g} seconds"
            raise RuntimeError(
                f"another thread is in a call of this {type(owner).__name__}, {waited}; call a "
                "model from one thread, or give each a copy"
            )
        before = (turns.inside[me], turns.alone[me])
        turns.set(me, before[0] + 1, before[1] + alone)
        return before


def leave(owner: Any, before: tuple[int, int]) -> None:
    """Leave the object; later entries of the thread, kept by an interrupt, end too.

    owner: as of `enter`
    before: the result of `enter`
    """
    turns = _turns_of(owner)
    with turns.changed:
        turns.set(threading.get_ident(), *before)


def is_alone(owner: Any) -> bool:
    """Return whether the running thread is alone at an object."""
    turns = _TURNS.get(id(owner))
    return turns is not None and turns.alone[threading.get_ident()] > 0


@contextmanager
def turn(owner: Any, *, alone: bool) -> Iterator[None]:
    """Run the block between `enter` and `leave`."""
    before = enter(owner, alone=alone)
    try:
        yield
    finally:
        leave(owner, before)
