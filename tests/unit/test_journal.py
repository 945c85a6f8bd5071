"""The journal: what was whole survives a death at any byte, nothing else comes back, and the disk does not fill."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from supervisor import journal as module
from supervisor.journal import MAGIC, Journal


def contents(journal: Journal) -> dict[int, bytes]:
    return {result_id: journal.read(result_id) for result_id in journal.ids}


def adopted(directory: Path) -> Journal:
    journal = Journal.adopt(directory)
    assert journal is not None
    return journal


def die(journal: Journal) -> None:
    """Let go of everything as a death does: nothing is written, nothing removed."""
    for segment in journal._segments:
        os.close(segment.fd)
    os.close(journal._lock_fd)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(module, "DEAD_BYTES", 4000)


def test_results_are_found_by_the_next_supervisor(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "worker-1")
    journal.keep(1, b"one")
    journal.keep(2, b"")
    journal.keep(3, b"three" * 100_000)
    journal.forget([1])
    assert journal.read(2) == b""
    die(journal)
    again = adopted(journal.directory)
    assert contents(again) == {2: b"", 3: b"three" * 100_000}
    again.forget([2, 3, 4711])
    die(again)
    third = adopted(journal.directory)
    assert third.ids == []
    third.close()
    assert list(tmp_path.iterdir()) == []


def test_the_directory_of_a_live_supervisor_is_not_touched(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "worker")
    journal.keep(1, b"r")
    assert Journal.adopt(journal.directory) is None
    journal.close()
    assert contents(adopted(journal.directory)) == {1: b"r"}
    assert Journal.adopt(tmp_path / "never.was") is None


def test_others_can_not_read_it(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "new" / "parent", "worker")
    journal.keep(1, b"r")
    (segment,) = journal.directory.iterdir()
    assert [path.stat().st_mode & 0o077 for path in (segment, journal.directory, tmp_path / "new" / "parent")] == [
        0
    ] * 3
    die(journal)


def test_a_directory_that_another_starting_supervisor_takes_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, seen = module._lock, []

    def taken_away_once(directory: Path) -> int | None:
        seen.append(directory)
        if len(seen) == 1:
            directory.rmdir()
        return lock(directory)

    monkeypatch.setattr(module, "_lock", taken_away_once)
    journal = Journal.create(tmp_path, "worker")
    assert journal.directory == seen[1]
    journal.close()


def test_a_lock_on_what_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "worker.1"
    directory.mkdir()
    flock = fcntl.flock

    def removed_before(fd: int, operation: int) -> None:
        directory.rmdir()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    assert Journal.adopt(directory) is None


@pytest.mark.parametrize("foreign", ["notes.txt", "x.log", "00000009.log"])
def test_foreign_files_are_no_results_and_are_not_lost(tmp_path: Path, foreign: str) -> None:
    journal = Journal.create(tmp_path, "worker")
    journal.keep(1, b"r")
    die(journal)
    (journal.directory / foreign).write_bytes(b"something else")
    again = adopted(journal.directory)
    assert contents(again) == {1: b"r"}
    again.forget([1])
    again.close()
    assert (journal.directory / foreign).read_bytes() == b"something else"


@pytest.mark.usefixtures("small_segments")
def test_segments_go_as_their_results_arrive(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "worker")
    for number in range(500):
        journal.keep(number, b"%d" % number + b"x" * 200)
        if number >= 10:
            journal.forget([number - 10])
        assert journal.size < 10 * 300 + 3 * 1000
    assert len(list(journal.directory.iterdir())) <= 5
    assert journal.ids == list(range(490, 500))
    journal.forget(journal.ids)
    assert journal.size == len(MAGIC)
    journal.keep(500, b"r")
    die(journal)
    assert contents(adopted(journal.directory)) == {500: b"r"}


@pytest.mark.usefixtures("small_segments")
def test_a_result_that_nobody_takes_does_not_hold_on_to_all_that_follow(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "worker")
    journal.keep(0, b"stays")
    for number in range(1, 1000):
        journal.keep(number, b"x" * 200)
        journal.forget([number])
        journal.keep(1000 + number, b"y" * 200)
        journal.forget([1000 + number])
        assert journal.size < 4000 + 3 * 1000
    die(journal)
    assert contents(adopted(journal.directory)) == {0: b"stays"}


# -- disks that are full ------------------------------------------------------------------------


class FullDisk:
    """Lets `room` bytes be written, then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 10**9
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, fd: int, data: memoryview, offset: int) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._pwrite(fd, data[: self.room], offset)
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


@pytest.mark.parametrize("room", range(40))
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, disk: FullDisk, room: int) -> None:
    journal = Journal.create(tmp_path, "worker")
    journal.keep(1, b"before")
    disk.room = room
    with pytest.raises(OSError, match="No space"):
        journal.keep(2, b"the disk has no room for this one")
    disk.room = 10**9
    journal.keep(3, b"after")
    die(journal)
    assert contents(adopted(journal.directory)) == {1: b"before", 3: b"after"}


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("room", [0, 3, 8])
def test_a_segment_that_can_not_be_begun(tmp_path: Path, disk: FullDisk, room: int) -> None:
    journal = Journal.create(tmp_path, "worker")
    journal.keep(1, b"x" * 1000)
    disk.room = room
    with pytest.raises(OSError, match="No space"):
        journal.keep(2, b"r")
    disk.room = 10**9
    journal.keep(3, b"after")
    die(journal)
    again = adopted(journal.directory)
    assert again.ids == [1, 3]
    again.forget([1, 3])
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_said_to_have_arrived_is_said_later(tmp_path: Path, disk: FullDisk) -> None:
    journal = Journal.create(tmp_path, "worker")
    for number in range(4):
        journal.keep(number, b"r")
    disk.room = 0
    with pytest.raises(OSError, match="No space"):
        journal.forget([1])
    disk.room = 10**9
    journal.forget([2])
    die(journal)
    again = adopted(journal.directory)
    assert again.ids == [0, 3]
    disk.room = 0
    again.forget([0, 3])  # to have nothing left takes no room
    assert again.size == len(MAGIC)
    die(again)
    assert adopted(journal.directory).ids == []


