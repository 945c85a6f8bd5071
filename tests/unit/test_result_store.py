"""Results on disk beside the event loop: what is kept, for whom, and what a bad disk costs."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor import result_store as module
from supervisor.journal import Journal
from supervisor.outbox import DELIVERED_S, Outbox
from supervisor.result_store import ResultStore
from supervisor.transport.messages import apart, count_of, in_one_piece


async def opened(parent: Path, worker_id: str = "worker") -> ResultStore:
    store = ResultStore(parent, worker_id)
    await store.open()
    return store


async def handed_over(store: ResultStore) -> list[bytes]:
    found: list[bytes] = []

    async def room() -> None:
        pass

    await store.hand_over(lambda message, _ticket: found.append(message), room)
    return found


def abandon(store: ResultStore) -> None:
    """As a death would: the lock is gone, the files are there."""
    for journal in {*(journal for journal, _ in store._places.values()), store._own}:
        assert journal is not None
        os.close(journal._lock_fd)


async def written(store: ResultStore, count: int) -> None:
    async with asyncio.timeout(5):
        while len(store._places) != count:
            await asyncio.sleep(0.001)


async def test_what_is_kept_is_found_by_the_next(tmp_path: Path) -> None:
    first = await opened(tmp_path / "out")
    tickets = [first.keep(b"r%d" % number) for number in range(5)]
    first.forget(tickets[1])
    await written(first, 4)
    abandon(first)
    second = await opened(tmp_path / "out", "another")
    assert await handed_over(second) == [b"r0", b"r2", b"r3", b"r4"]
    assert await handed_over(second) == []
    await second.close()
    third = await opened(tmp_path / "out")
    assert len(await handed_over(third)) == 4, "the second never heard that they arrived"
    for ticket in list(third._places):
        third.forget(ticket)
    await third.close()
    assert list((tmp_path / "out").iterdir()) == []


async def test_what_arrived_before_it_was_written_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(tmp_path)
    go = threading.Event()
    keep = Journal.keep
    kept: list[bytes] = []

    def slow(journal: Journal, result_id: int, message: bytes) -> None:
        go.wait(5)
        kept.append(message)
        keep(journal, result_id, message)

    monkeypatch.setattr(Journal, "keep", slow)
    store.keep(b"the disk hangs here")
    await asyncio.sleep(0.01)
    tickets = [store.keep(b"r%d" % number) for number in range(100)]
    for ticket in tickets[1:]:
        store.forget(ticket)
    go.set()
    await store.close()
    assert kept == [b"the disk hangs here", b"r0"]


async def test_a_disk_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.05)
    monkeypatch.setattr(module, "QUEUED_BYTES", 1000)
    store = await opened(tmp_path)
    go = threading.Event()
    monkeypatch.setattr(Journal, "keep", lambda *_: go.wait(5))
    for _ in range(50):
        store.keep(b"x" * 100)
    assert store._queue.qsize() <= 10
    await store.close()
    go.set()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert said == [
        f"{tmp_path} is too slow: some results are not kept on disk",
        f"{tmp_path} is too slow: the last results may not be on disk",
    ]


async def test_giving_up_a_hand_over_harms_nothing(tmp_path: Path) -> None:
    first = await opened(tmp_path)
    for number in range(3):
        first.keep(b"r%d" % number)
    await written(first, 3)
    abandon(first)
    second = await opened(tmp_path)
    task = asyncio.ensure_future(handed_over(second))
    await asyncio.sleep(0)
    task.cancel()
    second.keep(b"new")
    await written(second, 4)
    await second.close()


@pytest.mark.parametrize("worker_id", ["w", "a/b", "../../x", "..", "", "ü" * 300, "a b\n"])
async def test_any_worker_id_gives_a_name(tmp_path: Path, worker_id: str) -> None:
    store = await opened(tmp_path / "out", worker_id)
    (directory,) = (tmp_path / "out").iterdir()
    assert directory.is_dir()
    await store.close()


async def test_results_that_can_not_be_read_any_more_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = await opened(tmp_path)
    first.keep(b"lost")
    first.keep(b"there")
    await written(first, 2)
    abandon(first)
    second = await opened(tmp_path)
    (segment,) = [path for path in tmp_path.rglob("*.log") if path.stat().st_size > 8]
    data = segment.read_bytes()
    segment.write_bytes(data.replace(b"lost", b"gone"))
    assert await handed_over(second) == [b"there"]
    assert "can't be read" in caplog.text
    await second.close()


# -- with the outbox ------------------------------------------------------------------------------


class Scene:
    def __init__(self, store: ResultStore) -> None:
        self.now = 100.0
        self.store = store
        self.outbox = Outbox(lambda _key, _size: None, lambda: self.now, keeper=store)

    def pass_time(self) -> None:
        self.now += DELIVERED_S
        self.outbox.forget_delivered()

    async def send_all(self) -> list[bytes]:
        sent: list[bytes] = []
        while self.outbox.depth:
            batch = await self.outbox.take()
            sent += map(in_one_piece, apart(batch))
            self.outbox.accepted(count_of(batch))
        return sent


async def on_disk(store: ResultStore, count: int) -> bool:
    """Whether so many results are on disk, once the thread has done what it was told."""
    await handed_over(store)
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while not store._queue.empty():
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    return len(store._places) == count


Then = Callable[[Scene], object]


@pytest.mark.parametrize(
    ("then", "left"),
    [
        (lambda scene: None, 2),
        (lambda scene: scene.outbox.stream_closed(), 2),
        (lambda scene: (scene.outbox.stream_closed(), scene.outbox.stream_read_to_end()), 0),
        (lambda scene: scene.pass_time(), 0),
    ],
)
async def test_the_outbox_says_what_has_arrived(tmp_path: Path, then: Then, left: int) -> None:
    scene = Scene(await opened(tmp_path))
    scene.outbox.put_event(1, b"event", 5)
    scene.outbox.put_result(1, b"one")
    scene.outbox.put_result(2, b"two")
    scene.outbox.put_control(b"answer")
    assert await scene.send_all() == [b"two", b"answer", b"event", b"one"]
    then(scene)
    assert await on_disk(scene.store, left)
    await scene.store.close()


async def test_adopted_results_go_first_and_arrive_like_others(tmp_path: Path) -> None:
    first = await opened(tmp_path)
    first.keep(b"old")
    await written(first, 1)
    abandon(first)
    scene = Scene(await opened(tmp_path))

    async def room() -> None:
        pass

    await scene.store.hand_over(scene.outbox.put_kept, room)
    assert await scene.send_all() == [b"old"]
    scene.outbox.stream_closed()
    assert await scene.send_all() == [b"old"]
    scene.pass_time()
    assert await on_disk(scene.store, 0)
    await scene.store.close()
    assert [path for path in tmp_path.rglob("*.log") if path.stat().st_size > 8] == []
