"""What the documentation shows: Python blocks run, commands exist with their options, generated pages are fresh.

That shell blocks also do what they should is tests/integration/test_doc_commands.py.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest
import typer
import yaml

from gen_worker.cli import app
from gen_worker.testing.mock_orchestrator import cli as mock_orchestrator
from tests.support.doc_blocks import ROOT, having, name_of, of_language

OTHERS: Final = frozenset({"cd", "curl", "echo", "export", "git", "jq", "kill", "mkdir", "pip", "pytest", "ssh", "uv"})
"""Programs that a block may call and that are not ours to check."""
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text("utf-8") + (ROOT / "examples/hello/Dockerfile").read_text("utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [block.text for block in of_language(path, language)]


@pytest.mark.parametrize("path", having("python"), ids=name_of)
def test_python_blocks_run_in_their_order(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one page are one program, whose annotations resolve as those of a module do."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"page_{path.stem.replace('-', '_').lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, text in enumerate(blocks(path, "python"), 1):
        exec(compile(text, f"{path.name}, block {number}", "exec"), vars(module))
    for name, test in list(vars(module).items()):
        if name.startswith("test_"):
            asyncio.run(test()) if inspect.iscoroutinefunction(test) else test()


@pytest.mark.parametrize("path", having("sh"), ids=name_of)
def test_commands_of_shell_blocks_exist(path: Path) -> None:
    for text in blocks(path, "sh"):
        syntax = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=20, check=False)
        assert syntax.returncode == 0, syntax.stderr
        for words in commands(text):
            check(words)


def test_the_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cd x && gen-worker run f a=1 | jq . # why\n", [["cd", "x"], ["gen-worker", "run", "f", "a=1"], ["jq", "."]]),
        ("A=1 B='x y' \\\n  make test\n", [["make", "test"]]),
        ("MODEL=$(python -c 'import x')\n", []),
        ("curl -d '{\"a\": 1}' x > y\n", [["curl", "-d", '{"a": 1}', "x"]]),
    ],
)
def test_the_reader_of_shell_blocks(text: str, found: list[list[str]]) -> None:
    assert list(commands(text)) == found


@pytest.mark.parametrize(
    "text",
    ["gen-worker nonsense", "gen-worker run f --nonsense", "make nonsense", "python -m gen_worker.nonsense", "nonsense",
     "python -m gen_worker.testing.mock_orchestrator --nonsense", "docker build --build-arg NONSENSE=1 .",
     "docker build nonsense", "docker compose -f nonsense.yaml up", "kubectl apply -k nonsense",
     "kubectl exec deploy/nonsense -- gen-worker doctor", "kubectl exec deploy/gen-worker -- gen-worker nonsense"],
)  # fmt: skip
def test_what_does_not_exist_is_noticed(text: str) -> None:
    with pytest.raises(AssertionError):
        check(shlex.split(text))


# -- reading --------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands, without assignments, redirections and comments. $(...) is not looked into."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"\s*\w+=\$\(.*\)\s*$", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "|", "&", "&&", "||"):
                yield from [words] if (words := _simple(words)) else []
                words = []
            else:
                words.append(word)


def _simple(words: list[str]) -> list[str]:
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    redirection = next((index for index, word in enumerate(words) if set(word) <= set("<>")), len(words))
    return words[:redirection]


def check(words: list[str]) -> None:
    program, *arguments = words
    name = Path(program).name
    if name == "gen-worker":
        _check_gen_worker(arguments)
    elif name in ("python", "python3") and arguments[:1] == ["-m"]:
        _check_module(arguments[1], arguments[2:])
    elif name == "python" and arguments:
        assert arguments[0] == "-c" or (ROOT / arguments[0]).exists(), words
    elif name == "make":
        targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
        assert {word for word in arguments if "=" not in word} <= targets, words
    elif name == "docker":
        _check_docker(arguments)
    elif name == "kubectl":
        _check_kubectl(arguments)
    elif name == "gen-worker-supervisor":
        assert set(arguments) <= {"--help", "--version"}, words
    else:
        assert name in OTHERS, f"is {name} a program that readers have? then add it to OTHERS: {words}"


def _check_gen_worker(arguments: list[str]) -> None:
    group = typer.main.get_command(app)
    known = group
    if arguments and not arguments[0].startswith("-"):
        assert arguments[0] in group.commands, arguments  # type: ignore[attr-defined]
        known = group.commands[arguments[0]]  # type: ignore[attr-defined]
    options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
    _check_options(arguments, options | {"--help"})


def _check_module(module: str, arguments: list[str]) -> None:
    assert find_spec(module) is not None, module
    if module == "gen_worker.testing.mock_orchestrator":
        _check_options(arguments, set(mock_orchestrator._parser()._option_string_actions))


def _check_docker(arguments: list[str]) -> None:
    """What is built is there, with the arguments that it takes."""
    for option, value in pairwise(arguments):
        if option == "--build-arg":
            assert f"\nARG {value.partition('=')[0]}=" in DOCKERFILE, arguments
        elif option == "-f":
            assert (ROOT / value).is_file(), arguments
    if arguments[0] == "build" and "studio" not in arguments:  # which `gen-worker init` has made
        assert (ROOT / arguments[-1] / "Dockerfile").is_file(), arguments


def _check_kubectl(arguments: list[str]) -> None:
    """What is applied is there, and what is run in it exists."""
    verb, *rest = arguments
    if verb == "apply":
        assert rest[0] == "-k", arguments
        assert (ROOT / rest[1] / "kustomization.yaml").is_file(), arguments
    elif verb == "exec":
        (deployment,) = yaml.safe_load_all((ROOT / "deploy/kubernetes/deployment.yaml").read_text("utf-8"))
        assert rest[:2] == [f"deploy/{deployment['metadata']['name']}", "--"], arguments
        check(rest[2:])


def _check_options(arguments: list[str], known: set[str]) -> None:
    given = {word.partition("=")[0] for word in arguments if word.startswith("-") and word != "-"}
    assert given <= known, f"{given - known} of {arguments}"
