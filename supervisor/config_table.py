"""The settings as text: for `gen-worker-supervisor --help` and for the documentation.

Owns: layout only; every word of the content comes from supervisor.settings.VARIABLES.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from supervisor.settings import NOT_USED_YET, VARIABLES

if TYPE_CHECKING:
    from supervisor.settings import Variable


USAGE: Final = """\
Usage: gen-worker-supervisor [--help | --version]

  Run the worker of the project in this folder until SIGTERM or SIGINT. It takes
  no arguments: all settings are environment variables. gen-worker doctor says
  what follows from them here, docs/operations.md what the exit codes mean.
"""


def render_table() -> str:
    """The variables as a Markdown table."""
    rows = [f"| {variable.env} | {_default(variable)} | {_meaning(variable)} |" for variable in VARIABLES.values()]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def render_help(width: int = 100) -> str:
    """For a terminal of `width` columns: how it is called, and each variable with its default and its meaning below."""
    blocks = []
    for variable in VARIABLES.values():
        meaning = textwrap.fill(
            _meaning(variable).replace("`", ""), width, initial_indent="      ", subsequent_indent="      "
        )
        blocks.append(f"  {variable.env}  [{_default(variable)}]\n{meaning}")
    return "\n".join([USAGE, "Environment variables [default]:", *blocks])


def _meaning(variable: Variable) -> str:
    return f"{variable.meaning} (no effect in this version)" if variable.env in NOT_USED_YET else variable.meaning


def _default(variable: Variable) -> str:
    plain_number = variable.unit and variable.shown_default.replace(".", "").isdigit()
    return f"{variable.shown_default} {variable.unit}" if plain_number else variable.shown_default
