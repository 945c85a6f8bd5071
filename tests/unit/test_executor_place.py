"""As whom executors run and where they may write; what needs root is skipped without it."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor import executor_place
from supervisor.config import ConfigError, Settings, load_settings
from supervisor.executor_place import ExecutorPlace, prepare_place
from supervisor.executor_user import ExecutorUser
from tests.support.other_user import UID

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
SettingsFor = Callable[..., Settings]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "some" / "run"


@pytest.fixture
def settings_for(run_dir: Path) -> SettingsFor:
    return lambda **env: load_settings({"WORKER_RUN_DIR": str(run_dir), **env})


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> list[ExecutorUser]:
    """This Python may be closed to other users, as may pytest's directories; the trial is tested by a real worker."""
    tried: list[ExecutorUser] = []
    monkeypatch.setattr(executor_place, "_try_user", lambda user, _: tried.append(user))
    return tried


def mode(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, stat.S_IMODE(found.st_mode)


def refusal(settings: Settings) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_place(settings, Path("/"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_a_user_the_directory_is_ours_and_the_environment_as_it_is(
    settings_for: SettingsFor, run_dir: Path
) -> None:
    place = prepare_place(settings_for(), Path("/"))
    me = os.geteuid()
    assert place == ExecutorPlace(run_dir / f"uid-{me}")
    assert (mode(run_dir), mode(place.run_dir)) == ((me, 0o700), (me, 0o700))
    environ = {"HOME": "/h", "USER": "u", "A": "b"}
    assert place.inherited(environ) == environ
    assert prepare_place(settings_for(), Path("/")) == place, "a second start finds it there"


@as_root
def test_a_user_gets_a_directory_and_a_home_of_its_own(
    settings_for: SettingsFor, run_dir: Path, untried: list[ExecutorUser]
) -> None:
    place = prepare_place(settings_for(WORKER_EXECUTOR_UID=str(UID)), Path("/"))
    user = ExecutorUser(UID, UID)
    assert place.user == user
    assert untried == [user]
    home = place.run_dir / "home"
    assert [mode(path) for path in (run_dir, place.run_dir, home)] == [(0, 0o711), (UID, 0o700), (UID, 0o700)]
    environ = {
        "HOME": "/root",
        "USER": "root",
        "LOGNAME": "root",
        "MAIL": "m",
        "XDG_RUNTIME_DIR": "/run/user/0",
        "A": "b",
    }
    assert place.inherited(environ) == {"A": "b", "HOME": str(home)}


@as_root
def test_a_known_user_has_its_name_its_groups_and_its_home(
    settings_for: SettingsFor, tmp_path: Path, untried: list[ExecutorUser], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, UID, 5)
    entry = pwd.struct_passwd(("ada", "x", UID, 5, "", str(home), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: entry)
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 44, 107] if name == "ada" else [])
    place = prepare_place(settings_for(WORKER_EXECUTOR_UID=str(UID)), Path("/"))
    assert place.user == ExecutorUser(UID, 5, (44, 107), "ada", home)
    assert place.environment == {"HOME": str(home), "USER": "ada", "LOGNAME": "ada"}
    assert not (place.run_dir / "home").exists()

    os.chown(home, 0, 0)
    place = prepare_place(settings_for(WORKER_EXECUTOR_UID=str(UID), WORKER_EXECUTOR_GID="7"), Path("/"))
    assert place.user == ExecutorUser(UID, 7, (44, 107), "ada", None)
    assert place.environment["HOME"] == str(place.run_dir / "home"), "a home of another's is none"


@as_root
def test_a_volume_that_is_open_to_all_is_closed_to_executors(
    settings_for: SettingsFor, run_dir: Path, untried: list[ExecutorUser]
) -> None:
    run_dir.mkdir(parents=True)
    run_dir.chmod(0o777)
    prepare_place(settings_for(WORKER_EXECUTOR_UID=str(UID)), Path("/"))
    assert mode(run_dir) == (0, 0o755)


@as_root
def test_what_another_user_could_exchange_is_refused(settings_for: SettingsFor, run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    os.chown(run_dir, UID, UID)
    message = refusal(settings_for())
    assert message == (
        f"WORKER_RUN_DIR is {run_dir}, which belongs to uid {UID}, who could exchange what is in it; "
        "expected one of this user's"
    )


def test_a_symbolic_link_is_refused(settings_for: SettingsFor, run_dir: Path, tmp_path: Path) -> None:
    run_dir.parent.mkdir()
    run_dir.symlink_to(tmp_path)
    assert refusal(settings_for()) == f"WORKER_RUN_DIR is {run_dir}, a symbolic link; expected the directory itself"
    assert not (tmp_path / f"uid-{os.geteuid()}").exists()


def test_links_below_are_refused(settings_for: SettingsFor, run_dir: Path, tmp_path: Path) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / f"uid-{os.geteuid()}").symlink_to(tmp_path)
    assert "can't be used: " in refusal(settings_for())


@pytest.mark.parametrize("kind", ["file", "below_a_file"])
def test_what_can_not_be_a_directory(settings_for: SettingsFor, run_dir: Path, kind: str) -> None:
    blocker = run_dir if kind == "file" else run_dir.parent
    blocker.parent.mkdir(parents=True, exist_ok=True)
    blocker.touch()
    assert f"WORKER_RUN_DIR is {run_dir}, which can't be used: " in refusal(settings_for())


@as_root
def test_the_trial_runs_as_the_user(tmp_path: Path) -> None:
    """`/` can be read by all; pytest's directories can't."""
    user = ExecutorUser(UID, UID)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(
        ConfigError, match=f"WORKER_EXECUTOR_UID is {UID}, which must be able to run Python and to read"
    ):
        executor_place._try_user(user, closed)


def test_a_directory_that_another_user_made_is_named_with_what_to_do(
    settings_for: SettingsFor, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /tmp/cozy is when a worker ran as root on this host before. To root nothing is closed, hence the patch."""
    run_dir.mkdir(parents=True)
    run_dir.chmod(0o500)

    def mkdir(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", mkdir)
    said = refusal(settings_for())
    assert said.startswith(
        f"WORKER_RUN_DIR is {run_dir}, where uid {os.geteuid()} may not write ({run_dir} belongs to "
    )
    assert "set WORKER_RUN_DIR to a directory of its own" in said
