"""The table of the worker's settings: one field of `Settings` is the whole definition of one variable.

Owns: names, defaults, notations and meanings. Reading the environment is config.py's part; import Settings from there.

An attribute is called like its variable, in lower case and without `WORKER_` (`worker_id` and `worker_jwt` keep it;
what is parsed from JSON loses the `_JSON` too). One GB is 2**30 bytes, as GPU memory is counted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from supervisor import config_parse as parse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

DEFAULT_MANIFESTS: Final = (Path(".cozy/manifest.json"), Path("/app/.cozy/manifest.json"))
"""Where the manifest is looked for, in order, when WORKER_MANIFEST is not set."""

_MAX_SHOWN: Final = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """The definition of one environment variable."""

    env: str
    parse: Callable[[str], Any]
    default: str
    """As one would write it; empty: unset."""
    shown_default: str
    meaning: str
    unit: str = ""
    secret: bool = False
    """The value is a credential: never shown, never inherited."""
    withheld: bool = False
    """The value leads to a credential: not inherited."""
    empty_means_off: bool = False
    older_name: str = ""


def _var(  # noqa: PLR0913 - one keyword per column of the table
    env: str,
    parser: Callable[[str], T],
    default: str,
    meaning: str,
    *,
    unit: str = "",
    shown: str = "",
    secret: bool = False,
    withheld: bool = False,
    empty_means_off: bool = False,
    older_name: str = "",
) -> T:
    variable = Variable(
        env=env,
        parse=parser,
        default=default,
        shown_default=shown or default or "-",
        meaning=meaning,
        unit=unit,
        secret=secret,
        withheld=withheld or secret,
        empty_means_off=empty_means_off,
        older_name=older_name,
    )
    return dataclasses.field(default_factory=lambda: parser(default), metadata={"variable": variable})


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """What the environment asks for. Seconds are floats, sizes are bytes, GB are floats."""

    # -- scheduler
    scheduler_addr: str = _var("SCHEDULER_ADDR", parse.address, "localhost:8080", "scheduler to dial")
    scheduler_addrs: tuple[str, ...] = _var(
        "SCHEDULER_ADDRS", parse.comma_list(parse.address), "", "comma-separated seeds for leader discovery"
    )
    use_tls: bool = _var("USE_TLS", parse.boolean, "false", "TLS to the scheduler")
    scheduler_ca_file: Path | None = _var(
        "SCHEDULER_CA_FILE", parse.optional(parse.existing_file), "", "private CA, PEM; else the system's CAs"
    )
    scheduler_client_cert_file: Path | None = _var(
        "SCHEDULER_CLIENT_CERT_FILE", parse.optional(parse.existing_file), "", "client certificate for mTLS, PEM"
    )
    scheduler_client_key_file: Path | None = _var(
        "SCHEDULER_CLIENT_KEY_FILE", parse.optional(parse.existing_file), "", "its key, PEM", withheld=True
    )
    grpc_transport: str = _var("WORKER_GRPC_TRANSPORT", parse.choice("grpcio", "h2"), "grpcio", "`grpcio` or `h2`")
    reconnect_delay: float = _var("RECONNECT_DELAY", parse.number(), "5", "first wait before dialing again", unit="s")
    reconnect_max_delay: float = _var("RECONNECT_MAX_DELAY", parse.number(), "60", "longest such wait", unit="s")
    reconnect_jitter_seconds: float = _var(
        "RECONNECT_JITTER_SECONDS", parse.number(), "1", "random part added to each wait, at most", unit="s"
    )
    max_reconnect_attempts: int = _var(
        "MAX_RECONNECT_ATTEMPTS", parse.integer(0), "0", "failed dials in a row before giving up; 0 is forever"
    )
    heartbeat_interval_seconds: float = _var(
        "HEARTBEAT_INTERVAL_SECONDS", parse.number(above_zero=True), "10", "between two heartbeats", unit="s"
    )

    # -- credentials
    auth_token: str = _var("AUTH_TOKEN", parse.token, "", "bearer token", secret=True)
    worker_jwt: str = _var("WORKER_JWT", parse.token, "", "bearer token when AUTH_TOKEN is not set", secret=True)
    auth_token_file: Path | None = _var(
        "AUTH_TOKEN_FILE",
        parse.optional(parse.path),
        "",
        "file with the token, read again at every connect",
        withheld=True,
    )
    scheduler_jwks_url: str = _var(
        "SCHEDULER_JWKS_URL", parse.http_url, "", "when set, the token is verified against it before dialing"
    )
    scheduler_jwks_ttl_seconds: float = _var(
        "SCHEDULER_JWKS_TTL_SECONDS", parse.number(), "300", "JWKS cache; an unknown kid refreshes at once", unit="s"
    )
    scheduler_jwt_issuer: str = _var("SCHEDULER_JWT_ISSUER", parse.text, "", "`iss` claim to require")
    scheduler_jwt_audience: str = _var("SCHEDULER_JWT_AUDIENCE", parse.text, "", "`aud` claim to require")

    # -- identity and tenant code
    worker_id: str = _var("WORKER_ID", parse.text, "", "name of this worker", shown="host name + short random")
    deployment_id: str = _var("DEPLOYMENT_ID", parse.text, "", "reported to the scheduler")
    tenant_id: str = _var("TENANT_ID", parse.text, "", "reported to the scheduler")
    runpod_pod_id: str = _var("RUNPOD_POD_ID", parse.text, "", "reported to the scheduler")
    user_modules: tuple[str, ...] = _var(
        "USER_MODULES",
        parse.comma_list(parse.module_name),
        "",
        "comma-separated modules to import when there is no manifest",
        shown="from the manifest",
    )
    manifest: Path | None = _var(
        "WORKER_MANIFEST",
        parse.optional(parse.path),
        "",
        "written by `python -m gen_worker.discover`",
        shown=", then ".join(map(str, DEFAULT_MANIFESTS)),
    )

    # -- runs and executors
    drain_timeout_seconds: float = _var(
        "WORKER_DRAIN_TIMEOUT_SECONDS", parse.number(), "30", "after SIGTERM, for running tasks", unit="s"
    )
    max_concurrency: int = _var(
        "WORKER_MAX_CONCURRENCY",
        parse.integer(0),
        "0",
        "tasks at once over the whole worker; past it the answer is `worker busy`; 0: no refusal",
    )
    gpus: tuple[str, ...] = _var(
        "WORKER_GPUS",
        parse.comma_list(parse.gpu),
        "",
        "indices or UUIDs, e.g. `0,2` or `GPU-...`; MIG UUIDs too",
        shown="all visible",
    )
    executors: int = _var(
        "WORKER_EXECUTORS",
        parse.integer(1),
        "1",
        "executor processes on a host without GPUs",
        shown="one per GPU, else 1",
    )
    executor_threads: int = _var(
        "WORKER_EXECUTOR_THREADS", parse.integer(1), "64", "sync functions at once in one executor"
    )
    model_concurrency: int = _var(
        "WORKER_MODEL_CONCURRENCY",
        parse.integer(0),
        "1",
        "default per executor for functions with an injected model; 0: no limit",
    )
    cancel_grace_seconds: float = _var(
        "WORKER_CANCEL_GRACE_SECONDS",
        parse.number(),
        "5",
        "between a cooperative cancel and killing the executor",
        unit="s",
    )
    executor_uid: int | None = _var(
        "WORKER_EXECUTOR_UID", parse.optional(parse.integer(0)), "", "run executors as this user"
    )
    executor_gid: int | None = _var(
        "WORKER_EXECUTOR_GID", parse.optional(parse.integer(0)), "", "run executors as this group"
    )
    busy_poll_us: int = _var(
        "WORKER_BUSY_POLL_US",
        parse.integer(0),
        "300",
        "h2 looks for the next message so long before it sleeps, while they come that fast; 0, or with one CPU: never",
        unit="us",
    )
    warm_spare: bool = _var(
        "WORKER_WARM_SPARE", parse.boolean, "0", "keep one started executor without a CUDA context in reserve"
    )

    # -- payload and file limits
    max_input_bytes: int = _var(
        "WORKER_MAX_INPUT_BYTES", parse.byte_size, "0", "one input payload; 0: the transport's 256 MiB", unit="bytes"
    )
    max_output_bytes: int = _var(
        "WORKER_MAX_OUTPUT_BYTES", parse.byte_size, "0", "one output payload; 0: the transport's 256 MiB", unit="bytes"
    )
    max_output_delta_bytes: int = _var(
        "WORKER_MAX_OUTPUT_DELTA_BYTES", parse.byte_size, "65536", "one delta; 0: no limit", unit="bytes"
    )
    max_output_delta_events: int = _var(
        "WORKER_MAX_OUTPUT_DELTA_EVENTS", parse.integer(0), "0", "deltas of one task; 0: no limit"
    )
    max_ws_frame_bytes: int = _var(
        "WORKER_MAX_WS_FRAME_BYTES", parse.byte_size, "0", "one realtime frame; 0: no limit", unit="bytes"
    )
    max_upload_bytes: int = _var(
        "WORKER_MAX_UPLOAD_BYTES",
        parse.byte_size,
        "200 MiB",
        "one saved file (WORKER_MAX_OUTPUT_FILE_BYTES is the older name)",
        unit="bytes",
        older_name="WORKER_MAX_OUTPUT_FILE_BYTES",
    )
    max_input_file_bytes: int = _var(
        "WORKER_MAX_INPUT_FILE_BYTES", parse.byte_size, "200 MiB", "one downloaded input file", unit="bytes"
    )

    # -- directories
    run_dir: Path = _var("WORKER_RUN_DIR", parse.path, "/tmp/cozy", "files of running tasks")  # noqa: S108 - contract
    cache_dir: Path = _var(
        "WORKER_CACHE_DIR",
        parse.path,
        "/tmp/cozy/cache",  # noqa: S108 - follows WORKER_RUN_DIR in load_settings
        "input files, kept between tasks",
        shown="$WORKER_RUN_DIR/cache",
    )
    outbox_dir: Path | None = _var(
        "WORKER_OUTBOX_DIR",
        parse.optional(parse.path),
        "",
        "keep undelivered results on disk, for the next supervisor to deliver",
    )

    # -- models
    max_vram_gb: float | None = _var(
        "WORKER_MAX_VRAM_GB",
        parse.optional(parse.number(above_zero=True)),
        "",
        "cap per GPU",
        unit="GB",
        shown="total - margin",
    )
    vram_safety_margin_gb: float = _var(
        "WORKER_VRAM_SAFETY_MARGIN_GB", parse.number(), "3.5", "kept free on each GPU", unit="GB"
    )
    host_cache_gb: float = _var(
        "WORKER_HOST_CACHE_GB", parse.number(), "0", "pinned host memory for models evicted from VRAM", unit="GB"
    )
    model_cache_dir: Path = _var(
        "WORKER_MODEL_CACHE_DIR",
        parse.path,
        "/tmp/model_cache",  # noqa: S108 - contract
        "downloaded models",
    )
    model_cache_max_gb: float = _var(
        "WORKER_MODEL_CACHE_MAX_GB",
        parse.number(),
        "0",
        "disk budget; least recently used snapshots go first; 0: until the disk is 95 % full",
        unit="GB",
    )
    max_concurrent_downloads: int = _var(
        "WORKER_MAX_CONCURRENT_DOWNLOADS", parse.integer(1), "2", "models downloaded at once"
    )
    model_artifacts: dict[str, parse.LocalModel] = _var(
        "WORKER_MODEL_ARTIFACTS_JSON",
        parse.local_models,
        "",
        '`{model_id: {"root_dir", "files": {}, "metadata": {}}}`: local models, no download',
    )
    runtime_loaders: dict[str, str] = _var(
        "WORKER_RUNTIME_LOADERS_JSON", parse.runtime_loaders, "", "type name -> `module:callable`"
    )

    # -- hub, Hugging Face and file store
    cozy_hub_url: str = _var("COZY_HUB_URL", parse.http_url, "", "model hub, for `cozy:` refs")
    cozy_hub_token: str = _var("COZY_HUB_TOKEN", parse.token, "", "its bearer token", secret=True)
    hf_token: str = _var("HF_TOKEN", parse.token, "", "Hugging Face token, for `hf:` refs", secret=True)
    hf_home: Path | None = _var(
        "HF_HOME", parse.optional(parse.path), "", "Hugging Face cache", shown="huggingface_hub's own"
    )
    cozy_hf_components: tuple[str, ...] = _var(
        "COZY_HF_COMPONENTS",
        parse.comma_list(parse.text),
        "",
        "comma-separated component folders to download, and no others",
        shown="from model_index.json",
    )
    cozy_hf_include_optional_components: bool = _var(
        "COZY_HF_INCLUDE_OPTIONAL_COMPONENTS", parse.boolean, "0", "download safety_checker and feature_extractor too"
    )
    cozy_hf_weight_precisions: tuple[str, ...] = _var(
        "COZY_HF_WEIGHT_PRECISIONS",
        parse.comma_list(parse.choice("fp16", "bf16", "fp32")),
        "fp16,bf16",
        "accepted weights, the first choice first",
    )
    cozy_hf_allow_root_json: bool = _var(
        "COZY_HF_ALLOW_ROOT_JSON", parse.boolean, "0", "download the JSON files at the repo's root too"
    )
    cozy_hf_full_repo_download: bool = _var(
        "COZY_HF_FULL_REPO_DOWNLOAD", parse.boolean, "0", "download whole repos, without a filter"
    )
    file_api_base_url: str = _var("FILE_API_BASE_URL", parse.http_url, "", "file store of tasks that name none")
    file_api_token: str = _var("FILE_API_TOKEN", parse.token, "", "its bearer token", secret=True)

    # -- operation
    http_addr: str = _var(
        "WORKER_HTTP_ADDR",
        parse.listen_address,
        "127.0.0.1:9090",
        "health, readiness, metrics, status; empty: off; a taken port is a warning, not a stop",
        empty_means_off=True,
    )
    otel_exporter_otlp_endpoint: str = _var(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        parse.http_url,
        "",
        "collector for traces of runs, e.g. `http://collector:4318`; needs the extra `otel`",
    )
    otel_exporter_otlp_headers: str = _var(
        "OTEL_EXPORTER_OTLP_HEADERS", parse.headers, "", "headers for it, `name=value,...`", secret=True
    )
    log_format: str = _var("WORKER_LOG_FORMAT", parse.choice("text", "json"), "text", "`json`: one object a line")
    log_level: str = _var(
        "WORKER_LOG_LEVEL",
        parse.choice("debug", "info", "warning", "error", "critical"),
        "info",
        "debug, info, warning, error or critical",
    )
    fake_gpu_count: int = _var(
        "WORKER_FAKE_GPU_COUNT", parse.integer(0), "0", "simulated GPUs for tests on hosts without one", shown="-"
    )
    fake_gpu_memory_bytes: int = _var(
        "WORKER_FAKE_GPU_MEMORY_BYTES", parse.byte_size, "24 GiB", "memory of each simulated GPU", unit="bytes"
    )
    fake_gpu_name: str = _var("WORKER_FAKE_GPU_NAME", parse.text, "Simulated GPU", "their name")

    @property
    def scheduler_targets(self) -> tuple[str, ...]:
        """What to dial, in order: SCHEDULER_ADDR, then the seeds, each once."""
        return tuple(dict.fromkeys((self.scheduler_addr, *self.scheduler_addrs)))

    def __repr__(self) -> str:
        shown = (f"{name}={_shown(variable, getattr(self, name))}" for name, variable in VARIABLES.items())
        return f"Settings({', '.join(shown)})"


NOT_USED_YET: Final = frozenset(
    {
        "TENANT_ID",
    }
)  # fmt: skip
"""Variables that are read and checked, and have no effect in this version; help and documentation say so."""

VARIABLES: Final[Mapping[str, Variable]] = {
    field.name: field.metadata["variable"] for field in dataclasses.fields(Settings)
}
"""Attribute of Settings -> definition, in the order of the table."""


def _shown(variable: Variable, value: object) -> str:
    if variable.secret:
        return "***" if value else "''"
    return shortened(repr(str(value) if isinstance(value, Path) else value))


def shortened(shown: str) -> str:
    """`shown`, cut off where it gets too long for a line."""
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
