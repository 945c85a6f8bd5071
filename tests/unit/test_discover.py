"""Discovery of whole projects, from both layouts, and the manifest that it writes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gen_worker import discover_manifest
from gen_worker.errors import ManifestError, ProjectError, SignatureError
from gen_worker.manifest import load_manifest
from gen_worker.modules import find_modules, import_roots

PYPROJECT = """
[tool.cozy]
deployment = "demo-one"
[tool.cozy.models]
sdxl = "hf:org/sdxl"
[tool.cozy.build]
gpu = true
[tool.cozy.resources]
vram_gb = 12
"""

MAIN = """
from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from gen_worker import (
    ActionContext, ModelArtifacts, ModelRef, ModelRefSource, RealtimeSocket, ResourceRequirements,
    worker_function, worker_websocket,
)
from shared import Out

DEPLOYMENT = ModelRefSource.DEPLOYMENT
print("imported")


class In(msgspec.Struct):
    prompt: str


@worker_function(ResourceRequirements(max_concurrency=2))
def paint(
    ctx: ActionContext,
    a: Annotated[ModelArtifacts, ModelRef(DEPLOYMENT, "sdxl")],
    b: Annotated[ModelArtifacts, ModelRef(DEPLOYMENT, "vae")],
    c: Annotated[ModelArtifacts, ModelRef(DEPLOYMENT, "hf:org/lora")],
    d: Annotated[ModelArtifacts, ModelRef(DEPLOYMENT, "sdxl")],
    payload: In,
) -> Out:
    return Out(payload.prompt)


@worker_function()
def stream(ctx: ActionContext, payload: In) -> Iterator[Out]:
    yield Out(payload.prompt)


@worker_websocket()
async def talk(
    ctx: ActionContext, sock: RealtimeSocket, a: Annotated[ModelArtifacts, ModelRef(DEPLOYMENT, "sdxl")]
) -> None:
    await sock.close()
"""

SHARED = "import msgspec\n\n\nclass Out(msgspec.Struct):\n    text: str\n"
FUNCTION = """
import msgspec
import gen_worker as gw

class In(msgspec.Struct):
    a: int

@gw.worker_function()
def {name}(ctx: gw.ActionContext, payload: In) -> In:
    return payload
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write(tmp_path, {"pyproject.toml": PYPROJECT, "main.py": MAIN, "shared.py": SHARED})


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gen_worker.discover", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=30)


def function(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in manifest["functions"] if entry["name"] == name)


def test_the_manifest(project: Path) -> None:
    manifest = discover_manifest(project)
    assert set(manifest) == {"functions", "websockets", "deployment", "models", "build", "resources"}
    assert manifest["deployment"] == "demo-one"
    assert manifest["models"] == {"sdxl": "hf:org/sdxl"}
    assert manifest["build"] == {"gpu": True, "cuda": None, "torch": None, "backend": None, "base_image": None}
    assert manifest["resources"] == {"vram_gb": 12.0, "gpu_type": None, "memory_gb": None, "cpu_cores": None}
    paint = function(manifest, "paint")
    assert set(paint) == {
        "name", "module", "resources", "payload_type", "payload_schema_sha256", "input_schema", "output_mode",
        "output_type", "output_schema_sha256", "output_schema", "incremental_output", "injection_json",
        "required_models",
    }  # fmt: skip
    assert (paint["module"], paint["resources"]) == ("main", {"max_concurrency": 2})
    assert (paint["payload_type"], paint["output_type"]) == ("main.In", "shared.Out")
    assert (paint["output_mode"], paint["incremental_output"]) == ("single", False)
    assert paint["required_models"] == ["sdxl", "vae", "hf:org/lora"]
    assert paint["injection_json"][1] == {
        "param": "b",
        "type": "gen_worker.injection.ModelArtifacts",
        "model_ref": {"source": "deployment", "key": "vae"},
    }
    assert paint["input_schema"]["$defs"]["In"]["required"] == ["prompt"]


