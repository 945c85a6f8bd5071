"""The exit codes of `gen-worker-supervisor`: one name for each way in which a worker ends.

Owns: the numbers. Codes from 64 to 78 follow BSD's sysexits.h, so that an init system or an orchestrator reads them
as it reads those of other programs; small ones are the worker's own. Codes 1 and 2 are left to Python and the shell.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """Why the worker left; `meaning` says what an operator does about it."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "Stopped as asked: running tasks finished or were given the drain time, results were delivered."
    BOOT_FAILED = 3, "No executor could start: an import error or a wrong signature; the log names module and line."
    NO_FUNCTIONS = 4, "The tenant's modules define no worker function; check USER_MODULES and the manifest."
    PACKAGE_CLASH = 5, "Another distribution installed a package of ours; the log says which one to remove."
    FORCED_STOP = 6, "A second signal came while draining: running tasks were cut off, results may be undelivered."
    UNDELIVERED = 7, "Stopped as asked, but no scheduler took the last results in time; see WORKER_OUTBOX_DIR."
    USAGE = 64, "Unknown command-line argument; see --help."
    SCHEDULER_UNREACHABLE = 69, "MAX_RECONNECT_ATTEMPTS dials in a row failed; check SCHEDULER_ADDR and the network."
    INTERNAL = 70, "A defect in the worker; the log has the traceback."
    TOKEN_REFUSED = 77, "The token is expired, malformed or refused; replace AUTH_TOKEN, WORKER_JWT or AUTH_TOKEN_FILE."
    CONFIG = 78, "An environment variable does not parse or contradicts another; the last log line names it."


def render_exit_codes() -> str:
    """The codes as a Markdown table, for the documentation."""
    rows = [f"| {code.value} | `{code.name}` | {code.meaning} |" for code in ExitCode]
    return "\n".join(["| code | name | meaning |", "|---|---|---|", *rows])
