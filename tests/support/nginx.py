"""nginx as a proxy before a gRPC server, in clear or with TLS; tests skip where it is not installed."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from tests.support.stream_server import eventually

PROGRAM: Final = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")

_CONFIG: Final = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_max_body_size 0;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen {address} http2{tls};
        {certificate}
        location / {{ grpc_pass grpc://{upstream}; }}
    }}
}}
"""


@contextlib.asynccontextmanager
async def proxy(folder: Path, upstream: str, certificate: tuple[Path, Path] | None = None) -> AsyncIterator[str]:
    """Its address. `certificate` is the chain's file and the key's."""
    assert PROGRAM is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    words = ""
    if certificate is not None:
        words = f"ssl_certificate {certificate[0]}; ssl_certificate_key {certificate[1]};"
    config = folder / "nginx.conf"
    config.write_text(
        _CONFIG.format(
            folder=folder, address=address, upstream=upstream, tls=" ssl" if certificate else "", certificate=words
        )
    )
    process = await asyncio.create_subprocess_exec(
        PROGRAM, "-c", str(config), "-e", str(folder / "error.log"), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await eventually(lambda: process.returncode is not None or _listens(address))
        assert process.returncode is None, (folder / "error.log").read_text()
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0
