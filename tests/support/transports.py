"""The transports by the names that WORKER_GRPC_TRANSPORT gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from supervisor.transport import Transport
from supervisor.transport.grpcio import GrpcioTransport
from supervisor.transport.h2.dial import H2Transport

TransportFactory = Callable[..., Transport]
TRANSPORTS: Final[Mapping[str, TransportFactory]] = {"grpcio": GrpcioTransport, "h2": H2Transport}