def test_the_digests_are_over_compact_sorted_json(project: Path) -> None:
    paint = function(discover_manifest(project), "paint")
    for schema, digest in (("input_schema", "payload_schema_sha256"), ("output_schema", "output_schema_sha256")):
        encoded = json.dumps(paint[schema], separators=(",", ":"), sort_keys=True).encode()
        assert hashlib.sha256(encoded).hexdigest() == paint[digest]


def test_incremental_functions_and_websockets(project: Path) -> None:
    manifest = discover_manifest(project)
    stream = function(manifest, "stream")
    assert (stream["output_mode"], stream["incremental_output"]) == ("incremental", True)
    assert stream["delta_type"] == stream["output_type"] == "shared.Out"
    assert stream["delta_schema_sha256"] == stream["output_schema_sha256"]
    assert stream["delta_output_schema"] == stream["output_schema"]
    (talk,) = manifest["websockets"]
    assert set(talk) == {"name", "module", "resources", "injection_json", "required_models"}
    assert (talk["name"], talk["required_models"]) == ("talk", ["sdxl"])


def test_missing_models_are_a_warning(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    discover_manifest(project)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: main.paint needs model 'vae', which [tool.cozy.models] lacks"]


def test_a_type_that_nothing_can_load_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = FUNCTION.format(name="f").replace(
        "payload: In)", "payload: In, e: Annotated[Engine, gw.ModelRef('payload', 'm')])"
    )
    text = "from typing import Annotated\n" + text.replace("a: int", "m: str").replace(
        "@gw.", "class Engine: pass\n@gw."
    )
    discover_manifest(write(tmp_path, {"pyproject.toml": PYPROJECT, "app.py": text}))
    assert "warning: app.f: parameter 'e' injects app.Engine, which has neither" in capsys.readouterr().err


def test_the_command(project: Path) -> None:
    result = run(project)
    assert result.returncode == 0, result.stderr
    assert "imported" in result.stderr
    assert json.loads(result.stdout)["deployment"] == "demo-one"
    assert json.loads(run(project.parent, str(project)).stdout) == json.loads(result.stdout)


def test_the_manifest_can_be_read_back(project: Path, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(run(project).stdout)
    manifest = load_manifest(path)
    assert manifest.modules == ("main",)
    assert manifest.models == {"sdxl": "hf:org/sdxl"}
    assert [entry.name for entry in manifest.functions] == ["paint", "stream"]
    assert msgspec.to_builtins(manifest) == discover_manifest(project)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "can't be read: No such file or directory"),
        ("nonsense", "is not one that this version writes: JSON is malformed"),
        ('{"functions": [{}]}', "missing required field `name` - at `$.functions[0]`"),
        ('{"models": {"a": 3}}', "Expected `str`, got `int` - at `$.models[...]`"),
    ],
)
def test_manifests_that_can_not_be_read(tmp_path: Path, text: str | None, error: str) -> None:
    path = tmp_path / "manifest.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        load_manifest(path)
    assert str(caught.value).startswith(f"manifest {path} ")
    assert error in str(caught.value)


