"""The OOM killer is told from other SIGKILLs by the cgroup's count."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from supervisor.child import ExitCause
from supervisor.oom import OomCounter, OomWatch, find_counter

KILLED = ExitCause(-signal.SIGKILL, "")
V2_EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill {}\noom_group_kill 0\n"
V1_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def by_cgroup(root: Path, text: str) -> None:
    write(root / "proc/self/cgroup", text)


class TestWhichFile:
    def test_version_2(self, tmp_path: Path) -> None:
        by_cgroup(tmp_path, "0::/kubepods/pod1/c2\n")
        path = write(tmp_path / "sys/fs/cgroup/kubepods/pod1/c2/memory.events", V2_EVENTS.format(4))
        write(tmp_path / "sys/fs/cgroup/memory.events", V2_EVENTS.format(99))
        counter = find_counter(tmp_path)
        assert counter == OomCounter(path, "the cgroup")
        assert counter is not None
        assert counter.read() == 4

    def test_version_2_in_a_container_that_sees_the_path_of_its_host(self, tmp_path: Path) -> None:
        by_cgroup(tmp_path, "0::/system.slice/docker-abc.scope\n")
        path = write(tmp_path / "sys/fs/cgroup/memory.events", V2_EVENTS.format(1))
        assert find_counter(tmp_path) == OomCounter(path, "the cgroup")

    def test_version_1_goes_before_a_unified_hierarchy_without_controllers(self, tmp_path: Path) -> None:
        by_cgroup(tmp_path, "12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/x\n0::/docker/abc\n")
        path = write(tmp_path / "sys/fs/cgroup/memory/docker/abc/memory.oom_control", V1_CONTROL.format(2))
        write(tmp_path / "sys/fs/cgroup/unified/docker/abc/memory.events", V2_EVENTS.format(0))
        assert find_counter(tmp_path) == OomCounter(path, "the cgroup")

    def test_version_1_in_a_container_that_sees_the_path_of_its_host(self, tmp_path: Path) -> None:
        by_cgroup(tmp_path, "4:memory:/docker/abc\n")
        path = write(tmp_path / "sys/fs/cgroup/memory/memory.oom_control", V1_CONTROL.format(2))
        assert find_counter(tmp_path) == OomCounter(path, "the cgroup")

    def test_a_kernel_that_does_not_count_per_cgroup(self, tmp_path: Path) -> None:
        by_cgroup(tmp_path, "4:memory:/docker/abc\n")
        write(tmp_path / "sys/fs/cgroup/memory/docker/abc/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n")
        path = write(tmp_path / "proc/vmstat", "nr_free_pages 5\noom_kill 7\n")
        assert find_counter(tmp_path) == OomCounter(path, "the host")

    @pytest.mark.parametrize("text", ["", "garbage\n", "::\n", "0::/a\n1:memory\n"])
    def test_nothing_to_be_found(self, tmp_path: Path, text: str) -> None:
        assert find_counter(tmp_path) is None
        by_cgroup(tmp_path, text)
        assert find_counter(tmp_path) is None

    def test_this_machine(self) -> None:
        """Linux from 4.13 on counts at least for the host."""
        counter = find_counter()
        assert counter is not None
        count = counter.read()
        assert count is not None
        assert count >= 0


class TestExplain:
    @pytest.fixture
    def events(self, tmp_path: Path) -> Path:
        return write(tmp_path / "memory.events", V2_EVENTS.format(5))

    @pytest.fixture
    def watch(self, events: Path) -> OomWatch:
        return OomWatch(OomCounter(events, "the cgroup"))

    def test_it_is_named_when_the_count_rose(self, watch: OomWatch, events: Path) -> None:
        events.write_text(V2_EVENTS.format(6))
        words = str(watch.explain(KILLED))
        assert words == "killed by SIGKILL (the kernel's OOM killer: the cgroup ran out of memory)"

    def test_it_is_not_when_it_did_not(self, watch: OomWatch) -> None:
        assert watch.explain(KILLED) is KILLED

    @pytest.mark.parametrize(
        "cause",
        [ExitCause(-signal.SIGKILL, "it ignored the cancel"), ExitCause(-signal.SIGSEGV, ""), ExitCause(9, "")],
    )
    def test_a_kill_of_ours_and_other_ends_are_left_alone(
        self, watch: OomWatch, events: Path, cause: ExitCause
    ) -> None:
        events.write_text(V2_EVENTS.format(6))
        assert watch.explain(cause) is cause
        assert "OOM" in str(watch.explain(KILLED))  # and use up nothing

    def test_one_oom_kill_explains_one_death(self, watch: OomWatch, events: Path) -> None:
        events.write_text(V2_EVENTS.format(7))
        watch.sample()
        assert ["OOM" in str(watch.explain(KILLED)) for _ in range(3)] == [True, True, False]
        watch.sample()
        assert watch.explain(KILLED) is KILLED

    def test_an_old_oom_kill_of_another_process_explains_nothing(self, watch: OomWatch, events: Path) -> None:
        events.write_text(V2_EVENTS.format(6))
        watch.sample()
        watch.sample()
        assert watch.explain(KILLED) is KILLED

    def test_one_that_was_sampled_before_the_death_was_noticed_still_does(self, watch: OomWatch, events: Path) -> None:
        events.write_text(V2_EVENTS.format(6))
        watch.sample()
        assert "OOM" in str(watch.explain(KILLED))

    def test_a_file_that_goes_away_explains_nothing(self, watch: OomWatch, events: Path) -> None:
        events.unlink()
        watch.sample()
        assert watch.explain(KILLED) is KILLED

    def test_without_a_counter_nothing_is_known(self) -> None:
        watch = OomWatch(None)
        watch.sample()
        assert watch.explain(KILLED) is KILLED

    async def test_it_samples_by_itself(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("supervisor.oom.SAMPLE_S", 0.001)
        watch = OomWatch(OomCounter(tmp_path / "memory.events", "the cgroup"))
        write(tmp_path / "memory.events", V2_EVENTS.format(6))
        watch.start(asyncio.get_running_loop())
        async with asyncio.timeout(5):
            while watch._older < 6:
                await asyncio.sleep(0.001)
        assert watch.explain(KILLED) is KILLED
        watch.stop()


@pytest.mark.skipif(
    not os.environ.get("GEN_WORKER_TEST_CGROUP"),
    reason="GEN_WORKER_TEST_CGROUP names no memory cgroup that the test may make a child of",
)
def test_a_real_oom_kill_is_counted() -> None:
    """Needs root and a cgroup that was set up for it, such as /sys/fs/cgroup/gen-worker-test."""
    import subprocess
    import sys

    group = Path(os.environ["GEN_WORKER_TEST_CGROUP"]) / f"oom-{os.getpid()}"
    group.mkdir()
    try:
        unified = (group / "memory.max").exists()
        (group / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(32 * 2**20))
        counter = OomCounter(group / ("memory.events" if unified else "memory.oom_control"), "the cgroup")
        watch = OomWatch(counter)
        eats = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); bytearray(2**28)"
        done = subprocess.run([sys.executable, "-c", eats], check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL
        assert "OOM killer" in str(watch.explain(ExitCause(done.returncode, "")))
    finally:
        group.rmdir()
