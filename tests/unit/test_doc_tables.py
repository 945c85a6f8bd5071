"""The documentation of operation is as the code is, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from gen_worker.pipe.messages import ErrorType
from supervisor.doc_tables import TABLES, main, rendered, tables_in
from supervisor.exit_codes import ExitCode
from supervisor.settings import VARIABLES
from supervisor.status import Status

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next of its level or above."""
    text = (ROOT / "docs" / page).read_text()
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {heading!r}"
    return found[2]


def test_the_index_has_every_page() -> None:
    docs = ROOT / "docs"
    listed = {(docs / target).resolve() for target in LINK.findall((docs / "README.md").read_text())}
    assert {page for page in docs.rglob("*.md") if page.name != "README.md"} <= listed


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_fresh(path: Path) -> None:
    page = path.read_text()
    assert rendered(page) == page, f"{path.name} is stale, run: make docs"


def test_each_table_stands_somewhere() -> None:
    assert sorted(name for path in PAGES for name in tables_in(path.read_text())) == sorted(TABLES)


def test_a_stale_table_is_found_and_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: exit codes -->\nold\n<!-- end -->\nafter\n")
    main(tmp_path)
    assert "| 78 | `CONFIG` |" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "old" not in page.read_text()


def test_every_exit_code_says_what_to_do() -> None:
    rows = section("operations.md", "What to do about an exit code")
    assert {f"`{code.name}`" for code in ExitCode} <= set(re.findall(r"`[A-Z_]+`", rows))


def test_every_error_type_says_what_to_do() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", section("operations.md", "Error types of a run"), re.MULTILINE)
    assert sorted(rows) == sorted(get_args(ErrorType))


def test_every_part_of_the_status_is_described() -> None:
    text = section("operations.md", "/status")
    assert set(Status.__struct_fields__) <= set(re.findall(r"`(\w+)`", text))


def test_variables_that_are_spoken_of_exist() -> None:
    known = {name for variable in VARIABLES.values() for name in (variable.env, variable.older_name) if name}
    known |= {code.name for code in ExitCode}
    prefixes = {name.rpartition("_")[0] for name in known} | {"COZY_HF", "RECONNECT", "WORKER_FAKE_GPU"}
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "SECURITY.md"]:
        spoken = set(
            re.findall(r"\b((?:WORKER|SCHEDULER|RECONNECT|HEARTBEAT|COZY|AUTH)_[A-Z0-9_]+)\b", path.read_text())
        )
        assert not {name for name in spoken if name.rstrip("_") not in known | prefixes}, path.name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}, target
