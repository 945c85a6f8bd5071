"""The environment, read once into one frozen `Settings`.

Owns: the environment itself; no other module reads it. What the variables are stands in settings.py.

1. `process_environment()` copies the environment; `load_settings` parses it, or raises ConfigError with one line.
2. `unknown_variables` finds likely typing errors, for a warning in the log.
3. `child_environment` is what an executor inherits: everything but the secrets.
4. `forget_secrets` takes them out of this process's own environment too, of which /proc shows the first copy.

A variable that is empty counts as unset, except where empty itself means something.
"""

from __future__ import annotations

import difflib
import os
import secrets as random_source
import socket
from typing import TYPE_CHECKING, Any, ClassVar, Final

from supervisor.config_parse import Invalid, LocalModel, split_address
from supervisor.environ_block import overwrite_values
from supervisor.exit_codes import ExitCode
from supervisor.settings import DEFAULT_MANIFESTS, VARIABLES, Settings, Variable, shortened

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DEFAULT_MANIFESTS",
    "ConfigError",
    "LocalModel",
    "Settings",
    "child_environment",
    "forget_secrets",
    "load_settings",
    "process_environment",
    "secrets",
    "split_address",
    "unknown_variables",
]

KNOWN_NAMES: Final = frozenset(
    name for variable in VARIABLES.values() for name in (variable.env, variable.older_name) if name
)

_MIN_SECRET_IN_VALUE: Final = 8
_SIMILAR: Final = 0.84
_OWN_PREFIXES: Final = ("WORKER_", "SCHEDULER_", "RECONNECT_", "MAX_RECONNECT_", "HEARTBEAT_", "COZY_HF_", "COZY_HUB_")
_TOKEN_NAMES_OF_LIBRARIES: Final = frozenset({"HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"})
"""Further names under which huggingface_hub finds a token; executors don't get those either."""


class ConfigError(Exception):
    """A variable does not parse, or two contradict each other. The message is one line for the operator."""

    exit_code: ClassVar[ExitCode] = ExitCode.CONFIG


def process_environment() -> dict[str, str]:
    """A copy of this process's environment; the one place where it is read."""
    return dict(os.environ)


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Parse and cross-check every variable. Raises ConfigError with one line, at the first that is wrong."""
    values: dict[str, Any] = {}
    for name, variable in VARIABLES.items():
        found = _written(variable, environ)
        if found is not None:
            values[name] = _parsed(variable, *found)
    if "scheduler_addr" not in values and values.get("scheduler_addrs"):
        values["scheduler_addr"] = values["scheduler_addrs"][0]
    if "run_dir" in values:
        values.setdefault("cache_dir", values["run_dir"] / "cache")
    values.setdefault("worker_id", f"{socket.gethostname()}-{random_source.token_hex(3)}")
    settings = Settings(**values)
    _check(settings)
    return settings


def secrets(settings: Settings) -> frozenset[str]:
    """The secret values that are set, for the log's redaction."""
    values = (getattr(settings, name) for name, variable in VARIABLES.items() if variable.secret)
    return frozenset(value for value in values if value)


def child_environment(environ: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """`environ` as an executor may see it: without the secrets, what leads to them, and other copies of them."""
    withheld = _TOKEN_NAMES_OF_LIBRARIES | {variable.env for variable in VARIABLES.values() if variable.withheld}
    values = [value for value in secrets(settings) if len(value) >= _MIN_SECRET_IN_VALUE]
    return {
        name: value
        for name, value in environ.items()
        if name not in withheld and not any(secret in value for secret in values)
    }


def forget_secrets(environ: Mapping[str, str], settings: Settings) -> None:
    """Take what executors must not see out of this process's environment and of /proc. Raises OSError."""
    withheld = environ.keys() - child_environment(environ, settings).keys()
    for name in withheld:
        os.environ.pop(name, None)
    overwrite_values(withheld)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that nobody reads and that looks like a typing error for one that the worker does."""
    warnings: list[str] = []
    for name in sorted(environ.keys() - KNOWN_NAMES):
        if name.upper().startswith(_OWN_PREFIXES):
            similar = difflib.get_close_matches(name.upper(), KNOWN_NAMES, n=1, cutoff=_SIMILAR)
            warnings.extend(f"{name} is not a setting of the worker: did you mean {match}?" for match in similar)
    return warnings


def _written(variable: Variable, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The name that was used and its stripped text; None when the variable is unset."""
    for name in (variable.env, variable.older_name):
        if name and name in environ:
            written = environ[name].strip()
            if written or variable.empty_means_off:
                return name, written
    return None


def _parsed(variable: Variable, name: str, written: str) -> object:
    try:
        return variable.parse(written)
    except Invalid as error:
        value = "a value not shown" if variable.secret else shortened(repr(written))
        raise ConfigError(f"{name} is {value}; expected {error}") from None


def _check(settings: Settings) -> None:
    """What two variables must agree on. Raises ConfigError."""
    certificate, key = settings.scheduler_client_cert_file, settings.scheduler_client_key_file
    if certificate and not key:
        raise ConfigError("SCHEDULER_CLIENT_CERT_FILE is set without SCHEDULER_CLIENT_KEY_FILE; expected both or none")
    if key and not certificate:
        raise ConfigError("SCHEDULER_CLIENT_KEY_FILE is set without SCHEDULER_CLIENT_CERT_FILE; expected both or none")
    if not settings.use_tls and (settings.scheduler_ca_file or certificate):
        name = "SCHEDULER_CA_FILE" if settings.scheduler_ca_file else "SCHEDULER_CLIENT_CERT_FILE"
        raise ConfigError(f"{name} is set but USE_TLS is false, so the stream would be in clear; expected USE_TLS=true")
    if settings.fake_gpu_count:
        last = settings.fake_gpu_count - 1
        for gpu in settings.gpus:
            if not gpu.isdigit() or int(gpu) > last:
                fakes = f"for WORKER_FAKE_GPU_COUNT={settings.fake_gpu_count}"
                raise ConfigError(f"WORKER_GPUS names {gpu!r}; expected indices from 0 to {last}, {fakes}")
