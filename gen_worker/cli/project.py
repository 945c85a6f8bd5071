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
) -> None:
    """Check the project's layout and its [tool.cozy]; exit 1 when something is wrong."""
    from gen_worker.project import validate_project

    result = validate_project(root, require_uv_lock)
    for warning in result.warnings:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
    for error in result.errors:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
    if not result.ok:
        raise typer.Exit(1)
    typer.echo("ok")
