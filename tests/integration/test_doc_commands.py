"""The shell blocks of README, CONTRIBUTING and docs/: each page's are run, in their order, as a reader would.

How a page says what a block needs, or why it can't run here, is in tests/support/doc_blocks.py.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.doc_blocks import PAGES, ROOT, SHELL, having, name_of, of_language, read_blocks
from tests.support.shell_page import ShellPage


def pages(*, soak: bool) -> list[Path]:
    return [
        page
        for page in having(SHELL)
        if any(bool(block.mark.soak) == soak and not block.mark.not_run for block in of_language(page, SHELL))
    ]


def run_page(page: Path, directory: Path, *, soak: bool) -> None:
    if any(re.search(r"(?m)^curl ", block.text) for block in of_language(page, SHELL)) and not shutil.which("curl"):
        pytest.skip("curl is not installed")
    with ShellPage(directory) as shell:
        for block in of_language(page, SHELL):
            if bool(block.mark.soak) == soak and not block.mark.not_run:
                shell.run(block)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", pages(soak=False), ids=name_of)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, soak=False)


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", pages(soak=True), ids=name_of)
def test_commands_that_take_minutes_run(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, soak=True)


def test_the_readme_of_a_new_project_holds(tmp_path: Path) -> None:
    """It has no marks, which its reader would meet: the server, and what needs Docker or the network, are left out."""
    with ShellPage(tmp_path) as shell:
        (init,) = read_blocks(ROOT / "x.md", "```sh\ngen-worker init studio && cd studio\n```\n")
        shell.run(init)
        commands, image = read_blocks(ROOT / "x.md", (shell.home / "studio/README.md").read_text())
        assert image.text == "docker build -t studio .\n"
        kept = [line for line in commands.text.splitlines() if not line.startswith(("gen-worker serve", "uv lock"))]
        assert len(kept) == 3
        shell.run(replace(commands, text="\n".join(kept)))


def test_what_is_not_run_has_a_reason_that_holds() -> None:
    """A new block runs, or is added here; what needs no Docker and no cluster can run."""
    reasons = Counter(
        (name_of(block.page), block.mark.not_run) for page in PAGES for block in read_blocks(page) if block.mark.not_run
    )
    assert reasons == {
        ("docs/deploying.md", "needs a Docker engine"): 3,
        ("docs/deploying.md", "needs a cluster"): 1,
        ("docs/operations.md", "needs a cluster"): 1,
        ("docs/quickstart.md", "needs a Docker engine"): 1,
    }
    dropped = {
        (name_of(block.page), block.mark.without) for page in PAGES for block in read_blocks(page) if block.mark.without
    }
    assert dropped == {("README.md", "make test"), ("CONTRIBUTING.md", "make test")}


def test_every_block_says_what_it_is() -> None:
    """Python and shell are run, text is a picture of something; another language needs a test of its own."""
    assert {block.language for page in PAGES for block in read_blocks(page)} == {"python", SHELL, "text"}
    for page in PAGES:
        for block in read_blocks(page):
            assert block.language != "text" or not block.mark.not_run, block


def test_a_command_that_fails_is_noticed(tmp_path: Path) -> None:
    (block,) = read_blocks(ROOT / "x.md", "```sh\ncd /\nfalse\necho not reached\n```\n")
    with ShellPage(tmp_path) as shell, pytest.raises(AssertionError, match=r"x\.md:1 left with 1"):
        shell.run(block)


def test_a_server_that_ends_is_noticed(tmp_path: Path) -> None:
    (block,) = read_blocks(ROOT / "x.md", "<!-- run: serves 127.0.0.1:1 -->\n```sh\ntrue\n```\n")
    with pytest.raises(AssertionError), ShellPage(tmp_path) as shell:
        shell.run(block)


def test_what_a_block_leaves_is_there_for_the_next(tmp_path: Path) -> None:
    first, second = read_blocks(
        ROOT / "x.md", "```sh\nmkdir a b && cd a\nX='a b'\n```\n\n```sh\ntest \"$X\" = 'a b' && cd ../b\n```\n"
    )
    with ShellPage(tmp_path) as shell:
        shell.run(first)
        shell.run(second)


def test_a_mark_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="what is 'sometimes'"):
        read_blocks(ROOT / "x.md", "<!-- run: sometimes -->\n```sh\ntrue\n```\n")
