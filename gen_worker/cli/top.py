"""`gen-worker top`: a running worker, as its /status shows it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from supervisor.status import Status

TIMEOUT_S = 5.0


class NoAnswer(Exception):
    """There is no status to be had; one line says why, and what to do."""


def top(
    address: Annotated[
        str | None, typer.Option(help="host:port of the worker's HTTP.", show_default="WORKER_HTTP_ADDR")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,  # noqa: FBT002
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON and end.")] = False,  # noqa: FBT002
) -> None:
    """Watch a worker: executors, GPUs, models, runs, last faults.

    Ctrl-C ends it. It asks the worker's HTTP, which WORKER_HTTP_ADDR names here as it does for the worker; exit 1
    when nothing answers.
    """
    try:
        where = _address(address)
        body = fetch(where)
        if as_json:
            typer.echo(body.decode())
            return
        status = decode(body, where)
    except NoAnswer as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None
    from rich.console import Console

    from gen_worker.cli.top_view import view

    console = Console()
    if once or not console.is_terminal:
        console.print(view(status))
    else:
        watch(where, status, interval, console)


def fetch(address: str) -> bytes:
    """The body of /status. Raises NoAnswer."""
    import http.client

    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/status")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(
            f"no worker answers at {address} ({str(error) or type(error).__name__}): is it running there, with this "
            "WORKER_HTTP_ADDR? --address names another"
        ) from error
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise NoAnswer(f"what answers at {address} has no /status ({answer.status} {answer.reason})")
    return body


def decode(body: bytes, address: str) -> Status:
    """Raises NoAnswer."""
    import msgspec

    from supervisor.status import VERSION, Status

    try:
        status = msgspec.json.decode(body, type=Status)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NoAnswer(f"what answers at {address} is no gen-worker, or of another version: {error}") from error
    if status.version != VERSION:
        raise NoAnswer(
            f"the worker at {address} speaks status version {status.version}, this command {VERSION}: "
            "use the gen-worker of its environment"
        )
    return status


def _address(given: str | None) -> str:
    """Where to ask. Raises NoAnswer."""
    from supervisor.config import ConfigError, load_settings, process_environment, split_address
    from supervisor.config_parse import Invalid

    try:
        written = load_settings(process_environment()).http_addr if given is None else given
        host, port = split_address(written) if written else ("", 0)
    except (ConfigError, Invalid) as error:
        raise NoAnswer(f"{given!r} is no address; expected {error}" if given is not None else str(error)) from None
    if not written or not port:
        raise NoAnswer("WORKER_HTTP_ADDR names no port here, so there is none to ask: --address host:port")
    if host in ("0.0.0.0", "::"):  # noqa: S104  (what a worker listens on everywhere is reached here)
        host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def watch(address: str, status: Status, interval: float, console: Console) -> None:
    """Draw it anew each `interval` seconds until Ctrl-C. While nothing answers, the last view stays and says so."""
    from rich.live import Live

    from gen_worker.cli.top_view import view

    problem = ""
    with Live(view(status), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                try:
                    status = decode(fetch(address), address)
                    problem = ""
                except NoAnswer as error:
                    problem = str(error)
                live.update(view(status, problem), refresh=True)
        except KeyboardInterrupt:
            pass
