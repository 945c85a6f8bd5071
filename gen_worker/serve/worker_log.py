"""The worker's log as a child writes it: one JSON object a line, and what else comes on its output.

Owns: how a line is read, and how it looks on a developer's terminal.
"""

from __future__ import annotations

import msgspec


class LogLine(msgspec.Struct, frozen=True):
    """One line. A line that is no record (a library's warning, a traceback) is a `message` alone."""

    message: str
    level: str = ""
    logger: str = ""
    executor: str = ""
    exc: str = ""

    @property
    def is_error(self) -> bool:
        return self.level in ("error", "critical")

    @property
    def is_output(self) -> bool:
        """Whether tenant code printed it."""
        return self.logger == "executor"

    def __str__(self) -> str:
        source = f"executor {self.executor}" if self.is_output else self.logger.rpartition(".")[2]
        head = f"{self.level.upper():8} {source}: " if self.level else ""
        return f"{head}{self.message}" + (f"\n{self.exc}" if self.exc else "")


def read_line(text: str) -> LogLine:
    """A line of the worker's output."""
    try:
        return _decoder.decode(text)
    except msgspec.DecodeError:
        return LogLine(text)


_decoder = msgspec.json.Decoder(LogLine)
