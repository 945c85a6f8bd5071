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
    require_uv_lock: Annotated[bool, typer.Option(help="A missing uv.lock is an error, not a warning.")] = False,
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
def version() -> None:
    """Print the version."""
    typer.echo(f"gen-worker {__version__}")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
