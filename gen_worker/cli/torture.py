"""`gen-worker torture`: a worker against a scheduler that does everything nasty at random."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    """Try to break a worker with a scheduler that is nasty to it.

    What it does is random, by the seed; exit 1 when a guarantee was broken. Streams are cut, refused, redirected
    and flooded; executors crash, freeze and are killed. Then is checked: every run has its one result, deltas are
    in order, no process is left, memory is bounded, and the worker serves.
    """
    from gen_worker.errors import WorkerError
    from gen_worker.testing.torture.driver import run
    from gen_worker.testing.torture.options import Options
    from gen_worker.testing.torture.report import render

    bound = memory_mib if memory_mib is not None else (200 if project is None else 0)
    options = Options.of(
        seed=seed, seconds=minutes * 60, project=project, payloads=payloads, log_file=log, executor_memory_mib=bound
    )
    try:
        report = run(options, lambda line: typer.echo(line, err=True))
    except WorkerError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None
    typer.echo(render(report))
    if not report.ok:
        typer.echo(f"the worker's log: {options.log_file}")
        raise typer.Exit(1)
