"""What a release sends: the source archive and the wheel that `uv build` makes, and the wheel once it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import uv

from gen_worker._version import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("gen_worker", "supervisor", "executor")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@dataclass(frozen=True)
class Built:
    wheel: Path
    source: Path

    def in_wheel(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def in_source(self) -> set[str]:
        with tarfile.open(self.source) as archive:
            return {each.name.partition("/")[2] for each in archive.getmembers()}

    def metadata(self, name: str) -> str:
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.read(f"gen_worker-{__version__}.dist-info/{name}").decode()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """As a release makes them, but with the build backend that is here, so that no network is needed."""
    out = tmp_path_factory.mktemp("dist")
    offline = ("--offline", "--no-config", "--no-build-isolation", "--python", sys.executable)
    done = subprocess.run(
        [uv.find_uv_bin(), "build", *offline, "--out-dir", out, ROOT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Built(out / f"gen_worker-{__version__}-py3-none-any.whl", out / f"gen_worker-{__version__}.tar.gz")


def files_of(package: str) -> set[str]:
    found = (path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


def test_the_wheel_has_the_three_packages_whole_and_nothing_else(built: Built) -> None:
    """It is made from the source archive, so that one is complete too."""
    expected = set().union(*map(files_of, PACKAGES))
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert {"gen_worker/serve/page/index.html", "gen_worker/wire/worker_scheduler_pb2.pyi"} <= expected
    in_wheel = {name for name in built.in_wheel() if not name.startswith(f"gen_worker-{__version__}.dist-info/")}
    assert in_wheel == expected


def test_its_metadata(built: Built) -> None:
    found = Parser().parsestr(built.metadata("METADATA"))
    assert (found["Name"], found["Version"]) == ("gen-worker", __version__)
    assert found["Requires-Python"] == ">=3.11"
    assert set(found.get_all("Provides-Extra", [])) == set(PROJECT["project"]["optional-dependencies"])
    scripts = "".join(f"{name} = {target}\n" for name, target in sorted(PROJECT["project"]["scripts"].items()))
    assert built.metadata("entry_points.txt") == f"[console_scripts]\n{scripts}"


def test_the_source_archive_has_what_a_contributor_needs(built: Built) -> None:
    wanted = {"Makefile", "Dockerfile", ".dockerignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"}
    wanted |= {"proto/worker_scheduler.proto", "tests/conftest.py", "docs/quickstart.md", "deploy/compose.yaml"}
    wanted |= {"examples/hello/hello.py", "benchmarks/bench.py"}
    assert wanted <= built.in_source()
    assert not [name for name in built.in_source() if "__pycache__" in name or name.startswith((".venv", ".git/"))]


def test_the_installed_wheel_runs_a_function(built: Built, tmp_path: Path) -> None:
    """In an environment of its own, which has the packages that it needs but not this repository."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    install = [uv.find_uv_bin(), "pip", "install", "--offline", "--no-config", "--no-deps", "--quiet"]
    subprocess.run([*install, "--python", home / "bin/python", built.wheel], capture_output=True, check=True)
    (site,) = home.glob("lib/python*/site-packages")
    # Paths in a .pth are searched last, and no further .pth is read in them, as that of an editable install.
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    project = tmp_path / "studio"

    def installed(*command: str | Path) -> str:
        done = subprocess.run(
            [home / "bin" / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={"PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "WORKER_HTTP_ADDR": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    for package in PACKAGES:
        where = installed("python", "-c", f"import {package}; print({package}.__file__)")
        assert where.startswith(str(site))
    assert installed("gen-worker", "--version") == f"gen-worker {__version__}\n"
    assert installed("gen-worker-supervisor", "--version").strip().endswith(__version__)
    installed("gen-worker", "init", project)
    lines = installed("gen-worker", "run", "--project", project, "--json", "greet", "name=Ada").splitlines()
    assert json.loads(lines[-1])["output"] == {"greetings": ["Hello, Ada!"]}
