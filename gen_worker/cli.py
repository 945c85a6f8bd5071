"""`gen-worker`: the command for people who write functions.

Owns: the commands and what they print. What they do is elsewhere, and imported only by the command that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gen_worker._version import __version__

app = typer.Typer(
    help="Write, check and describe the functions that a worker runs. The worker itself is gen-worker-supervisor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Root = Annotated[Path, typer.Argument(help="The project: the folder with its pyproject.toml.", show_default="here")]


@app.command()
def discover(root: Root = Path()) -> None:
    """Print the project's manifest as JSON: its functions, their schemas, its models.

    Redirect it to .cozy/manifest.json, where the worker looks for it.
    """
    from gen_worker.discover import main as run  # noqa: PLC0415

    raise typer.Exit(run([str(root)]))


@app.command()
def validate(
    root: Root = Path(),
    require_uv_lock: Annotated[bool, typer.Option(help="A missing uv.lock is an error, not a warning.")] = False,  # noqa: FBT002
) -> None:
    """Check the project's layout and its [tool.cozy]; exit 1 when something is wrong."""
    from gen_worker.project import validate_project  # noqa: PLC0415

    result = validate_project(root, require_uv_lock)
    for warning in result.warnings:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
    for error in result.errors:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
    if not result.ok:
        raise typer.Exit(1)
    typer.echo("ok")


@app.command()
def torture(
    seed: Annotated[int | None, typer.Option(help="What to do when follows from it.", show_default="random")] = None,
    minutes: Annotated[float, typer.Option(min=0.05, help="For how long; up to two more to settle and judge.")] = 1.0,
    project: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Run this project's functions, not the built-in.")
    ] = None,
    payloads: Annotated[
        Path | None,
        typer.Option(help='For --project: lines of {"function": ..., "payload": {...}}; else made from the schemas.'),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Write the worker's log here.", show_default="a file in /tmp")
    ] = None,
    memory_mib: Annotated[
        int | None,
        typer.Option(help="Most that an executor may take; 0: not judged.", show_default="200; 0 with --project"),
    ] = None,
) -> None:
    """Run a worker against a scheduler that does everything nasty at random; exit 1 when a guarantee was broken.

    Streams are cut, refused, redirected and flooded; executors crash, freeze and are killed. Then is checked: every run
    has its one result, deltas are in order, no process is left, memory is bounded, and the worker serves.
    """
    from gen_worker.errors import WorkerError  # noqa: PLC0415
    from gen_worker.testing.torture.driver import run  # noqa: PLC0415
    from gen_worker.testing.torture.options import Options  # noqa: PLC0415
    from gen_worker.testing.torture.report import render  # noqa: PLC0415

    bound = memory_mib if memory_mib is not None else (200 if project is None else 0)
    options = Options.of(
        seed=seed, seconds=minutes * 60, project=project, payloads=payloads, log_file=log, executor_memory_mib=bound
    )
    try:
        report = run(options, lambda line: typer.echo(line, err=True))
    except WorkerError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(64) from None
    typer.echo(render(report))
    if not report.ok:
        typer.echo(f"the worker's log: {options.log_file}")
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"gen-worker {__version__}")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
