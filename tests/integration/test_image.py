"""The steps of the Dockerfiles, each really run: the base image, a tenant's on it, and that of a new project.

No container engine is needed, but root and the network: tests/support/image.py runs the steps in a chroot. Torch is
left out, whose layer is gigabytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILDER = ROOT / "tests/support/image.py"
NETWORK = (
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PIP_CERT", "PIP_INDEX_URL", "SSL_CERT_FILE", "UV_DEFAULT_INDEX",
)  # fmt: skip
"""How this machine reaches packages; Docker hands the proxies on, too."""
SOON = {"RECONNECT_DELAY": "0.1", "RECONNECT_MAX_DELAY": "0.5", "RECONNECT_JITTER_SECONDS": "0.05"}
LIFE = """
set -eu
python -m gen_worker.testing.mock_orchestrator --listen 127.0.0.1:8080 --run greet --payload-json '{"name": "Ada"}' &
scheduler=$!
"$0" & worker=$!
wait $scheduler || { kill -TERM $worker; exit 1; }
python -m gen_worker.testing.mock_orchestrator --listen 127.0.0.1:8080 >/dev/null & next=$!
id -u
"$@" && echo healthy
kill -TERM $worker
wait $worker
echo drained
kill $next
"""
"""In the image: a scheduler and the worker, one run, the health check, the end that `docker stop` brings. The next
scheduler is there to take what the first one may not have read."""


def python_of_the_image() -> Path:
    """One of the version that the Dockerfile asks for."""
    (version,) = re.findall(r"^ARG PYTHON_VERSION=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    on_path = shutil.which(f"python{version}")
    found = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), *([Path(on_path)] if on_path else [])]
    if not found:
        pytest.skip(f"no Python {version} with a pip of its own here")
    return found[0]


@pytest.fixture
def new_mounts() -> None:
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounts and chroots need root")
    if subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces are not permitted here")


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("new_mounts")
def test_the_images_are_built_and_serve(tmp_path: Path) -> None:
    context = tmp_path / "context"
    for source in re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            context.mkdir(exist_ok=True)
            shutil.copy(ROOT / source, context / source)
    studio = tmp_path / "studio"
    subprocess.run([Path(sys.executable).parent / "gen-worker", "init", studio], capture_output=True, check=True)
    hello = ROOT / "examples/hello"
    (scratch := tmp_path / "scratch").mkdir()
    life = {
        "command": ["sh", "-c", LIFE, "{entrypoint}", "{health}"],
        "env": {"SCHEDULER_ADDR": "127.0.0.1:8080", **SOON},
    }
    order = {
        "python": str(python_of_the_image()),
        "scratch": str(scratch),
        "network": {name: os.environ[name] for name in NETWORK if name in os.environ} | {"UV_SYSTEM_CERTS": "1"},
        "images": {
            "gen-worker": {"dockerfile": str(ROOT / "Dockerfile"), "context": str(context), "args": {"TORCH": ""}},
            "hello": {"dockerfile": str(hello / "Dockerfile"), "context": str(hello), "args": {}},
            "studio": {"dockerfile": str(studio / "Dockerfile"), "context": str(studio), "args": {}},
        },
        "runs": [{"image": "hello", **life}, {"image": "studio", **life}],
    }
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, BUILDER],
        input=json.dumps(order), capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert '[output] {"greeting":"Hello, Ada!"}' in done.stdout, said
    assert '[output] {"greetings":["Hello, Ada!"]}' in done.stdout, said
    assert done.stdout.count("10001\nhealthy\n") == 2, said
    assert done.stdout.count("drained\n") == 2, said
