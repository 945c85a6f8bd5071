"""The threads that sync functions run on.

Owns: the items that wait, and who is idle. The pool grows by need: a thread that takes an item while more wait calls
one other thread, an idle one or, if there is none, a new one, before it starts on its own. Thus functions that block
get all their threads one after the other at once, while tiny ones, which are done before the called thread has the
GIL, are served by one or two threads without a hand-over for each.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class ThreadPool(Generic[T]):
    """Runs `handle(item)` for each item, in up to `limit` daemon threads; `handle` must not raise."""

    def __init__(self, limit: int, handle: Callable[[T], None]) -> None:
        self._limit = limit
        self._handle = handle
        self._waiting: deque[T] = deque()
        self._idle: list[threading.Lock] = []
        """One lock per idle thread, which waits for its release; the last to come is the first called."""
        self._call = threading.Lock()
        """Held while a called thread is on its way; it is what that thread releases first."""
        self.size = 0

    @property
    def waits(self) -> bool:
        """Whether an item waits for a thread."""
        return bool(self._waiting)

    def submit(self, items: Iterable[T]) -> None:
        """Queue items. They start in order."""
        self._waiting.extend(items)
        self._call_another()

    def _call_another(self) -> None:
        """Have one more thread look at what waits, unless one is on its way or all are busy."""
        while self._waiting and self._call.acquire(blocking=False):
            try:
                self._idle.pop().release()
            except IndexError:
                if self.size < self._limit:
                    self.size += 1
                    threading.Thread(target=self._work, name=f"run-{self.size}", daemon=True).start()
                    return
                self._call.release()
                # A thread that became idle before this release found the call taken by us, so look again.
                if not self._idle:
                    return
            else:
                return

    def _work(self) -> None:
        called = threading.Lock()
        called.acquire()
        self._call.release()
        while True:
            try:
                item = self._waiting.popleft()
            except IndexError:
                self._wait(called)
                continue
            if self._waiting:
                self._call_another()
            self._handle(item)
            del item  # an idle thread keeps no run's payload alive

    def _wait(self, called: threading.Lock) -> None:
        """Be idle until called, unless something came while this thread was on its way to be idle."""
        self._idle.append(called)
        if self._waiting:
            try:
                self._idle.remove(called)
            except ValueError:
                pass  # someone is calling this very thread: take that call
            else:
                return
        called.acquire()
        self._call.release()
