"""`gen-worker serve`: a development server with a page, over a real supervisor and executors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from gen_worker.errors import ProjectError

_NEEDED = ("starlette", "uvicorn", "watchfiles", "websockets", "python_multipart", "psutil")


def serve(
    project: Annotated[
        Path,
        typer.Argument(
            metavar="PROJECT", exists=True, file_okay=False, help="The project's folder.", show_default="here"
        ),
    ] = Path(),
    host: Annotated[
        str, typer.Option(help="The address to listen on; another than loopback needs --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="GEN_WORKER_SERVE_PORT", min=0, max=65535, help="0: a free one.")] = 8000,
    token: Annotated[
        str, typer.Option(envvar="GEN_WORKER_SERVE_TOKEN", help="Ask callers for it, as a bearer.", show_default="none")
    ] = "",
    executors: Annotated[
        int | None, typer.Option(min=1, help="Executor processes on a host without GPUs.", show_default="1")
    ] = None,
    reload: Annotated[bool, typer.Option(help="Replace the executors when the code changes.")] = True,  # noqa: FBT002
    files_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep the files of runs here.", show_default="until the end")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the worker's whole log.")] = False,  # noqa: FBT002
) -> None:
    """Serve the project with a page.

    The page is for trying the functions by hand, the HTTP API for everything else: POST /v1/functions/NAME takes
    and gives JSON, and streams with "Accept: text/event-stream"; /openapi.json describes it. When the code changes,
    the executors are replaced one by one. Ctrl-C stops it all.
    """
    from gen_worker.cli.local import child_environment, refuse_clash

    _refuse_without_packages()
    from gen_worker.serve.local_worker import LocalOptions, LocalWorker, check_project
    from gen_worker.serve.server import AddressError, DevServer, ServeOptions, check_address
    from gen_worker.serve.worker_log import LogLine
    from gen_worker.testing.mock_orchestrator import ListenError

    def show(line: LogLine) -> None:
        if verbose or line.is_error or line.is_output:
            typer.secho(str(line), fg=typer.colors.RED if line.is_error else None, dim=not line.is_error)

    async def run() -> None:
        worker = LocalWorker(LocalOptions(project.resolve(), child_environment(), executors, files_dir))
        worker.listeners.append(show)
        await DevServer(project, worker, ServeOptions(host, port, token, reload, typer.echo)).run()

    try:
        refuse_clash()
        check_address(host, token)
        check_project(project)
        asyncio.run(run())
    except (AddressError, ListenError, ProjectError, OSError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None


def _refuse_without_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        line = f"error: gen-worker serve needs {', '.join(missing)}: pip install 'gen-worker[serve]'"
        typer.secho(line, err=True, fg=typer.colors.RED)
        raise typer.Exit(2)
