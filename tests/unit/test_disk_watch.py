"""What others do on the disk is noticed, and how far a fetch is never goes back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisor.disk_watch import DiskWatch
from supervisor.model_source import FetchProgress
from tests.support.rig import until

WAIT_S = 20.0


class Disk:
    """Models that somebody else puts there and takes away, and what the watch said."""

    def __init__(self, root: Path) -> None:
        self.models: set[str] = {"a"}
        self.records = root / "records"
        self.told = 0
        self.defects: set[int] = set()
        self.listings = 0
        self.watch = DiskWatch(
            lambda: frozenset(self.models), models_changed=self._models_changed, records_changed=self._records_changed
        )

    def _models_changed(self) -> None:
        self.told += 1
        if self.told in self.defects:
            raise KeyError("a defect")

    def _records_changed(self) -> None:
        self.listings += 1


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Disk]:
    disk = Disk(tmp_path)
    disk.watch.start([disk.records, tmp_path / "never"])
    yield disk
    await disk.watch.stop()


async def test_a_change_is_told_once(disk: Disk) -> None:
    disk.models = {"a", "b"}
    await until(lambda: disk.told == 1, WAIT_S)
    disk.models = set()
    await until(lambda: disk.told == 2, WAIT_S)
    disk.models = {"c"}
    disk.watch.knows()
    disk.records.mkdir()
    await until(lambda: disk.listings > 0, WAIT_S)
    assert disk.told == 2, "what its owner did itself is known"


async def test_records_are_listed_until_their_clock_has_gone_on(disk: Disk) -> None:
    disk.records.mkdir()
    soon = time.time() + 0.3
    os.utime(disk.records, (soon, soon))
    await until(lambda: disk.listings > 0, WAIT_S)
    seen = disk.listings
    # Another record within the same step of the clock would leave the directory's time as it is.
    await until(lambda: disk.listings == seen + 1, WAIT_S)
    disk.records.rmdir()
    await until(lambda: disk.listings == seen + 2, WAIT_S)


async def test_a_defect_in_telling_is_logged_and_not_the_end(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.defects = {1}
    disk.models = {"a", "b"}
    await until(lambda: disk.told == 1, WAIT_S)
    disk.models = set()
    await until(lambda: disk.told == 2, WAIT_S)
    assert "a defect in telling what changed on disk" in caplog.text


async def test_it_stops(disk: Disk) -> None:
    await disk.watch.stop()
    assert len(asyncio.all_tasks()) == 1


def test_progress_does_not_go_back() -> None:
    told = [FetchProgress()]
    for done, total in ((0, 0), (10, 0), (100, 1000), (500, 1000), (0, 0), (0, 1000), (400, 1000), (600, 1000)):
        told.append(told[-1].then(done, total))
    assert [each.done_bytes for each in told] == [0, 0, 10, 100, 500, 500, 500, 500, 600]
    assert [each.share for each in told] == [0, 0, 0, 0.1, 0.5, 0.5, 0.5, 0.5, 0.6]
    assert FetchProgress(1100, 1000).share == 1.0