# -- deaths at any byte -------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.binary(max_size=60)), max_size=12)


def record_of(payload: bytes) -> bytes:
    """A message that looks like a record itself."""
    return b"".join(module._kept_record(99, payload))


@settings(deadline=None, max_examples=30)
@given(STEPS, st.booleans())
def test_a_death_at_any_byte(steps: list[tuple[bool, int, bytes]], disguised: bool) -> None:
    """Cut a segment anywhere: what was complete is there, and what follows can be appended."""
    with tempfile.TemporaryDirectory() as parent:
        journal = Journal.create(Path(parent), "worker")
        states: list[tuple[int, dict[int, bytes]]] = [(journal.size, {})]
        expected: dict[int, bytes] = {}
        journal.keep(1000, b"stays, so that nothing is cleared")
        expected[1000] = b"stays, so that nothing is cleared"
        states.append((journal.size, dict(expected)))
        for number, (keeps, which, payload) in enumerate(steps):
            if keeps:
                expected[number] = record_of(payload) if disguised else payload
                journal.keep(number, expected[number])
            elif which in expected:
                del expected[which]
                journal.forget([which])
            states.append((journal.size, dict(expected)))

        def before(cut: int) -> dict[int, bytes]:
            return next((state for size, state in reversed(states) if size <= cut), {})

        (segment,) = journal.directory.iterdir()
        whole = segment.read_bytes()
        assert len(whole) == states[-1][0]
        for cut in range(len(whole) + 1):
            check_cut(journal.directory, segment, whole[:cut], before(cut))
        die(journal)


def check_cut(original: Path, segment: Path, data: bytes, expected: dict[int, bytes]) -> None:
    directory = original.parent / "copy"
    directory.mkdir()
    (directory / segment.name).write_bytes(data)
    journal = adopted(directory)
    assert contents(journal) == expected
    journal.keep(7_000_000, b"appended")
    die(journal)
    again = adopted(directory)
    assert contents(again) == {**expected, 7_000_000: b"appended"}
    die(again)
    shutil.rmtree(directory)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.integers(1, 255))
def test_changed_bytes_never_give_a_result_that_was_not_kept(payload: bytes, position: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as parent:
        journal = Journal.create(Path(parent), "worker")
        journal.keep(1, b"first")
        journal.keep(2, payload)
        (segment,) = journal.directory.iterdir()
        data = bytearray(segment.read_bytes())
        data[position % len(data)] ^= change
        segment.write_bytes(data)
        die(journal)
        again = adopted(journal.directory)
        assert contents(again).items() <= {1: b"first", 2: payload}.items()
        die(again)


class JournalMachine(RuleBasedStateMachine):
    """Any order of keeping, forgetting, full disks and deaths, over many segments."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "SEGMENT_BYTES", 200)
        self.patch.setattr(module, "DEAD_BYTES", 600)
        self.disk = FullDisk(self.patch)
        self.parent = Path(tempfile.mkdtemp())
        self.journal = Journal.create(self.parent, "worker")
        self.expected: dict[int, bytes] = {}
        self.doubtful: dict[int, bytes] = {}
        """Forgotten, but the disk was too full to say so: a death may bring them back."""
        self.next_id = 0

    def teardown(self) -> None:
        die(self.journal)
        shutil.rmtree(self.parent)
        self.patch.undo()

    @rule(size=st.integers(0, 300))
    def keep(self, size: int) -> None:
        self.next_id += 1
        message = b"%d " % self.next_id + b"x" * size
        self.journal.keep(self.next_id, message)
        self.expected[self.next_id] = message

    @rule(size=st.integers(0, 300), room=st.integers(0, 320))
    def keep_on_a_full_disk(self, size: int, room: int) -> None:
        self.next_id += 1
        message = b"%d " % self.next_id + b"x" * size
        self.disk.room = room
        try:
            self.journal.keep(self.next_id, message)
        except OSError:
            pass
        finally:
            self.disk.room = 10**9
        if self.next_id in self.journal.ids:
            self.expected[self.next_id] = message

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), full=st.booleans())
    def forget(self, data: st.DataObject, full: bool) -> None:
        gone = data.draw(st.lists(st.sampled_from(sorted(self.expected)), max_size=4, unique=True))
        self.disk.room = 0 if full else 10**9
        try:
            self.journal.forget(gone)
        except OSError:
            self.doubtful |= {result_id: self.expected[result_id] for result_id in gone}
        else:
            self.doubtful = {}
        finally:
            self.disk.room = 10**9
        for result_id in gone:
            del self.expected[result_id]

    @rule()
    def die(self) -> None:
        die(self.journal)
        self.journal = adopted(self.journal.directory)
        found = contents(self.journal)
        back = found.keys() - self.expected.keys()
        assert back <= self.doubtful.keys()
        self.journal.forget(back)
        self.doubtful = {}

    @invariant()
    def has_what_it_should(self) -> None:
        assert contents(self.journal) == self.expected

    @invariant()
    def is_bounded(self) -> None:
        alive = sum(len(message) + 17 for message in self.expected.values())
        assert self.journal.size <= 2 * alive + 600 + 3 * 520


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(deadline=None, max_examples=40, stateful_step_count=40)
