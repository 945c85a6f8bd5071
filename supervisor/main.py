"""`gen-worker-supervisor`: from the command line to an exit code.

Owns: what happens before the worker exists: arguments, settings, logging, the manifest. Whatever is wrong there is one line on
stderr and a named exit code.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence

import uvloop

from gen_worker._version import __version__
from gen_worker.manifest import Manifest, ManifestError, load_manifest
from supervisor.config import (
    DEFAULT_MANIFESTS,
    ConfigError,
    Settings,
    load_settings,
    process_environment,
    secrets,
    unknown_variables,
)
from supervisor.config_table import render_help
from supervisor.devices import DeviceError
from supervisor.exit_codes import ExitCode
from supervisor.logs import start_logging
from supervisor.wiring import CredentialsError

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker until it is told to stop. Returns the exit code (supervisor/exit_codes.py)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments:
        return _answer(arguments)
    environ = process_environment()
    try:
        settings = load_settings(environ)
    except ConfigError as error:
        return _refuse(str(error), ExitCode.CONFIG)
    logs = start_logging(level=settings.log_level, log_format=settings.log_format, secrets=secrets(settings))
    try:
        for warning in unknown_variables(environ):
            log.warning("%s", warning)
        return _run(settings, environ)
    except Exception:
        log.critical("a defect in the worker ends it", exc_info=True)
        return ExitCode.INTERNAL
    finally:
        logs.stop()


def _run(settings: Settings, environ: Mapping[str, str]) -> int:
    from supervisor.worker import Worker  # noqa: PLC0415  (grpc and the rest, not needed to refuse a bad setting)

    try:
        manifest = find_manifest(settings)
    except ManifestError as error:
        log.critical("%s", error)
        return ExitCode.CONFIG

    async def serve() -> ExitCode:
        return await Worker(settings, environ, manifest).run()

    log.info("gen-worker %s, worker %s, scheduler %s", __version__, settings.worker_id, settings.scheduler_addr)
    try:
        return uvloop.run(serve())
    except (DeviceError, CredentialsError) as error:
        log.critical("%s", error)
        return ExitCode.CONFIG


def find_manifest(settings: Settings) -> Manifest | None:
    """The manifest that WORKER_MANIFEST names, else the first default one that is there. Raises ManifestError."""
    if settings.manifest is not None:
        return load_manifest(settings.manifest)
    for path in DEFAULT_MANIFESTS:
        if path.is_file():
            return load_manifest(path)
    return None


def _answer(arguments: Sequence[str]) -> int:
    if arguments[0] in ("-h", "--help"):
        print(render_help())  # noqa: T201
        return ExitCode.OK
    if arguments[0] in ("-V", "--version"):
        print(f"gen-worker {__version__}")  # noqa: T201
        return ExitCode.OK
    return _refuse(f"unexpected argument {arguments[0]!r}: settings are environment variables, see --help", ExitCode.USAGE)


def _refuse(line: str, code: ExitCode) -> int:
    print(f"gen-worker-supervisor: {line}", file=sys.stderr)  # noqa: T201
    return code


