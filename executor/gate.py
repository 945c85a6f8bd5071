"""Stops a thread in the middle of tenant code, and only there.

Owns: for one run, whether an asynchronous exception may be raised into its thread now. `PyThreadState_SetAsyncExc`
names a thread, not what it runs, and the exception shows up at some later bytecode; a pool thread that has just
finished with a run must not be hit by what was meant for it, nor code of ours in the middle of a write. Why that holds:

1. A strike takes `_lock` without waiting, and is skipped when the thread has it. Raising happens under the lock.
2. Code of ours that tenant code calls into holds the lock (`shielded`). Entering it, the thread first takes back an
   exception that is still pending and raises it there, while nothing is half done.
3. Between the tenant function's return and `_left = True` runs no bytecode at which CPython looks for exceptions, other
   than inside of the `try` around it. After that store no strike begins, so at most one, begun before, can land.
4. `_leave` takes the lock, which waits for such a strike, and takes a pending exception back. If it lands instead, the
   second attempt can't be hit by another. The lock is re-entrant, so having it already is no harm, and belongs to
   this run alone, so it is never released.

A strike that lands in a destructor or a weakref callback is lost there (CPython reports it as ignored), as is one that
the tenant swallows: strikes are repeated while the run goes on.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, Final

from gen_worker.errors import RunCanceled

_set_async_exc: Final = ctypes.pythonapi.PyThreadState_SetAsyncExc
_set_async_exc.argtypes = (ctypes.c_ulong, ctypes.py_object)
_set_async_exc.restype = ctypes.c_int
_take_back: Final = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)(
    ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
)
"""The same function, for NULL: it clears what is pending."""


class Gate:
    """See the module. Made per run of a sync function; `call` is used once."""

    __slots__ = ("_left", "_lock", "_struck", "thread_id")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._left = False
        self._struck = False
        self.thread_id = 0
        """The thread that is inside of `call`; 0 before."""

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, BaseException | None]:
        """What `func` returned or raised. A strike that came too late is a RunCanceled in place of either, or is lost.

        After the return nothing can be raised into this thread for this run any more.
        """
        value: Any = None
        error: BaseException | None = None
        try:
            try:
                self.thread_id = threading.get_ident()
                value = func(*args, **kwargs)
            except BaseException as caught:  # noqa: BLE001  # handed to the caller, whatever it is
                self._left = True
                error = caught
            else:
                self._left = True
        except RunCanceled as late:
            self._left = True
            error = late
        try:
            self._leave()
        except RunCanceled:
            self._leave()
        return value, error

    def is_inside(self, thread: int) -> bool:
        """Whether `thread` is the one that runs tenant code behind this gate."""
        return thread == self.thread_id and not self._left

    def strike(self) -> bool:
        """Raise RunCanceled in the run's thread, if that is in tenant code now. False when it has left for good."""
        if self._left:
            return False
        if not self.thread_id or not self._lock.acquire(blocking=False):
            return True
        try:
            if not self._left:
                self._struck = True
                _set_async_exc(self.thread_id, RunCanceled)
        finally:
            self._lock.release()
        return not self._left

    def shielded(self) -> Gate:
        """A context in which no strike lands. Raises RunCanceled on entry when there was one before."""
        return self

    def __enter__(self) -> None:
        # A strike that is pending may land anywhere up to the end of `check`. After it none can, for the lock is held.
        with self._lock:
            self.check()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def check(self) -> None:
        """Raise what was struck and may still be pending; the caller has the lock."""
        if self._struck:
            _take_back(self.thread_id, None)
            raise RunCanceled

    def _leave(self) -> None:
        self._lock.acquire()
        if self._struck:
            _take_back(threading.get_ident(), None)
