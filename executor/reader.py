"""The reading of the pipe, from the first frame to the process's last moment.

Owns: which thread reads. It is one at a time, and for as long as it is the reader it alone uses the Link's receiving
side and feeds the Service.

1. Before Ready there is Init (and Take, for a spare), or Shutdown; then every frame is the Service's.
2. A run whose function has proved brief (pace.py) is run by the thread that read it: handing it to another thread takes
   longer than such a run does.
3. Nobody reads meanwhile. So a relief thread looks every TICK_S, and when a run has been on the reader since its last
   look, another thread becomes the reader; the one that has the run ends with it. A cancel is thus read within two
   ticks, unless the function holds the interpreter: then nothing here reads it, and the supervisor ends the process.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec

from executor.link import Link
from executor.process import Departure, ExitCode, say
from executor.service import Service
from gen_worker.pipe.arena import ArenaError
from gen_worker.pipe.frames import FrameError
from gen_worker.pipe.messages import Fatal, Init, Shutdown, Take, decode_downward

TICK_S: Final = 0.005
QUIET_TICKS: Final = 20
"""After so many without a run on the reader the relief sleeps until there is one: a wake-up costs as much as a tick."""


class Reader:
    """See the module."""

    def __init__(self, link: Link, departure: Departure) -> None:
        self.init: queue.SimpleQueue[Init] = queue.SimpleQueue()
        """Gets the one Init."""
        self.take: queue.SimpleQueue[Take] = queue.SimpleQueue()
        """Gets the one Take, in a spare."""
        self.service: Service | None = None
        """Set before Ready is sent: the supervisor sends nothing but Take and Shutdown before it."""
        self._link = link
        self._departure = departure
        self._has_init = False
        self._is_spare = False
        """Whether a Take is still to come."""
        self._relief = Relief(lambda: self._start(self._take_over))

    def start(self) -> None:
        self._start(self._read)

    def _start(self, read: Callable[[], None]) -> None:
        threading.Thread(target=read, name="pipe-reader", daemon=True).start()

    def _take_over(self) -> None:
        if self._relief.relieves():
            self._read()

    def _read(self) -> None:
        pid = os.getpid()
        try:
            while True:
                frames = self._link.receive()
                if self.service is None:
                    self._before_ready(frames)
                    continue
                work = self.service.handle(frames)
                if work is not None and (not self._relief.covers(work) or os.getpid() != pid):
                    return  # another thread reads, or the function forked and this is the child
                del frames, work  # an idle reader keeps nothing of the last run
        except EOFError:
            self._departure.pipe_closed()
        except OSError as error:
            self._departure.pipe_closed(error)
        except (FrameError, ArenaError, msgspec.DecodeError) as error:
            message = f"the supervisor sent what can't be understood: {error}"
            say(message)
            self._departure.fatal(Fatal("protocol", message), ExitCode.PROTOCOL)
        except BaseException as error:  # noqa: BLE001  # without its reader the process would serve nobody
            self._departure.internal(error)

    def _before_ready(self, frames: list[bytes]) -> None:
        for body in frames:
            message = decode_downward(body)
            if isinstance(message, Shutdown):
                self._departure.stop_by(0)
            elif isinstance(message, Init) and not self._has_init:
                self._has_init = True
                self._is_spare = message.spare
                self.init.put(message)
            elif isinstance(message, Take) and self._is_spare:
                self._is_spare = False
                self.take.put(message)
            else:
                raise msgspec.DecodeError(f"{type(message).__name__} is not expected before Ready")


class Relief:
    """Has `take_over` called when the reader's work takes longer than a tick or two.

    That has another thread call `relieves`; it may raise RuntimeError when there is none, and is called again.
    """

    def __init__(self, take_over: Callable[[], None], tick_s: float = TICK_S) -> None:
        self._take_over = take_over
        self._tick_s = tick_s
        self._begun = 0
        self._unread: list[int] = []
        """Has the number of the work that the reader does; whoever takes it out is the reader then."""
        self._asleep: list[threading.Lock] = []
        """Has the relief's lock while that sleeps; whoever takes it out releases it."""
        self._thread: threading.Thread | None = None

    @property
    def sleeps(self) -> bool:
        """Whether it looks no more until there is work."""
        return bool(self._asleep)

    def covers(self, work: Callable[[], None]) -> bool:
        """Do the work. False when another thread reads by the end of it, so that the caller must not go on."""
        self._begun = mine = self._begun + 1
        self._unread.append(mine)
        # The relief says that it sleeps and then looks at `_unread`, this the other way round: one of them sees both.
        if self._asleep:
            with suppress(IndexError):  # it has seen for itself
                self._asleep.pop().release()
        elif self._thread is None:
            thread = threading.Thread(target=self._watch, name="pipe-relief", daemon=True)
            with suppress(RuntimeError):  # no thread to be had now
                thread.start()
                self._thread = thread
        work()
        try:
            self._unread.remove(mine)
        except ValueError:
            return False
        return True

    def relieves(self) -> bool:
        """Whether the calling thread is the reader from now on, instead of one that is at work."""
        try:
            self._unread.pop()
        except IndexError:
            return False
        return True

    def _watch(self) -> None:
        woken = threading.Lock()
        woken.acquire()
        seen, quiet = self._begun, 0
        while True:
            woken.acquire(timeout=self._tick_s)
            if seen != self._begun:
                seen, quiet = self._begun, 0
            elif self._unread:
                with suppress(RuntimeError):  # no thread to be had now
                    self._take_over()
            else:
                quiet += 1
                if quiet >= QUIET_TICKS:
                    self._sleep(woken)
                    quiet = 0

    def _sleep(self, woken: threading.Lock) -> None:
        self._asleep.append(woken)
        if self._unread:
            try:
                self._asleep.pop()
            except IndexError:
                pass  # it is being woken: take that
            else:
                return
        woken.acquire()
