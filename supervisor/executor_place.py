"""As whom executors run, and where they may write.

Owns: WORKER_EXECUTOR_UID and WORKER_EXECUTOR_GID, and the directory in WORKER_RUN_DIR that executors get.

1. The user: its group is WORKER_EXECUTOR_GID, else the one that the user database names, else the user's number.
   Its further groups are those of the user database (devices often belong to `video` or `render`), never the
   supervisor's.
2. WORKER_RUN_DIR belongs to the supervisor. In it each user that executors run as has a directory `uid-N` of its own,
   with mode 0700: executors can't exchange what the supervisor walks through.
3. HOME is the user's home when it has one that it owns, else a directory in `uid-N`.

All of it is tried before anything starts: what does not work is a ConfigError.
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from supervisor.config import ConfigError
from supervisor.executor_user import ExecutorUser
from supervisor.settings import Settings

_NEEDED: Final = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}
"""linux/capability.h; to hand directories over, to end executors, to become their user."""
_TRIAL: Final = "import os, sys; os.scandir(sys.argv[1]).close()"
_TRIAL_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class ExecutorPlace:
    """What every executor of this worker is started with."""

    run_dir: Path
    user: ExecutorUser | None = None
    """None: the supervisor's own."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Goes before what the supervisor was started with."""

    def inherited(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ` as it is right for the executors' user."""
        if self.user is None:
            return dict(environ)
        others = {"HOME", "LOGNAME", "MAIL", "USER", "XDG_RUNTIME_DIR"}
        return {**{name: value for name, value in environ.items() if name not in others}, **self.environment}


def prepare_place(settings: Settings, project_root: Path) -> ExecutorPlace:
    """Find the user and make its directory. Raises ConfigError."""
    user = _find_user(settings)
    uid, gid = (os.geteuid(), os.getegid()) if user is None else (user.uid, user.gid)
    run_dir = settings.run_dir / f"uid-{uid}"
    try:
        with ExitStack() as stack:
            parent = stack.enter_context(_run_dir(settings.run_dir, shared=user is not None))
            own = stack.enter_context(_subdirectory(parent, run_dir.name, uid, gid))
            if user is None:
                return ExecutorPlace(run_dir)
            home = user.home or run_dir / "home"
            if user.home is None:
                stack.enter_context(_subdirectory(own, home.name, uid, gid))
    except PermissionError:
        raise ConfigError(_closed_to_us(settings.run_dir)) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"WORKER_RUN_DIR is {settings.run_dir}, which can't be used: {reason}") from None
    _try_user(user, project_root)
    names = {"USER": user.name, "LOGNAME": user.name} if user.name else {}
    return ExecutorPlace(run_dir, user, {"HOME": str(home), **names})


def _closed_to_us(run_dir: Path) -> str:
    """What stands in the way of this user, and what to do: often a worker ran as root on this host before."""
    place = next((path for path in (run_dir, *run_dir.parents) if path.exists()), run_dir)
    try:
        owner = f"{place} belongs to uid {place.stat().st_uid}"
    except OSError as error:
        owner = f"{place}: {error.strerror}"
    remedy = "set WORKER_RUN_DIR to a directory of its own"
    if place == run_dir:
        remedy += ", or remove or chown this one"
    return f"WORKER_RUN_DIR is {run_dir}, where uid {os.geteuid()} may not write ({owner}): {remedy}"


def _find_user(settings: Settings) -> ExecutorUser | None:
    uid, gid = settings.executor_uid, settings.executor_gid
    if uid is None:
        if gid is not None:
            raise ConfigError(f"WORKER_EXECUTOR_GID is {gid} without WORKER_EXECUTOR_UID; expected both, or the latter")
        return None
    if uid == os.geteuid():
        raise ConfigError(f"WORKER_EXECUTOR_UID is {uid}, the supervisor's own user; expected another, or none")
    missing = _missing_capabilities()
    if missing:
        who = f"the supervisor runs as uid {os.geteuid()} without {', '.join(missing)}"
        raise ConfigError(f"WORKER_EXECUTOR_UID is {uid}, but {who}; expected it to be started as root")
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return ExecutorUser(uid, uid if gid is None else gid)
    group = entry.pw_gid if gid is None else gid
    groups = tuple(number for number in os.getgrouplist(entry.pw_name, group) if number != group)
    return ExecutorUser(uid, group, groups, entry.pw_name, _home(entry))


def _home(entry: pwd.struct_passwd) -> Path | None:
    home = Path(entry.pw_dir)
    try:
        return home if home.is_dir() and home.stat().st_uid == entry.pw_uid else None
    except OSError:
        return None


def _missing_capabilities() -> list[str]:
    status = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return [name for name, bit in _NEEDED.items() if not effective >> bit & 1]


@contextmanager
def _run_dir(path: Path, *, shared: bool) -> Iterator[int]:
    """A descriptor of WORKER_RUN_DIR, made if it is not there. Raises ConfigError, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o711 if shared else 0o700, exist_ok=True)
    if path.is_symlink():
        raise ConfigError(f"WORKER_RUN_DIR is {path}, a symbolic link; expected the directory itself")
    with _opened(path) as fd:
        found = os.fstat(fd)
        if found.st_uid not in (0, os.geteuid()):
            owner = f"uid {found.st_uid}, who could exchange what is in it"
            raise ConfigError(f"WORKER_RUN_DIR is {path}, which belongs to {owner}; expected one of this user's")
        if shared and found.st_uid == os.geteuid():
            # Others pass through to their own directory, and can't rename it: a volume's top is often open to all.
            os.fchmod(fd, (stat.S_IMODE(found.st_mode) | 0o111) & ~0o022)
        yield fd


@contextmanager
def _subdirectory(parent: int, name: str, uid: int, gid: int) -> Iterator[int]:
    """A descriptor of a directory that belongs to this user alone. Raises OSError."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    with _opened(name, parent) as fd:
        if os.fstat(fd).st_uid != uid:
            os.fchown(fd, uid, gid)
        os.fchmod(fd, 0o700)
        yield fd


@contextmanager
def _opened(path: str | Path, parent: int | None = None) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def _try_user(user: ExecutorUser, project_root: Path) -> None:
    """Run Python as this user in the project's directory. Raises ConfigError with what it says."""
    try:
        trial = subprocess.run(  # noqa: S603  (this interpreter)
            [sys.executable, "-I", "-S", "-c", _TRIAL, str(project_root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            user=user.uid,
            group=user.gid,
            extra_groups=user.groups,
            env={},
            timeout=_TRIAL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unfit(user, str(error)) from None
    if trial.returncode != 0:
        said = trial.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {trial.returncode}"]
        raise _unfit(user, said[-1])


def _unfit(user: ExecutorUser, reason: str) -> ConfigError:
    needs = "which must be able to run Python and to read the project"
    return ConfigError(f"WORKER_EXECUTOR_UID is {user.uid}, {needs}: {reason}")
