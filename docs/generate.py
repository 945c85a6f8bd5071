"""Writes docs/api.md and docs/cli.md from the docstrings and the commands: `make docs`.

python docs/generate.py            write them
python docs/generate.py --check    exit 1 when one of them is stale
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, Final

import msgspec
import typer

from gen_worker.cli import app

HERE: Final = Path(__file__).parent
MODULES: Final = ("gen_worker", "gen_worker.errors", "gen_worker.testing", "gen_worker.testing.mock_orchestrator")
"""What tenants and their tests import; a name is described where it is met first."""
NOTE: Final = "<!-- Written by docs/generate.py; edit the docstrings and run `make docs`. -->"


def main() -> int:
    pages = {HERE / "api.md": api_page(), HERE / "cli.md": cli_page()}
    if "--check" not in sys.argv:
        for path, text in pages.items():
            path.write_text(text, "utf-8")
        return 0
    stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text("utf-8") != text]
    if stale:
        print(f"stale: {', '.join(stale)}; run: make docs")
    return 1 if stale else 0


# -- the API --------------------------------------------------------------------------------------


def api_page() -> str:
    parts = [NOTE, "# API reference", "What tenants and their tests import. Everything else is the worker's own."]
    seen: set[int] = set()
    for name in MODULES:
        module = importlib.import_module(name)
        parts += [f"## `{name}`", _first_paragraph(module)]
        for public in sorted(_public_names(module)):
            value = getattr(module, public)
            if not (inspect.isclass(value) or inspect.isfunction(value)) or id(value) in seen:
                continue
            seen.add(id(value))
            parts += list(_class(public, value) if inspect.isclass(value) else _function(public, value, "###"))
    return "\n\n".join(part for part in parts if part) + "\n"


def _public_names(module: Any) -> Iterable[str]:
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    names: Iterable[str] = getattr(module, "__all__", own)
    return [name for name in names if not name.startswith("_")]


def _class(name: str, value: type) -> Iterator[str]:
    bases = [base.__name__ for base in value.__bases__ if base not in (object, msgspec.Struct)]
    yield _class_head(name, bases)
    yield _doc(value)
    if fields := list(_fields(value)):
        yield "\n".join(fields)
    for member, function in vars(value).items():
        described = _member(value, member, function)
        if described is not None:
            yield from described


def _class_head(name: str, bases: list[str]) -> str:
    kind = f": {', '.join(bases)}" if bases else ""
    return f"### `class {name}`{kind}"


def _fields(value: type) -> Iterator[str]:
    if issubclass(value, msgspec.Struct):
        for each in msgspec.structs.fields(value):
            yield f"- `{each.encode_name}: {_type(each.type)}`" + _default(each.default, msgspec.NODEFAULT)
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            if not item.name.startswith("_"):
                yield f"- `{item.name}: {_type(item.type)}`" + _default(item.default, dataclasses.MISSING)
    elif issubclass(value, BaseException):
        return
    elif hasattr(value, "__members__"):
        for member, each in value.__members__.items():
            yield f"- `{member}` = `{each.value!r}`"


def _default(value: object, nothing: object) -> str:
    return "" if value is nothing or "object at 0x" in repr(value) else f" = `{value!r}`"


def _member(owner: type, name: str, value: Any) -> Iterator[str] | None:
    if name.startswith("_") or not _doc(value):
        return None
    if isinstance(value, property):
        return iter([f"#### `{owner.__name__}.{name}`", _doc(value)])
    function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    return _function(f"{owner.__name__}.{name}", function, "####") if isinstance(function, FunctionType) else None


def _function(name: str, value: Callable[..., Any], level: str) -> Iterator[str]:
    kind = "async " if inspect.iscoroutinefunction(value) else ""
    signature = inspect.signature(value)
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    text = re.sub(r"<.*? object at 0x[0-9a-f]+>", "...", str(signature.replace(parameters=parameters)))
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations that are not resolved come as strings
    yield f"{level} `{kind}{name}`"
    yield f"```text\n{name}{text}\n```"
    yield _doc(value)


def _type(value: object) -> str:
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return text.replace("typing.", "").replace("|", "\\|")


def _doc(value: object) -> str:
    """The docstring; its indented parts as they are."""
    own = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    text = inspect.cleandoc(own) if own and not own.startswith(getattr(value, "__name__", "\0") + "(") else ""
    return re.sub(r"(?m)(^ {2,}.*(?:\n {2,}.*|\n(?=\n* {2}))*)", r"```text\n\1\n```", text)


def _first_paragraph(module: Any) -> str:
    return inspect.cleandoc(module.__doc__ or "").partition("\n\n")[0]


# -- the commands ---------------------------------------------------------------------------------


def cli_page() -> str:
    group = typer.main.get_command(app)
    parts = [NOTE, "# gen-worker", _text(group.help), "`gen-worker COMMAND --help` says the same in the terminal."]
    for name, command in _commands("", group):
        arguments = [_metavar(each) for each in command.params if each.param_type_name == "argument"]
        usage = " ".join([f"gen-worker {name}", "[OPTIONS]", *arguments])
        parts += [f"## `gen-worker {name}`", _text(command.help), f"```text\n{usage}\n```"]
        rows = [row for parameter in command.params for row in _parameter(parameter)]
        if rows:
            parts.append("\n".join(["| | |", "|---|---|", *rows]))
        if command.epilog:
            parts.append(_text(command.epilog))
    return "\n\n".join(parts) + "\n"


def _commands(prefix: str, group: Any) -> Iterator[tuple[str, Any]]:
    """Each command with its whole name; those of a command behind it."""
    for name, command in group.commands.items():
        yield prefix + name, command
        if hasattr(command, "commands"):
            yield from _commands(f"{prefix}{name} ", command)


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    many = "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]{many}"


def _parameter(parameter: Any) -> Iterator[str]:
    if parameter.name == "help":
        return
    options = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
    shown = options if options.startswith("`-") else f"`{_metavar(parameter)}`"
    default = _shown_default(parameter)
    text = _text(getattr(parameter, "help", "") or "")
    yield f"| {shown} | {text}{f' Default: {default}.' if default else ''} |".replace("\\|", "|")


def _shown_default(parameter: Any) -> str:
    shown = getattr(parameter, "show_default", None)
    if isinstance(shown, str):
        return shown
    value = parameter.default
    plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return f"`{value}`" if plain and value != "" else ""


def _text(text: str | None) -> str:
    return inspect.cleandoc(text or "")


if __name__ == "__main__":
    sys.exit(main())
