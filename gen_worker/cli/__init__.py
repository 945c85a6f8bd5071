"""`gen-worker`: the command for people who write functions and for those who operate hosts.

Owns: which commands there are, and in which order the help lists them. Each command has a module of its own here, which
imports what it needs only when it is called, so that `gen-worker --help` stays quick.
"""

from __future__ import annotations

import typer

from gen_worker._version import __version__
from gen_worker.cli import models, project, torture

app = typer.Typer(
    help="Write, check and describe the functions that a worker runs. The worker itself is gen-worker-supervisor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(project.discover)
app.command()(project.validate)
app.command()(torture.torture)
app.command()(models.download)
app.add_typer(models.models, name="models")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"gen-worker {__version__}")


def main() -> None:
    """Run the command line."""
    app()
