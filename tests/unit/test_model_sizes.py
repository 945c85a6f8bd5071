"""What models took is remembered across restarts, and no file can hinder a worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from supervisor.model_sizes import CAP, FILE_NAME, ModelSizes
from tests.support.rig import until


async def written(sizes: ModelSizes) -> None:
    await until(lambda: sizes._writing is None)


async def test_a_figure_holds_for_the_same_weights_only() -> None:
    sizes = ModelSizes(None)
    assert sizes.measured("m", "t", 100) is None
    sizes.remember("m", "t", 100, 130)
    assert sizes.measured("m", "t", 100) == 130
    assert sizes.measured("m", "t", 200) is None, "other files are another model"
    assert sizes.measured("m", "other", 100) is None


async def test_figures_outlive_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    sizes = ModelSizes(folder)
    sizes.remember("m", "t", 100, 130)
    sizes.remember("n", "t", 100, 140)  # while the first is being written
    await written(sizes)
    again = ModelSizes(folder)
    assert (again.measured("m", "t", 100), again.measured("n", "t", 100)) == (130, 140)
    assert [path.name for path in folder.iterdir()] == [FILE_NAME], "no part is left"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "sizes": {"m": 3}}', "\udcff"])
async def test_a_broken_file_is_said_and_replaced(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE_NAME).write_text(text, errors="surrogateescape")
    sizes = ModelSizes(tmp_path)
    assert "can't be read" in caplog.text
    sizes.remember("m", "t", 1, 2)
    await written(sizes)
    assert json.loads((tmp_path / FILE_NAME).read_text())["sizes"]


async def test_a_folder_that_takes_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    sizes = ModelSizes(tmp_path / "file")
    sizes.remember("m", "t", 1, 2)
    await written(sizes)
    assert "can't be kept" in caplog.text
    assert sizes.measured("m", "t", 1) == 2


async def test_the_oldest_figures_go(tmp_path: Path) -> None:
    sizes = ModelSizes(None)
    for number in range(CAP + 1):
        sizes.remember(f"m{number}", "t", 1, 2)
    assert sizes.measured("m0", "t", 1) is None
    assert sizes.measured("m1", "t", 1) == 2
