"""`gen-worker discover` and `gen-worker validate`: what a project is, and whether it is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Root = Annotated[Path, typer.Argument(help="The project: the folder with its pyproject.toml.", show_default="here")]


def discover(root: Root = Path()) -> None:
    """Print the project's manifest as JSON: its functions, their schemas, its models.

    Redirect it to .cozy/manifest.json, where the worker looks for it.
    """
    from gen_worker.discover import main as run

    raise typer.Exit(run([str(root)]))


def validate(
    root: Root = Path(),
    require_uv_lock: Annotated[bool, typer.Option(help="A missing uv.lock is an error, not a warning.")] = False,  # noqa: FBT002
    code: Annotated[bool, typer.Option(help="Import the code too, and check every function's signature.")] = True,  # noqa: FBT002
) -> None:
    """Check the project's layout, its [tool.cozy] and its functions; exit 1 when something is wrong."""
    from gen_worker.project import validate_project

    result = validate_project(root, require_uv_lock)
    for warning in result.warnings:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
    for error in result.errors:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
    if not result.ok:
        raise typer.Exit(1)
    functions = f": {', '.join(_function_names(root))}" if code else ""
    typer.echo(f"ok{functions}")


def _function_names(root: Path) -> list[str]:
    """What discovery finds; leaves with 1 when that fails."""
    import contextlib
    import sys

    from gen_worker.discover import discover_manifest
    from gen_worker.errors import WorkerError

    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the modules print while they are imported
            manifest = discover_manifest(root)
    except WorkerError as error:
        typer.secho(f"error: {' '.join(str(error).split())}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None
    return [entry["name"] for entry in (*manifest["functions"], *manifest["websockets"])]