LAYOUTS = {
    "flat package": ({"app/__init__.py": "", "app/api/__init__.py": "", "app/api/f.py": "F"}, ["app.api.f"]),
    "functions in __init__": ({"app/__init__.py": "F"}, ["app"]),
    "namespace package": ({"app/f.py": "F"}, ["app.f"]),
    "src package": ({"src/app/__init__.py": "", "src/app/f.py": "F"}, ["app.f"]),
    "src module": ({"src/f.py": "F"}, ["f"]),
    "src and root": ({"src/app/f.py": "F", "main.py": "G"}, ["app.f", "main"]),
    "src as a package": ({"src/__init__.py": "", "src/f.py": "F"}, ["src.f"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    files, modules = LAYOUTS[layout]
    texts = {"F": FUNCTION.format(name="f"), "G": FUNCTION.format(name="g")}
    write(tmp_path, {"pyproject.toml": PYPROJECT, **{name: texts.get(text, text) for name, text in files.items()}})
    assert list(find_modules(tmp_path)) == modules
    assert [entry["module"] for entry in discover_manifest(tmp_path)["functions"]] == modules


def test_what_is_not_imported(tmp_path: Path) -> None:
    poison = "raise SystemExit('imported')  # worker_function\n"
    files = {
        "pyproject.toml": PYPROJECT, "app.py": FUNCTION.format(name="f"), "setup.py": poison, "conftest.py": poison,
        "test_app.py": poison, "app_test.py": poison, "tests/x.py": poison, "build/lib/x.py": poison,
        ".hidden/x.py": poison, "not-a-name/x.py": poison, "not-a-name.py": poison, "env/pyvenv.cfg": "",
        "env/x.py": poison, "other/pyproject.toml": "", "other/x.py": poison,
        "script.py": "raise SystemExit('no decorator is named here')\n",
    }  # fmt: skip
    assert find_modules(write(tmp_path, files)) == ("app",)
    assert len(discover_manifest(tmp_path)["functions"]) == 1


def test_the_host_is_left_as_it_was(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type(sys)("main")
    monkeypatch.setitem(sys.modules, "main", stranger)
    path, modules = list(sys.path), set(sys.modules)
    discover_manifest(project)
    assert sys.path == path
    assert sys.modules["main"] is stranger
    assert "shared" not in sys.modules
    assert set(sys.modules) == modules


def test_two_projects_with_the_same_module_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        root = write(tmp_path / name, {"pyproject.toml": PYPROJECT, "app.py": FUNCTION.format(name=name)})
        assert [entry["name"] for entry in discover_manifest(root)["functions"]] == [name]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "import nothing_of_this_name  # worker_function",
            "ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        ("# worker_function\ndef f(:\n", "SyntaxError: "),
        ("# worker_function\nraise RuntimeError('two\\nlines')", "RuntimeError: two lines ("),
        ("# worker_function\nimport sys\nsys.exit(3)", "SystemExit: 3 ("),
    ],
)
def test_modules_that_do_not_import(tmp_path: Path, text: str, error: str) -> None:
    write(tmp_path, {"pyproject.toml": PYPROJECT, "app.py": text})
    result = run(tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: module 'app' does not import: " + error)
    assert "app.py" in result.stderr


def test_a_broken_signature(tmp_path: Path) -> None:
    text = FUNCTION.format(name="f").replace("payload: In)", "payload)")
    write(tmp_path, {"pyproject.toml": PYPROJECT, "app.py": text})
    result = run(tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: app.f: parameter 'payload' has no annotation\n"
    with pytest.raises(SignatureError):
        discover_manifest(tmp_path)
    assert "app" not in sys.modules


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "no pyproject.toml in "),
        ({"pyproject.toml": ""}, "no [tool.cozy] in "),
        ({"pyproject.toml": "[tool.cozy]\ndeployment = 'X'"}, "[tool.cozy] deployment: 'X' is not a deployment id"),
        ({"pyproject.toml": PYPROJECT}, "no @worker_function() or @worker_websocket() in "),
        ({"pyproject.toml": PYPROJECT, "types.py": "# worker_function"}, "module 'types' has the name of a standard"),
    ],
)
def test_projects_that_can_not_be_discovered(tmp_path: Path, files: dict[str, str], error: str) -> None:
    with pytest.raises(ProjectError) as caught:
        discover_manifest(write(tmp_path, files))
    assert str(caught.value).startswith(error)


def test_import_roots(tmp_path: Path) -> None:
    assert import_roots(tmp_path) == (tmp_path,)
    (tmp_path / "src").mkdir()
    assert import_roots(tmp_path) == (tmp_path / "src", tmp_path)
