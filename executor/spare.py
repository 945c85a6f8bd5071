"""A spare: an executor that has imported everything, and waits to be told which slot it serves.

Owns: what is put off until then. CUDA looks at CUDA_VISIBLE_DEVICES when its driver starts, so that variable is still
free as long as nothing in the process has used it; everything else that depends on the slot is made after the Take.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterator
from typing import Final

import msgspec

from executor.boot import BootError
from executor.link import Link
from executor.torch_state import cuda_use
from gen_worker.pipe.messages import PIPE_PROTOCOL, Fatal, Init, Parked, Take

LOW_PRIORITY: Final = 19
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"


@contextlib.contextmanager
def low_priority() -> Iterator[None]:
    """Give way to executors that serve meanwhile.

    By nice, where this process may take it back; else as a batch job, which is less but which everybody may end. Both
    are of this thread and of those that it starts meanwhile.
    """
    policy, nice = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    undoable = _may_return_to(nice)
    if undoable:
        os.setpriority(os.PRIO_PROCESS, 0, LOW_PRIORITY)
    else:
        with contextlib.suppress(OSError):  # a sandbox forbids it: then it takes its share
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        if undoable:
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        else:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, policy, os.sched_param(0))


def wait_for_slot(init: Init, link: Link, take: queue.SimpleQueue[Take]) -> Init:
    """Say that it waits, and return its Init with what Take says. Raises BootError when it can't serve that device."""
    link.send(Parked(PIPE_PROTOCOL, cuda_use()))
    told = take.get()
    if told.visible != os.environ.get(_VISIBLE):  # noqa: TID251  (a device is chosen by it alone)
        if cuda_use():  # by a thread of the tenant's, since Parked
            message = f"{told.visible!r} can't become visible: something that was imported has started CUDA"
            raise BootError(Fatal("device", message))
        os.environ[_VISIBLE] = told.visible  # noqa: TID251  (as above)
    return msgspec.structs.replace(init, slot=told.slot, device=told.device, spare=False)


def _may_return_to(nice: int) -> bool:
    """Tried by a thread, whose nice value is its own: a capability in a user namespace does not count."""
    returned: list[bool] = []

    def attempt() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, LOW_PRIORITY)
            os.setpriority(os.PRIO_PROCESS, 0, nice)
            returned.append(True)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(returned)
