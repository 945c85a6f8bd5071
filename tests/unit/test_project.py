"""[tool.cozy] and the checks of a project."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen_worker import validate_project
from gen_worker.errors import ProjectError, ValidationError
from gen_worker.project import BuildConfig, ResourcesConfig, check_deployment_id, load_project

FULL = """
[tool.cozy]
deployment = "my-deployment"
[tool.cozy.models]
sdxl = "hf:org/sdxl"
base = "org/base"
[tool.cozy.build]
gpu = true
cuda = "12.8"
torch = "2.8"
backend = "cu128"
base_image = "python:3.12"
[tool.cozy.resources]
vram_gb = 24
gpu_type = "L40S"
memory_gb = 32.5
cpu_cores = 8
"""


def write(root: Path, text: str, *, lock: bool = True) -> Path:
    (root / "pyproject.toml").write_text(text)
    if lock:
        (root / "uv.lock").write_text("")
    return root


def test_a_whole_project(tmp_path: Path) -> None:
    config = load_project(write(tmp_path, FULL))
    assert config.deployment == "my-deployment"
    assert config.models == {"sdxl": "hf:org/sdxl", "base": "cozy:org/base:latest"}
    assert config.build == BuildConfig(True, "12.8", "2.8", "cu128", "python:3.12")
    assert config.resources == ResourcesConfig(24.0, "L40S", 32.5, 8)
    result = validate_project(tmp_path, require_uv_lock=True)
    assert (result.ok, result.errors, result.warnings) == (True, [], [])


@pytest.mark.parametrize("text", ["abc", "a1b", "my-deployment", "a" * 63, "x-1-y"])
def test_deployment_ids(text: str) -> None:
    assert check_deployment_id(text) == text


@pytest.mark.parametrize(
    "text", ["", "ab", "a" * 64, "1abc", "-abc", "abc-", "a--b", "Abc", "a_b", "a.b", "äbc", "abc\n"]
)
def test_bad_deployment_ids(text: str) -> None:
    with pytest.raises(ValidationError, match="is not a deployment id: 3-63 characters"):
        check_deployment_id(text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[project]\nname = 'x'", "no [tool.cozy] in "),
        ("not toml", "pyproject.toml can't be read: "),
        ("tool.cozy = 3", "no [tool.cozy] in "),
        ("[tool.cozy]\ndeployment = 'A'", "[tool.cozy] deployment: 'A' is not a deployment id"),
        ("[tool.cozy]\ndeployment = 3", "Expected `str | null`, got `int` - at `$.deployment`"),
        ("[tool.cozy.models]\na = 'nope'", "[tool.cozy.models] a: 'nope' is not a model ref: accepted are"),
        ("[tool.cozy.models]\na = 3", "at `$.models[...]`"),
        ("[tool.cozy.build]\ncuda = 12.8", "at `$.build.cuda`"),
        ("[tool.cozy.build]\npython = '3'", "unknown field `python` - at `$.build`"),
        ("[tool.cozy.resources]\nvram_gb = 'lots'", "at `$.resources.vram_gb`"),
    ],
)
def test_what_is_wrong_in_the_file(tmp_path: Path, text: str, error: str) -> None:
    write(tmp_path, text)
    result = validate_project(tmp_path)
    assert not result.ok
    assert len(result.errors) == 1
    assert error in result.errors[0]
    with pytest.raises(ProjectError) as caught:
        load_project(tmp_path)
    assert str(caught.value) == result.errors[0]


def test_several_errors_are_all_told(tmp_path: Path) -> None:
    write(tmp_path, "[tool.cozy]\ndeployment = 'A'\n[tool.cozy.models]\na = 'x'\nb = 'y'")
    assert len(validate_project(tmp_path).errors) == 3
    with pytest.raises(ProjectError, match=r"deployment: .*; .* a: .*; .* b: "):
        load_project(tmp_path)


def test_no_pyproject(tmp_path: Path) -> None:
    result = validate_project(tmp_path)
    (error,) = result.errors
    assert error.startswith(f"no pyproject.toml in {tmp_path}: name the project's folder, or begin one with")
    assert not result.ok


@pytest.mark.parametrize("name", ["requirements.txt", "cozy.toml"])
def test_files_that_are_not_used(tmp_path: Path, name: str) -> None:
    (write(tmp_path, FULL) / name).write_text("")
    result = validate_project(str(tmp_path))
    assert not result.ok
    assert result.errors[0].startswith(f"{name} is not used: move what it says to ")


def test_uv_lock(tmp_path: Path) -> None:
    write(tmp_path, FULL, lock=False)
    lenient, strict = validate_project(tmp_path), validate_project(tmp_path, require_uv_lock=True)
    assert (lenient.ok, lenient.errors) == (True, [])
    assert lenient.warnings[0].startswith("no uv.lock: run `uv lock`")
    assert (strict.ok, strict.errors, strict.warnings) == (False, lenient.warnings, [])


def test_warnings(tmp_path: Path) -> None:
    result = validate_project(write(tmp_path, "[tool.cozy]\nmodel = 'x'"))
    assert result.ok
    assert result.warnings[0] == "[tool.cozy] has the unknown key 'model'"
    assert result.warnings[1].startswith("[tool.cozy] has no `deployment`")
