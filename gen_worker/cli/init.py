"""`gen-worker init`: a new project in the documented layout.

Owns: which files it has (gen_worker/cli/template), and the rules for its name.
"""

from __future__ import annotations

import keyword
import re
import shlex
import sys
from pathlib import Path
from string import Template
from typing import Annotated, Final

import typer

from gen_worker.errors import ProjectError, ValidationError

TEMPLATE: Final = Path(__file__).parent / "template"
_TAKEN: Final = frozenset({"executor", "gen_worker", "src", "supervisor", "test", "tests"})


def init(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The project's folder; its last part names it.", show_default=False)
    ],
    flat: Annotated[bool, typer.Option("--flat", help="The package at the top, not in src/.")] = False,  # noqa: FBT002
) -> None:
    """Begin a new project.

    It gets a function, its test, pyproject.toml, README and Dockerfile, passes gen-worker validate and its own
    tests. The folder must be empty or not there.
    """
    root = Path(name)
    try:
        made = make_project(root, flat=flat)
    except (ProjectError, OSError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None
    for path in made:
        typer.echo(f"  {path}")
    typer.echo(f"Next: cd {shlex.quote(str(root))} && gen-worker run greet name=Ada && gen-worker serve")


def make_project(root: Path, *, flat: bool = False) -> list[Path]:
    """Write the files; their paths. Raises ProjectError for a name or a folder that can't be used, and OSError."""
    project = project_id(root.resolve().name)
    package = project.replace("-", "_")
    if package in _TAKEN or package in sys.stdlib_module_names or keyword.iskeyword(package):
        raise ProjectError(f"{project!r} would name a package {package!r}, which is taken: choose another name")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ProjectError(f"{root} exists and is not an empty folder")
    folder = package if flat else f"src/{package}"
    values = {
        "name": project,
        "package": package,
        "folder": folder,
        "source": "." if flat else "src",
        "top": package if flat else "src",
    }
    targets = {
        "pyproject.toml.tmpl": "pyproject.toml",
        "README.md.tmpl": "README.md",
        "Dockerfile.tmpl": "Dockerfile",
        "gitignore.tmpl": ".gitignore",
        "dockerignore.tmpl": ".dockerignore",
        "package/init.tmpl": f"{folder}/__init__.py",
        "package/functions.tmpl": f"{folder}/functions.py",
        "tests/test_functions.tmpl": "tests/test_functions.py",
    }
    made = []
    for source, target in targets.items():
        path = root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template((TEMPLATE / source).read_text("utf-8")).substitute(values), "utf-8")
        made.append(path)
    return made


def project_id(name: str) -> str:
    """The name as a deployment id. Raises ProjectError when nothing of it can be one."""
    from gen_worker.project import check_deployment_id

    try:
        return check_deployment_id(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
    except ValidationError as error:
        raise ProjectError(f"{name!r} can't name a project: {error}") from error
