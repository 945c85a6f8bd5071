"""The command line without a worker: init, validate, and what commands say when they can't start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gen_worker._version import __version__
from gen_worker.cli import app
from gen_worker.cli.init import make_project
from gen_worker.errors import ProjectError
from gen_worker.serve.access import is_loopback
from gen_worker.serve.server import AddressError, check_address


def gen_worker(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_version() -> None:
    for words in (["--version"], ["version"]):
        result = gen_worker(*words)
        assert (result.exit_code, result.output) == (0, f"gen-worker {__version__}\n")


# -- init -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [[], ["--flat"]])
def test_a_new_project_is_valid(tmp_path: Path, layout: list[str]) -> None:
    root = tmp_path / "My Studio"
    made = gen_worker("init", root, *layout)
    assert made.exit_code == 0, made.output
    package = root / "my_studio" if layout else root / "src" / "my_studio"
    assert (package / "functions.py").is_file()
    checked = gen_worker("validate", root)
    assert (checked.exit_code, checked.stdout) == (0, "ok: greet\n")
    assert "no uv.lock" in checked.stderr
    assert "my-studio" in (root / "pyproject.toml").read_text()
    assert "$" not in (root / "README.md").read_text().replace("$(", "")
    assert f"COPY {'my_studio my_studio' if layout else 'src src'}" in (root / "Dockerfile").read_text()


def test_a_new_project_passes_its_own_test(tmp_path: Path) -> None:
    root = tmp_path / "studio"
    make_project(root)
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert tests.returncode == 0, tests.stdout
    assert "2 passed" in tests.stdout


def test_new_code_is_clean(tmp_path: Path) -> None:
    make_project(tmp_path / "studio")
    lint = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I,UP", str(tmp_path)]
    found = subprocess.run(lint, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stdout


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "studio").mkdir()
    (tmp_path / "studio" / "notes.txt").write_text("mine")
    refused = gen_worker("init", tmp_path / "studio")
    assert refused.exit_code == 2
    assert refused.stderr == f"error: {tmp_path}/studio exists and is not an empty folder\n"
    assert [path.name for path in (tmp_path / "studio").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["json", "gen-worker", "supervisor", "tests", "x", "9lives", "日本"])
def test_names_that_can_not_be_a_project(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProjectError, match=r"taken|can't name a project"):
        make_project(tmp_path / name)
    assert not (tmp_path / name).exists()


# -- validate -------------------------------------------------------------------------------------


def test_validate_looks_at_the_code_too(tmp_path: Path) -> None:
    make_project(tmp_path / "studio")
    code = tmp_path / "studio" / "src" / "studio" / "functions.py"
    code.write_text(code.read_text().replace("-> GreetOutput", "-> int"))
    refused = gen_worker("validate", tmp_path / "studio")
    assert refused.exit_code == 1
    assert "studio.functions.greet returns int: it must be a msgspec.Struct" in refused.stderr
    assert gen_worker("validate", tmp_path / "studio", "--no-code").stdout == "ok\n"
    report = json.loads(gen_worker("validate", tmp_path / "studio", "--json").stdout)
    assert (report["ok"], report["functions"], len(report["errors"])) == (False, [], 1)
    assert report["warnings"] == ["no uv.lock: run `uv lock`, so that every build installs the same versions"]


# -- serve, before it starts ----------------------------------------------------------------------


def test_a_public_address_needs_a_token(tmp_path: Path) -> None:
    make_project(tmp_path / "studio")
    refused = gen_worker("serve", tmp_path / "studio", "--host", "0.0.0.0")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: 0.0.0.0 is not this machine alone")
    check_address("0.0.0.0", "secret-1_A")
    with pytest.raises(AddressError, match="the token has characters"):
        check_address("0.0.0.0", "two words")
    check_address("127.0.0.1", "")
    with pytest.raises(AddressError):
        check_address("example.org", "")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("192.168.1.2", False), ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_serve_says_which_packages_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in {"uvicorn", "watchfiles"} else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    refused = gen_worker("serve", tmp_path)
    assert refused.exit_code == 2
    assert refused.stderr == "error: gen-worker serve needs uvicorn, watchfiles: pip install 'gen-worker[serve]'\n"


@pytest.mark.parametrize("command", [["run", "f", "--project"], ["serve"]])
def test_a_folder_without_a_project_says_what_to_do(tmp_path: Path, command: list[str]) -> None:
    refused = gen_worker(*command, tmp_path)
    assert refused.exit_code == 2
    assert f"no pyproject.toml in {tmp_path}" in refused.stderr
    assert "gen-worker init" in refused.stderr


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    import socket

    make_project(tmp_path / "studio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = gen_worker("serve", tmp_path / "studio", "--port", port)
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"error: can't listen on 127.0.0.1:{port}: Address already in use; choose another with --port\n"
    )


# -- the command as a whole -----------------------------------------------------------------------


def test_every_command_has_help_that_teaches() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        text = gen_worker(name, "--help").stdout
        assert command.help, name
        for option in command.params:
            assert getattr(option, "help", None), f"{name}: {option.name}"
        assert "Usage:" in text


def test_completion_of_the_common_shells() -> None:
    for shell in ("bash", "zsh", "fish"):
        script = CliRunner().invoke(app, [], prog_name="gen-worker", env={"_GEN_WORKER_COMPLETE": f"source_{shell}"})
        assert script.exit_code == 0
        assert "gen-worker" in script.stdout
