"""The blocks of the documentation, and what a page says about running them.

Owns: how a block and its mark are read. A mark is a comment on the line before the block, which readers don't see:

    <!-- run: CLAUSE; CLAUSE -->
    <!-- not run: REASON -->

A shell block without a mark runs as it stands, in an empty home directory. The clauses:

    in PATH                     in this directory of a copy of the repository
    in a new project            in what `gen-worker init` makes
    serves HOST:PORT            its last command is a server: it stays up for the blocks after it
    until terminal N ends       those of the other terminals (`# terminal 2: ...`) are servers
    types WORD, sees WORD       the last terminal is a client: what is typed into it, and what it shows then
    has ~/PATH.jpg              a picture that must be there
    has a project at PATH       with payloads.jsonl beside the page
    soak                        takes minutes: with `make soak` only
    without COMMAND (REASON)    a line of it that can't run
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
SHELL: Final = "sh"
_BLOCK: Final = re.compile(
    r"^(?:<!-- (?P<verb>run|not run): (?P<mark>.+?) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_TERMINAL: Final = re.compile(r"^# terminal (\d+)\b.*$", re.MULTILINE)
_CLAUSES: Final = {
    "where": re.compile(r"in (.+)"),
    "serves": re.compile(r"serves (\S+:\d+)"),
    "until": re.compile(r"until terminal (\d+) ends"),
    "types": re.compile(r"types (\S+), sees \S+"),
    "sees": re.compile(r"types \S+, sees (\S+)"),
    "picture": re.compile(r"has ~/(\S+\.jpg)"),
    "project": re.compile(r"has a project at (\S+)"),
    "soak": re.compile(r"(soak)"),
    "without": re.compile(r"without (.+) \(.+\)"),
}


@dataclass(frozen=True)
class Mark:
    """What a page says of one block. `not_run` is the reason, or ""."""

    not_run: str = ""
    where: str = ""
    serves: str = ""
    until: str = ""
    types: str = ""
    sees: str = ""
    picture: str = ""
    project: str = ""
    soak: str = ""
    without: str = ""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    mark: Mark

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    def commands(self) -> str:
        """Its text without the lines that can't run."""
        dropped = self.mark.without
        kept = [line for line in self.text.splitlines() if not (dropped and line.startswith(dropped))]
        return "\n".join(kept) + "\n"

    def terminals(self) -> dict[str, str]:
        """The parts that run at the same time, by their number; {} for a block of one terminal."""
        _, *found = _TERMINAL.split(self.text)
        return dict(zip(found[::2], found[1::2], strict=True))


def read_blocks(page: Path, text: str | None = None) -> list[Block]:
    """All of a page. Raises ValueError for a mark that can't be read."""
    text = page.read_text("utf-8") if text is None else text
    return [
        Block(page, text[: found.start("language")].count("\n") + 1, found["language"], found["text"], _mark(found))
        for found in _BLOCK.finditer(text)
    ]


def of_language(page: Path, language: str) -> list[Block]:
    return [block for block in read_blocks(page) if block.language == language]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def having(language: str) -> list[Path]:
    return [page for page in PAGES if of_language(page, language)]


def _mark(found: re.Match[str]) -> Mark:
    if found["verb"] == "not run":
        return Mark(not_run=found["mark"])
    fields: dict[str, str] = {}
    for clause in (found["mark"] or "").split("; ") if found["mark"] else ():
        matched = {name: match[1] for name, pattern in _CLAUSES.items() if (match := pattern.fullmatch(clause))}
        if not matched:
            raise ValueError(f"what is {clause!r}? the clauses are those of tests/support/doc_blocks.py")
        fields |= matched
    return Mark(**fields)
