"""`gen-worker download` and `gen-worker models` as commands, against a hub."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from gen_worker.cli import app
from tests.support.dev_hub import DevHub

PROGRAM = Path(sys.executable).parent / "gen-worker"


@pytest.fixture(scope="module")
def hub() -> Iterator[DevHub]:
    with DevHub(token="token") as hub:
        hub.put("org/a", {"a.safetensors": b"a" * 3_000_000})
        hub.put("org/b", {"b.safetensors": b"b"})
        yield hub


class Done(NamedTuple):
    stdout: str
    stderr: str


def command(hub: DevHub, cache: Path, *arguments: str, code: int = 0, program: bool = False) -> Done:
    """Run the command; as the installed program once, since each start costs a second."""
    env = {"COZY_HUB_URL": hub.url, "COZY_HUB_TOKEN": "token", "WORKER_MODEL_CACHE_DIR": str(cache), "HOME": str(cache)}
    if program:
        env["PATH"] = os.environ["PATH"]
        done = subprocess.run([PROGRAM, *arguments], env=env, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == code, done.stderr
        return Done(done.stdout, done.stderr)
    result = CliRunner().invoke(app, arguments, env=env)
    assert result.exit_code == code, result.output
    return Done(result.stdout, result.stderr)


def test_download_list_and_remove(hub: DevHub, tmp_path: Path) -> None:
    assert command(hub, tmp_path, "models").stdout == "no models on disk\n"
    shown = command(hub, tmp_path, "download", "org/a", program=True)
    root = Path(shown.stdout.strip())
    assert (root / "a.safetensors").stat().st_size == 3_000_000
    assert "org/a" in shown.stderr, "the bar"
    both = command(hub, tmp_path, "download", "org/a", "org/b", "--json")
    assert [each["ref"] for each in json.loads(both.stdout)] == ["cozy:org/a:latest", "cozy:org/b:latest"]
    assert both.stderr == ""

    table = command(hub, tmp_path, "models").stdout
    assert "cozy:org/a:latest" in table
    assert "2.9 MB" in table
    assert "just now" in table
    listed = json.loads(command(hub, tmp_path, "models", "--json").stdout)
    assert {each["ref"]: each["size_bytes"] for each in listed} == {
        "cozy:org/a:latest": 3_000_000,
        "cozy:org/b:latest": 1,
    }

    digest = root.name
    fd = os.open(tmp_path / "cozy/locks" / f"{digest}.use", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    assert (
        "error: cozy:org/a:latest can't be removed: it is in use"
        in command(hub, tmp_path, "models", "rm", "org/a", code=1).stderr
    )
    os.close(fd)
    assert command(hub, tmp_path, "models", "rm", "org/a").stdout == "freed 2.9 MB\n"
    assert not root.exists()
    for ref in ("org/a", "hf:org/a"):
        gone = command(hub, tmp_path, "models", "rm", ref, code=1).stderr
        assert "is not on this disk; `gen-worker models` lists what is" in gone


def test_errors_are_one_line(hub: DevHub, tmp_path: Path) -> None:
    gone = command(hub, tmp_path, "download", "org/none", code=1)
    assert gone.stderr.rstrip().splitlines()[-1].startswith("error: the hub has no cozy:org/none:latest (404)")
    for arguments in (["download", "org/a", "not a ref"], ["models", "rm", "not a ref"]):
        (wrong,) = command(hub, tmp_path, *arguments, code=2).stderr.splitlines()
        assert wrong.startswith("error: 'not a ref' is not a model ref: accepted are")
