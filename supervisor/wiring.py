"""From settings to the parts that have settings of their own.

Owns: nothing; the one place that knows which variable goes where.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from supervisor.auth import AuthSettings
from supervisor.backoff import ReconnectSettings
from supervisor.cpus import usable_cpus
from supervisor.device_meter import MemoryLimits
from supervisor.devices import Device
from supervisor.dispatcher import FileService, Limits
from supervisor.executor_place import ExecutorPlace
from supervisor.input_arena import InputArena
from supervisor.run_files import Store, Transfers
from supervisor.session import SessionSettings
from supervisor.settings import Settings
from supervisor.transfers.messages import FileSettings, HuggingFaceOptions, TransferSettings
from supervisor.transport import TlsFiles, Transport

if TYPE_CHECKING:
    from supervisor.monitoring import Monitoring
    from supervisor.tracing import Tracing

log = logging.getLogger(__name__)

POLL_CPUS: Final = 2
"""With fewer CPUs a loop that polls would take the time from whom it waits for."""
OTEL_REMEDY: Final = "pip install 'gen-worker[otel]'"


def open_transport(settings: Settings, inputs: InputArena | None = None) -> Transport:
    """The transport that WORKER_GRPC_TRANSPORT names. Large payloads go to `inputs`, if it is given."""
    tls = None
    if settings.use_tls:
        tls = TlsFiles(
            ca_file=_text(settings.scheduler_ca_file),
            client_cert_file=_text(settings.scheduler_client_cert_file),
            client_key_file=_text(settings.scheduler_client_key_file),
        )
    # Only the chosen one's libraries are loaded.
    if settings.grpc_transport == "h2":
        from supervisor.transport.h2.dial import H2Transport  # noqa: PLC0415

        return H2Transport(tls, arena=inputs, busy_poll_s=busy_poll_s(settings))
    from supervisor.transport.grpcio import GrpcioTransport  # noqa: PLC0415

    return GrpcioTransport(tls, arena=inputs)


def busy_poll_s(settings: Settings) -> float:
    """How long the loop may poll instead of sleeping; 0.0 where that would take the only CPU from an executor."""
    return settings.busy_poll_us / 1e6 if usable_cpus() >= POLL_CPUS else 0.0


def open_monitoring(settings: Settings, redact: Callable[[str], str]) -> Monitoring | None:
    """None when WORKER_HTTP_ADDR is empty: then nothing is counted either."""
    if not settings.http_addr:
        return None
    from supervisor.monitoring import Monitoring  # noqa: PLC0415  (its libraries take memory)

    return Monitoring(settings, redact)


def open_tracing(settings: Settings, conceal: Callable[[Iterable[str]], None]) -> Tracing | None:
    """None when OTEL_EXPORTER_OTLP_ENDPOINT is not set, or the extra not installed. `conceal` is told the secrets."""
    if not settings.otel_exporter_otlp_endpoint:
        return None
    try:
        from supervisor.tracing import Tracing  # noqa: PLC0415  (its libraries take memory)
    except ImportError as error:
        log.warning("no traces are sent, though OTEL_EXPORTER_OTLP_ENDPOINT is set: %s; %s", error, OTEL_REMEDY)
        return None
    pairs = (item.strip().partition("=") for item in settings.otel_exporter_otlp_headers.split(",") if item)
    headers = {name: unquote(value) for name, _, value in pairs}
    conceal(headers.values())
    identity = {"service.instance.id": settings.worker_id}
    if settings.deployment_id:
        identity["gen_worker.deployment_id"] = settings.deployment_id
    return Tracing(settings.otel_exporter_otlp_endpoint, headers, identity)


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
        max_ws_frame_bytes=settings.max_ws_frame_bytes,
    )


def file_settings(settings: Settings, place: ExecutorPlace) -> FileSettings:
    """With a name for the socket that nobody can have taken."""
    return FileSettings(
        cache_dir=str(settings.cache_dir.absolute()),
        run_dir=str(settings.run_dir.absolute()),
        max_input_bytes=settings.max_input_file_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        socket=f"gen-worker-files-{secrets.token_hex(16)}",
        executor_uid=os.geteuid() if place.user is None else place.user.uid,
        started=time.time(),
    )


def file_service(settings: Settings, transfers: Transfers) -> FileService:
    """Who moves the files of runs; the hub is the last resort of what names no store."""
    stores = (
        Store(settings.file_api_base_url, settings.file_api_token),
        Store(settings.cozy_hub_url, settings.cozy_hub_token),
    )
    others = (settings.cache_dir, settings.model_cache_dir, settings.outbox_dir)
    inside = (path.relative_to(settings.run_dir) for path in others if path and path.is_relative_to(settings.run_dir))
    return FileService(transfers, stores, frozenset(path.parts[0] for path in inside if path.parts))


def transfer_settings(
    settings: Settings, devices: Sequence[Device], files: FileSettings | None = None
) -> TransferSettings:
    """The least capable GPU speaks for all: any of them may get the model. Without `files` it serves no runs."""
    return TransferSettings(
        model_cache_dir=str(settings.model_cache_dir),
        model_cache_max_bytes=int(settings.model_cache_max_gb * 2**30),
        max_concurrent_downloads=settings.max_concurrent_downloads,
        hub_url=settings.cozy_hub_url,
        hub_token=settings.cozy_hub_token,
        hf_token=settings.hf_token,
        hf_home=_text(settings.hf_home) or "",
        hf=HuggingFaceOptions(
            components=settings.cozy_hf_components,
            include_optional=settings.cozy_hf_include_optional_components,
            precisions=settings.cozy_hf_weight_precisions,
            allow_root_json=settings.cozy_hf_allow_root_json,
            full_repo=settings.cozy_hf_full_repo_download,
        ),
        gpu_sm=min((int(device.sm) for device in devices if device.sm.isdigit()), default=0),
        files=files or FileSettings(),
    )


def memory_limits(settings: Settings, executors: int) -> MemoryLimits:
    """The host cache is shared out evenly, so that each executor's ledger decides alone."""
    host_gb = settings.host_cache_gb / max(1, executors)
    return MemoryLimits(settings.max_vram_gb, settings.vram_safety_margin_gb, host_gb)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
