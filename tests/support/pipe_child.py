"""A child process for the tests of supervisor/child.py: obeys frames of the form `verb argument`.

Started as `python -P -m pipe_child`, with only the standard library, so that it starts fast.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--pipe-fd", "--down-fd", "--up-fd", "--parent-pid"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("orders", nargs="*")
    arguments = parser.parse_args()
    assert os.getppid() == arguments.parent_pid
    pipe = Connection(arguments.pipe_fd)
    pipe.send_bytes(b"hello")
    for order in arguments.orders:
        obey(pipe, order.encode(), arguments.up_fd)
    while True:
        try:
            frame = pipe.recv_bytes()
        except EOFError:
            return 0
        obey(pipe, frame, arguments.up_fd)


def obey(pipe: Connection, frame: bytes, up_fd: int) -> None:  # noqa: C901, PLR0912  (one case per order)
    verb, _, argument = frame.partition(b" ")
    match verb:
        case b"echo":
            pipe.send_bytes(argument)
        case b"length":
            pipe.send_bytes(b"%d" % len(argument))
        case b"flood":  # count size, each one told apart by its number
            count, size = map(int, argument.split())
            for number in range(count):
                pipe.send_bytes(b"%d " % number + b"x" * size)
        case b"write_and_die":
            for number in range(int(argument)):
                pipe.send_bytes(b"%d" % number)
            print("last words", end="", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        case b"print":
            os.write(1, argument)
        case b"raw":
            os.write(pipe.fileno(), argument)
        case b"garbage":
            os.write(pipe.fileno(), struct.pack("!i", 5) + b"whole" + struct.pack("!i", -7) + b"rest")
            time.sleep(60)
        case b"close_pipe":
            os.close(pipe.fileno())
            time.sleep(60)
        case b"leave_a_thread":
            # The first thread ends, and with it what /proc shows of the process's memory; the process lives on.
            threading.Thread(target=time.sleep, args=(60,)).start()
            os.close(pipe.fileno())
            ctypes.CDLL(None).pthread_exit(None)
        case b"sleep":
            time.sleep(float(argument))
        case b"exit":
            os._exit(int(argument))
        case b"kill_self":
            os.kill(os.getpid(), int(argument))
        case b"grandchild":  # in the child's session, with everything inherited
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
            pipe.send_bytes(b"%d" % child.pid)
        case b"daemon":  # out of the session; keeps the pipe and the outputs open and writes to them without end
            if pid := os.fork():
                pipe.send_bytes(b"%d" % pid)
            else:
                os.setsid()
                write_for_ever(pipe)
        case b"blob":
            os.pwrite(up_fd, argument, 0)
            pipe.send_bytes(b"written")
        case _:
            raise AssertionError(f"unknown order {frame[:40]!r}")


def write_for_ever(pipe: Connection) -> None:
    try:
        while True:
            pipe.send_bytes(b"noise" * 1000)
            os.write(1, b"noise\n" * 1000)
    except OSError:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
