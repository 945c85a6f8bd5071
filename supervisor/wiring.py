"""From settings to the parts that have settings of their own.

Owns: nothing; the one place that knows which variable goes where.
"""

from __future__ import annotations

from pathlib import Path

from supervisor.auth import AuthSettings
from supervisor.backoff import ReconnectSettings
from supervisor.device_meter import MemoryLimits
from supervisor.dispatcher import Limits
from supervisor.session import SessionSettings
from supervisor.settings import Settings
from supervisor.transport import TlsFiles, Transport


def open_transport(settings: Settings) -> Transport:
    """The transport that WORKER_GRPC_TRANSPORT names."""
    from supervisor.transport.grpcio import GrpcioTransport  # noqa: PLC0415  (grpc is loaded only when it is chosen)

    tls = None
    if settings.use_tls:
        tls = TlsFiles(
            ca_file=_text(settings.scheduler_ca_file),
            client_cert_file=_text(settings.scheduler_client_cert_file),
            client_key_file=_text(settings.scheduler_client_key_file),
        )
    return GrpcioTransport(tls)


def auth_settings(settings: Settings) -> AuthSettings:
    return AuthSettings(
        auth_token=settings.auth_token,
        worker_jwt=settings.worker_jwt,
        token_file=settings.auth_token_file,
        jwks_url=settings.scheduler_jwks_url,
        jwks_ttl_s=settings.scheduler_jwks_ttl_seconds,
        issuer=settings.scheduler_jwt_issuer,
        audience=settings.scheduler_jwt_audience,
    )


def session_settings(settings: Settings) -> SessionSettings:
    return SessionSettings(
        addresses=settings.scheduler_targets,
        heartbeat_interval_s=settings.heartbeat_interval_seconds,
        reconnect=ReconnectSettings(
            delay_s=settings.reconnect_delay,
            max_delay_s=settings.reconnect_max_delay,
            jitter_s=settings.reconnect_jitter_seconds,
            max_attempts=settings.max_reconnect_attempts,
        ),
    )


def limits(settings: Settings) -> Limits:
    return Limits(
        max_concurrency=settings.max_concurrency,
        model_concurrency=settings.model_concurrency,
        cancel_grace_s=settings.cancel_grace_seconds,
        max_input_bytes=settings.max_input_bytes,
    )


def memory_limits(settings: Settings, executors: int) -> MemoryLimits:
    """The host cache is shared out evenly, so that each executor's ledger decides alone."""
    host_gb = settings.host_cache_gb / max(1, executors)
    return MemoryLimits(settings.max_vram_gb, settings.vram_safety_margin_gb, host_gb)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
