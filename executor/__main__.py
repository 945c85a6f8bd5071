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
import signal
import threading

from executor import spare
from executor.blobs import Blobs
from executor.boot import BootError, load_functions, ready
from executor.files import StoreSettings
from executor.link import Link
from executor.models import ModelStore
from executor.process import Departure, ExitCode, buffer_by_line, die_with_parent, forbid_new_privileges, say
from executor.reader import Reader
from executor.runner import Limits, Runner
from executor.service import Service
from gen_worker.pipe.arena import ArenaReader, ArenaWriter
from gen_worker.pipe.messages import Init
from gen_worker.signature import FunctionSpec


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
