"""Addresses, and cutting one accepted TCP connection of this process.

Owns: nothing. gRPC's server has no call that loses a connection without a goodbye, which is the fault that
workers meet most. So the connection's own descriptor is looked up in /proc and shut down: both ends then
see their peer vanish. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from urllib.parse import unquote

from .errors import ListenError

_MAPPED_PREFIX = "::ffff:"
_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (compared with, not bound)
_MAX_PORT = 65535


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as (host, port). Raises ListenError."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > _MAX_PORT:
        raise ListenError(f"{address!r} is not an address to listen on: give HOST:PORT, e.g. 127.0.0.1:8080")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """The address to dial for something that listens on `host`; a wildcard becomes the loopback."""
    host = _WILDCARDS.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def why_not_listen(host: str, port: int) -> str:
    """The system's reason why `host:port` can't be bound; gRPC's own message does not tell it in short."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return "the address can't be bound"


def cut_connection(peer: str, local_port: int) -> bool:
    """Shut down the connection that `peer` (as gRPC names it: `ipv4:1.2.3.4:5`) has to our `local_port`.

    False when there is none (any more).
    """
    try:
        host, port = split_address(unquote(peer.partition(":")[2]))
    except ListenError:
        return False
    for entry in Path("/proc/self/fd").iterdir():
        # The descriptor may be gone by the time it is looked at, or be no connected TCP socket.
        with contextlib.suppress(OSError):
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as candidate:
                if candidate.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                remote = candidate.getpeername()
                same_peer = (remote[0].removeprefix(_MAPPED_PREFIX), remote[1]) == (host, port)
                if same_peer and candidate.getsockname()[1] == local_port:
                    candidate.shutdown(socket.SHUT_RDWR)
                    return True
    return False
