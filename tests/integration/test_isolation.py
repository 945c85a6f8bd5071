"""What tenant code can see of the worker's secrets, as the supervisor's user and as one of its own."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from gen_worker.testing.mock_orchestrator import MockOrchestrator
from tests.support.other_user import UID, require_root, worker_command
from tests.support.worker_process import (
    PROGRAM,
    WAIT_S,
    Chain,
    WorkerProcess,
    eventually,
    is_alive,
    refused,
)

TENANT = "isolation"
MODULE = "isolation_functions"
SECRETS = {
    "AUTH_TOKEN": "secret-of-auth-token",
    "WORKER_JWT": "secret-of-worker-jwt",
    "COZY_HUB_TOKEN": "secret-of-cozy-hub",
    "HF_TOKEN": "secret-of-hugging-face",
    "FILE_API_TOKEN": "secret-of-file-api",
}
SUPERVISORS_OWN = ("environ", "mem", "maps", "fd", "auxv")


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that every user can reach; those of pytest can't be."""
    with tempfile.TemporaryDirectory(prefix="gen-worker-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


async def look_around(env: Mapping[str, str], **options: Any) -> tuple[dict[str, Any], WorkerProcess]:
    """What a tenant function says of its circumstances, and the worker (which has ended) for its log."""
    async with (
        MockOrchestrator() as orchestrator,
        WorkerProcess(orchestrator.address, tenant=TENANT, modules=MODULE, env=env, **options) as worker,
    ):
        await orchestrator.wait_for_worker(timeout=WAIT_S)
        seen = await Chain(orchestrator, worker).call("look_around", {})
        if os.geteuid() == 0:  # to all others the supervisor's are closed
            seen["shared"] = sorted(set(links(worker.pid)) & set(seen["fds"]))
        return seen, worker


def links(pid: int) -> list[str]:
    return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def readable(seen: Mapping[str, Any]) -> str:
    """All that a tenant function could read."""
    return repr((seen["environment"], {name: text for name, text in seen["supervisor"].items() if name != "mem"}))


async def test_executors_have_no_secret_and_proc_shows_none(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("secret-in-a-file")
    env = {
        **SECRETS,
        "AUTH_TOKEN_FILE": str(token_file),
        "HUGGING_FACE_HUB_TOKEN": "secret-of-an-older-name",
        "A_COPY": f"Bearer {SECRETS['AUTH_TOKEN']}",
        "HARMLESS": "not so secret",
        "WORKER_RUN_DIR": str(tmp_path / "run"),
    }
    seen, worker = await look_around(env)

    assert "secret-" not in readable(seen)
    assert str(token_file) not in readable(seen)
    assert seen["environment"]["HARMLESS"] == "not so secret"
    if os.geteuid() == 0:
        # To root the entry stays readable, so that what is missing was overwritten.
        assert "HARMLESS=not so secret" in seen["supervisor"]["environ"]
    else:
        assert seen["supervisor"]["environ"] == "PermissionError"
    assert "secret-" not in "\n".join(worker.log)
    assert seen["status"]["NoNewPrivs"] == "1"


async def test_an_executor_inherits_no_descriptor_but_its_own(tmp_path: Path) -> None:
    require_root()
    seen, _ = await look_around({"WORKER_RUN_DIR": str(tmp_path)})
    # Both ends of a pipe, and both holders of shared memory, have one name; the sockets of a pair have two.
    kinds = sorted(name.partition(":")[0].removesuffix(" (deleted)") for name in seen["shared"])
    anonymous = [kind for kind in kinds if kind.startswith("anon_inode")]  # epoll and the like: a kind, not an object
    assert [kind for kind in kinds if kind not in anonymous] == ["/dev/null", "/memfd", "/memfd", "pipe", "pipe"]


async def test_a_supervisor_of_an_ordinary_user_is_closed_to_its_executors(open_path: Path) -> None:
    """As in the container image: supervisor and executors are one user, which is not root."""
    command: list[str | Path] = [PROGRAM]
    if os.geteuid() == 0:
        *namespace, program = worker_command(open_path)
        command = [*namespace, "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", program]
        open_path.chmod(0o777)
    env = {**SECRETS, "HOME": str(open_path), "WORKER_RUN_DIR": str(open_path / "run")}
    seen, worker = await look_around(env, command=command)
    if os.geteuid() == 0:
        assert seen["uids"] == [UID] * 3
    assert {seen["supervisor"][name] for name in SUPERVISORS_OWN} == {"PermissionError"}
    assert "secret-" not in readable(seen)
    assert "secret-" not in "\n".join(worker.log)
    assert not worker.lines("WARNING")


class TestAnotherUser:
    async def test_it_is_that_user_before_tenant_code_is_imported(self, open_path: Path) -> None:
        run_dir = open_path / "run"
        env = {**SECRETS, "WORKER_EXECUTOR_UID": str(UID), "WORKER_RUN_DIR": str(run_dir), "MAIL": "/var/mail/root"}
        seen, worker = await look_around(env, command=worker_command(open_path))

        assert seen["imported_as"] == UID
        assert seen["uids"] == [UID] * 3
        assert seen["gids"] == [UID] * 3
        assert seen["groups"] == []
        for capabilities in ("CapEff", "CapPrm", "CapAmb"):
            assert int(seen["status"][capabilities], 16) == 0
        assert seen["status"]["NoNewPrivs"] == "1"
        home = run_dir / f"uid-{UID}" / "home"
        assert seen["environment"]["HOME"] == str(home)
        assert seen["home_is_writable"]
        assert seen["stderr_can_be_opened"]
        assert not {"USER", "LOGNAME", "MAIL"} & seen["environment"].keys()
        assert {name: seen["supervisor"][name] for name in SUPERVISORS_OWN} == dict.fromkeys(
            SUPERVISORS_OWN, "PermissionError"
        )
        assert "secret-" not in readable(seen)
        assert "secret-" not in "\n".join(worker.log)
        modes = [(entry.stat().st_uid, stat.S_IMODE(entry.stat().st_mode)) for entry in (run_dir, home.parent, home)]
        assert modes == [(0, 0o711), (UID, 0o700), (UID, 0o700)]
        assert (home / "written-by-a-test").stat().st_uid == UID

    async def test_a_known_user_brings_its_groups_and_the_group_can_be_chosen(self, open_path: Path) -> None:
        command = worker_command(open_path)
        entry = next((entry for entry in pwd.getpwall() if entry.pw_name == "nobody"), None)
        if entry is None:
            pytest.skip("there is no user nobody here")
        env = {
            "WORKER_EXECUTOR_UID": str(entry.pw_uid),
            "WORKER_EXECUTOR_GID": "54321",
            "WORKER_RUN_DIR": str(open_path / "run"),
        }
        seen, _ = await look_around(env, command=command)
        assert seen["uids"] == [entry.pw_uid] * 3
        assert seen["gids"] == [54321] * 3
        assert set(seen["groups"]) == set(os.getgrouplist("nobody", 54321)) - {54321}
        assert (seen["environment"]["USER"], seen["environment"]["LOGNAME"]) == ("nobody", "nobody")

    async def test_one_that_holds_the_gil_dies_with_the_supervisor(self, open_path: Path) -> None:
        env = {"WORKER_EXECUTOR_UID": str(UID), "WORKER_RUN_DIR": str(open_path / "run")}
        async with (
            MockOrchestrator() as orchestrator,
            WorkerProcess(
                orchestrator.address, tenant=TENANT, modules=MODULE, env=env, command=worker_command(open_path)
            ) as worker,
        ):
            await orchestrator.wait_for_worker(timeout=WAIT_S)
            await Chain(orchestrator, worker).started("hold_gil", {})
            everyone = worker.descendants()
            assert [psutil.Process(each.pid).uids().real for each in worker.executors()] == [UID]
            worker.process.kill()
            await eventually(lambda: not any(is_alive(each.pid) for each in everyone), 1.0, "all of them are gone")

    async def test_a_user_that_cannot_run_python_is_refused(self, open_path: Path) -> None:
        require_root()
        closed = open_path / "closed"
        closed.mkdir(mode=0o700)
        (closed / "tenant").mkdir()
        env = {"WORKER_EXECUTOR_UID": str(UID), "WORKER_RUN_DIR": str(open_path / "run")}
        code, log = await refused(tenant=closed / "tenant", env=env, command=worker_command(open_path))
        assert code == 78
        assert len(log) == 1
        assert f"WORKER_EXECUTOR_UID is {UID}, which must be able to run Python and to read the project" in log[0]
        assert "Permission denied" in log[0]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WORKER_EXECUTOR_GID": "5"}, "WORKER_EXECUTOR_GID is 5 without WORKER_EXECUTOR_UID"),
        ({"WORKER_EXECUTOR_UID": str(os.geteuid())}, "the supervisor's own user; expected another"),
        ({"WORKER_RUN_DIR": "/proc/nowhere"}, "WORKER_RUN_DIR is /proc/nowhere, which can't be used: "),
    ],
)
async def test_what_can_not_be_is_one_line(env: dict[str, str], words: str) -> None:
    code, log = await refused(env=env)
    assert (code, len(log)) == (78, 1)
    assert words in log[0]


async def test_only_root_changes_users(open_path: Path) -> None:
    """Started by a user without rights, or by root that gave them up."""
    env = {"WORKER_EXECUTOR_UID": str(UID), "WORKER_RUN_DIR": str(open_path / "run")}
    # To root the bounding set is what it may have after an exec.
    gives_up = ["setpriv", "--bounding-set", "-setuid"] if os.geteuid() == 0 else []
    code, log = await refused(env=env, command=[*gives_up, PROGRAM])
    assert (code, len(log)) == (78, 1)
    assert f"WORKER_EXECUTOR_UID is {UID}, but the supervisor runs as uid {os.geteuid()} without " in log[0]
    assert "CAP_SETUID; expected it to be started as root" in log[0]
