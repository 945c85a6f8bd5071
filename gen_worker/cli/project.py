"""`gen-worker discover` and `gen-worker validate`: what a project is, and whether it is right."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

Root = Annotated[
    Path,
    typer.Argument(metavar="PROJECT", help="The project: the folder with its pyproject.toml.", show_default="here"),
]


def discover(root: Root = Path()) -> None:
    """Print the project's manifest as JSON.

    It has the functions, their schemas and the models. Redirect it to .cozy/manifest.json, where the worker looks
    for it.
    """
    from gen_worker.discover import main as run

    raise typer.Exit(run([str(root)]))


def validate(
    root: Root = Path(),
    require_uv_lock: Annotated[bool, typer.Option(help="A missing uv.lock is an error, not a warning.")] = False,  # noqa: FBT002
    code: Annotated[bool, typer.Option(help="Import the code too, and check every function's signature.")] = True,  # noqa: FBT002
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,  # noqa: FBT002
) -> None:
    """Check the project and its functions.

    Its layout, its [tool.cozy], and each function's signature; exit 1 when something is wrong.
    """
    from gen_worker.project import validate_project

    result = validate_project(root, require_uv_lock)
    errors, functions = list(result.errors), list[str]()
    if code and not errors:
        functions, found = _look_at_code(root)
        errors += found
    if as_json:
        report = {"ok": not errors, "errors": errors, "warnings": result.warnings, "functions": functions}
        typer.echo(json.dumps(report))
    else:
        _print(errors, result.warnings, functions)
    raise typer.Exit(1 if errors else 0)


def _look_at_code(root: Path) -> tuple[list[str], list[str]]:
    """The functions, and errors."""
    from gen_worker.discover import discover_manifest
    from gen_worker.errors import WorkerError

    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the modules print while they are imported
            manifest = discover_manifest(root)
    except WorkerError as error:
        return [], [" ".join(str(error).split())]
    return [entry["name"] for entry in (*manifest["functions"], *manifest["websockets"])], []


def _print(errors: list[str], warnings: list[str], functions: list[str]) -> None:
    for warning in warnings:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
    for error in errors:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
    if not errors:
        typer.echo(f"ok: {', '.join(functions)}" if functions else "ok")
