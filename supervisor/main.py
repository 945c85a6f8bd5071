"""`gen-worker-supervisor`: from the command line to an exit code.

Owns: what happens before the worker exists: arguments, settings, logging, the manifest. Whatever is wrong there is one line on
stderr and a named exit code.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvloop

from gen_worker._version import __version__
from gen_worker.errors import ProjectError
from supervisor.config import (
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
from supervisor.logs import LogHandle, start_logging
from supervisor.tenant import find_tenant

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
        return _run(settings, environ, logs)
    except Exception:
        log.critical("a defect in the worker ends it", exc_info=True)
        return ExitCode.INTERNAL
    finally:
        logs.stop()


def _run(settings: Settings, environ: Mapping[str, str], logs: LogHandle) -> int:
    from supervisor.worker import Worker  # noqa: PLC0415  (grpc and the rest, not needed to refuse a bad setting)

    try:
        tenant = find_tenant(settings, Path.cwd())
    except ProjectError as error:
        log.critical("%s", error)
        return ExitCode.CONFIG

    async def serve() -> ExitCode:
        return await Worker(settings, environ, tenant, logs.add_secrets).run()

    log.info("gen-worker %s, worker %s, scheduler %s", __version__, settings.worker_id, settings.scheduler_addr)
    try:
        return uvloop.run(serve())
    except DeviceError as error:
        log.critical("%s", error)
        return ExitCode.CONFIG


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


