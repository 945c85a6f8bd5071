"""`python -P -m executor`: one process per GPU, started by the supervisor.

1. tie this process to its parent's life and take the pipe;
2. a reader thread waits for Init, and from then on for the end of the pipe, while this thread imports tenant code;
3. Ready (a spare says Parked first, and waits for its slot: spare.py); this thread becomes the event loop of async
   functions, the reader feeds the Service;
4. leave by Shutdown, or by any of the ends in process.py.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import queue
import signal
import threading

import msgspec

from executor import spare
from executor.blobs import Blobs
from executor.boot import BootError, load_functions, ready
from executor.files import StoreSettings
from executor.link import Link
from executor.models import ModelStore
from executor.process import Departure, ExitCode, buffer_by_line, die_with_parent, forbid_new_privileges, say
from executor.runner import Limits, Runner
from executor.service import Service
from gen_worker.pipe.arena import ArenaError, ArenaReader, ArenaWriter
from gen_worker.pipe.frames import FrameError
from gen_worker.pipe.messages import Fatal, Init, Shutdown, Take, decode_downward
from gen_worker.signature import FunctionSpec


class Reader:
    """The thread that reads the pipe, from the first frame to the process's last moment."""

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

    def start(self) -> None:
        threading.Thread(target=self._read, name="pipe-reader", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                frames = self._link.receive()
                if self.service is not None:
                    self.service.handle(frames)
                else:
                    self._before_ready(frames)
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


def build_service(
    init: Init, specs: tuple[FunctionSpec, ...], link: Link, departure: Departure, arguments: argparse.Namespace,
    loop: asyncio.AbstractEventLoop,
) -> Service:  # fmt: skip
    """Put the parts together; called in the event loop's thread."""
    blobs = Blobs(ArenaReader(arguments.down_fd), ArenaWriter(arguments.up_fd), link.send)
    types = {injection.type_name: injection.type for spec in specs for injection in spec.injections}
    models = ModelStore(types, init.device, send=link.send, on_poisoned=departure.poisoned)
    limits = Limits(init.max_output_bytes, init.max_delta_bytes, init.max_delta_events)
    runner = Runner(blobs, models, limits, init.device, departure)

    def on_shutdown() -> None:
        departure.stop_by()
        loop.call_soon_threadsafe(loop.stop)

    return Service(
        {spec.name: spec for spec in specs},
        send=link.send,
        blobs=blobs,
        models=models,
        runner=runner,
        threads=init.threads,
        cancel_grace_s=init.cancel_grace_s,
        loop=loop,
        loop_thread=threading.get_ident(),
        store=StoreSettings(init.file_socket, init.max_upload_bytes),
        on_shutdown=on_shutdown,
    )


def main() -> None:
    """The process; never returns."""
    parser = argparse.ArgumentParser(prog="python -P -m executor", description="Started by gen-worker-supervisor only.")
    for name in ("pipe-fd", "down-fd", "up-fd", "parent-pid"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent_pid)
    forbid_new_privileges()
    faulthandler.enable(all_threads=False)  # a hundred idle threads would push out what else it said
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no KeyboardInterrupt in the midst of the event loop
    buffer_by_line()
    link = Link(arguments.pipe_fd, on_broken=lambda error: departure.pipe_closed(error))  # noqa: PLW0108  (made below)
    departure = Departure(link)
    reader = Reader(link, departure)
    reader.start()
    init = reader.init.get()
    try:
        if init.spare:
            with spare.low_priority():
                specs = load_functions(init)
            init = spare.wait_for_slot(init, link, reader.take)
        else:
            specs = load_functions(init)
    except BootError as error:
        departure.fatal(error.fatal, ExitCode.NOT_STARTED)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    reader.service = build_service(init, specs, link, departure, arguments, loop)
    link.send(ready(specs))
    try:
        loop.run_forever()
    except SystemExit as request:
        departure.exit_by_tenant("a task of the tenant's", request)
    departure.stop()


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        say(f"failed: {error!r}")
        raise
