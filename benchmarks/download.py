"""A verified download beside curl: `python benchmarks/download.py [MiB] [rounds]`.

The same bytes from the same loopback server onto the same disk, both with an fsync at the end. curl only writes; the
engine of the transfer process also hashes (BLAKE3) what it writes. Printed is the median of each, and their ratio.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from supervisor.transfers.download import Source, download
from supervisor.transfers.http import open_session
from supervisor.transfers.messages import RetrySettings
from supervisor.transfers.snapshots import RemoteFile

MIB = 2**20


class SendfileServer:
    """Serves one file to whoever connects, by sendfile, so that it takes next to no time of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._send, args=(connection,), daemon=True).start()

    def _send(self, connection: socket.socket) -> None:
        with connection, self._path.open("rb") as file:
            connection.recv(65536)
            size = self._path.stat().st_size
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % size)
            connection.sendfile(file)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--serve":
        server = SendfileServer(Path(sys.argv[2]))
        print(server.url, flush=True)
        sys.stdin.read()
        return
    size = int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 1024 * MIB
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), size, rounds)


def run(directory: Path, size: int, rounds: int) -> None:
    origin, hasher = directory / "origin", blake3()
    with origin.open("wb") as file:
        for _ in range(size // MIB):
            block = os.urandom(MIB)
            hasher.update(block)
            file.write(block)
    command = [sys.executable, __file__, "--serve", str(origin)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        steps: dict[str, Callable[[Path], None]] = {
            "curl": lambda target: with_curl(url, target),
            "engine": lambda target: asyncio.run(with_engine(url, size, hasher.hexdigest(), target)),
        }
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(rounds):
            for name, step in steps.items():
                target = directory / f"{name}{number}"
                started = time.perf_counter()
                step(target)
                rates[name].append(size / MIB / (time.perf_counter() - started))
                assert target.stat().st_size == size
                target.unlink()
        assert server.stdin is not None
        server.stdin.close()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in medians.items():
        print(f"{name:8} {found:7.0f} MiB/s   ({min(rates[name]):.0f} to {max(rates[name]):.0f})")
    print(f"ratio    {medians['engine'] / medians['curl']:7.2f}")


def with_curl(url: str, target: Path) -> None:
    curl = shutil.which("curl")
    assert curl, "curl is needed for comparison"
    subprocess.run([curl, "-s", "-o", str(target), url], check=True)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


async def with_engine(url: str, size: int, digest: str, target: Path) -> None:
    async with open_session(30.0) as session:

        async def no_fresh_url(_: RemoteFile, refused: str) -> str:
            raise AssertionError(refused)

        source = Source(session, RetrySettings(), "the benchmark", no_fresh_url)
        await download(source, RemoteFile("file", size, digest, url), target, lambda _: None)


if __name__ == "__main__":
    main()
