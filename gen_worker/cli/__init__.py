"""`gen-worker`: the command for people who write functions and for those who operate hosts.

Owns: which commands there are, and in which order the help lists them. Each command has a module of its own here, which
imports what it needs only when it is called, so that `gen-worker --help` stays quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from gen_worker._version import __version__
from gen_worker.cli import doctor, init, models, project, run, serve, top, torture

app = typer.Typer(
    help="Write, try and check the functions that a worker runs: begin with gen-worker init, then run and serve. "
    "The worker itself is gen-worker-supervisor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(init.init)
app.command()(project.discover)
app.command()(project.validate)
app.command(epilog=run.EPILOG)(run.run)
app.command()(serve.serve)
app.command()(torture.torture)
app.command()(top.top)
app.command()(doctor.doctor)
app.command()(models.download)
app.add_typer(models.models, name="models")


def _print_version(asked: bool) -> None:  # noqa: FBT001  (typer calls it so)
    if asked:
        typer.echo(f"gen-worker {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: FBT002  (a flag)
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Each command has a help of its own."""


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(asked=True)


def main() -> None:
    """Run the command line."""
    app()
