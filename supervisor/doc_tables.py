"""The tables in docs/ that are made from the code: `make docs` writes them, a test compares them.

Owns: where each table stands. In a page it lies between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from supervisor import config_table, metrics
from supervisor.exit_codes import render_exit_codes

TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "settings": config_table.render_table,
    "metrics": metrics.render_table,
    "exit codes": render_exit_codes,
}
_BLOCK: Final = re.compile(r"(<!-- table: (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(page: str) -> str:
    """`page` with its tables as the code has them now. Raises KeyError for a name that no table has."""
    return _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block['name']]()}\n{block[3]}", page)


def tables_in(page: str) -> list[str]:
    return [block["name"] for block in _BLOCK.finditer(page)]


def main(folder: Path) -> None:
    """Write the tables into all pages in `folder`."""
    for path in sorted(folder.glob("*.md")):
        page = path.read_text()
        if (fresh := rendered(page)) != page:
            path.write_text(fresh)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
