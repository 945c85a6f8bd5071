"""`gen-worker-supervisor`: from the command line to an exit code.

Owns: what happens before the worker exists: arguments, settings, logging, the tenant's project. Whatever is wrong
there is one line on stderr and a named exit code.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import uvloop

from gen_worker._version import __version__
from gen_worker.errors import ProjectError
from supervisor.config import (
    ConfigError,
    Settings,
    forget_secrets,
    load_settings,
    process_environment,
    secrets,
    unknown_variables,
)
from supervisor.config_table import render_help
from supervisor.devices import DeviceError
from supervisor.executor_place import ExecutorPlace, prepare_place
from supervisor.exit_codes import ExitCode
from supervisor.family import FAMILY, MARK
from supervisor.guard import Guard
from supervisor.logs import LogHandle, start_logging
from supervisor.prctl import forbid_inspection
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
        place = prepare_place(settings, Path.cwd())
    except ConfigError as error:
        return _refuse(str(error), ExitCode.CONFIG)
    logs = start_logging(level=settings.log_level, log_format=settings.log_format, secrets=secrets(settings))
    try:
        for warning in unknown_variables(environ):
            log.warning("%s", warning)
        _close_off(settings, environ)
        return _run(settings, environ, place, logs)
    except Exception:
        log.critical("a defect in the worker ends it", exc_info=True)
        return ExitCode.INTERNAL
    finally:
        logs.stop()


def _run(settings: Settings, environ: Mapping[str, str], place: ExecutorPlace, logs: LogHandle) -> int:
    from supervisor.worker import Worker  # noqa: PLC0415  (grpc and the rest, not needed to refuse a bad setting)

    try:
        tenant = find_tenant(settings, Path.cwd())
    except ProjectError as error:
        log.critical("%s", error)
        return ExitCode.CONFIG

    settings = dataclasses.replace(settings, deployment_id=settings.deployment_id or tenant.deployment)

    async def serve() -> ExitCode:
        return await Worker(settings, environ, tenant, place, logs).run()

    log.info("gen-worker %s, worker %s, scheduler %s", __version__, settings.worker_id, settings.scheduler_addr)
    guard = _start_guard()
    try:
        return uvloop.run(serve())
    except DeviceError as error:
        log.critical("%s", error)
        return ExitCode.CONFIG
    finally:
        if guard is not None:
            guard.dismiss()


def _close_off(settings: Settings, environ: Mapping[str, str]) -> None:
    """Keep the secrets from who can read /proc, and tenants' processes from getting lost. What fails is warned of."""
    steps: Mapping[str, Callable[[], None]] = {
        "the secrets stay readable in /proc": lambda: forget_secrets(environ, settings),
        "the supervisor's memory stays readable to its user": forbid_inspection,
        "orphans of executors are not reaped": FAMILY.adopt,
    }
    for otherwise, step in steps.items():
        try:
            step()
        except OSError as error:
            log.warning("%s: %s", otherwise, error)


def _start_guard() -> Guard | None:
    """None where the kernel does its work: it ends a container with its PID 1."""
    if os.getpid() == 1:
        return None
    try:
        return Guard.start(f"{MARK}={FAMILY.prefix}")
    except OSError as error:
        log.warning("what tenant code starts may outlive a killed supervisor: its guard can't be started: %s", error)
        return None


def _answer(arguments: Sequence[str]) -> int:
    if arguments[0] in ("-h", "--help"):
        return _say(render_help())
    if arguments[0] in ("-V", "--version"):
        return _say(f"gen-worker {__version__}")
    return _refuse(
        f"unexpected argument {arguments[0]!r}: settings are environment variables, see --help", ExitCode.USAGE
    )


def _say(text: str) -> int:
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:
        # Whoever reads it has seen enough (`--help | head`). What is buffered still is flushed at the exit, to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.OK


def _refuse(line: str, code: ExitCode) -> int:
    print(f"gen-worker-supervisor: {line}", file=sys.stderr)  # noqa: T201
    return code
