"""What a torture is asked for, and what follows from that alone.

Owns: the options, the worker's environment, and the command that does the same again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from tempfile import gettempdir
from typing import Final, Self

from gen_worker.modules import find_modules
from gen_worker.testing.torture import functions

EXECUTORS: Final = 3
GRACE_S: Final = 1.0
"""WORKER_CANCEL_GRACE_SECONDS."""
DRAIN_S: Final = 10.0
"""WORKER_DRAIN_TIMEOUT_SECONDS."""
DEFAULT_EXECUTOR_BYTES: Final = 200 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`project` None: the built-in functions. `executor_memory_bytes` 0: not judged."""

    seed: int
    seconds: float
    log_file: Path
    project: Path | None = None
    payloads: Path | None = None
    executor_memory_bytes: int = DEFAULT_EXECUTOR_BYTES

    @classmethod
    def of(
        cls,
        *,
        seed: int | None,
        seconds: float,
        project: Path | None,
        payloads: Path | None,
        log_file: Path | None,
        executor_memory_mib: int,
    ) -> Self:
        """From what a person gave: a seed and a log file are made up when there is none."""
        chosen = SystemRandom().getrandbits(32) if seed is None else seed
        return cls(
            seed=chosen,
            seconds=seconds,
            log_file=log_file or Path(gettempdir()) / f"gen-worker-torture-{chosen}.log",
            project=project,
            payloads=payloads,
            executor_memory_bytes=executor_memory_mib * 2**20,
        )


def keeps_results(options: Options) -> bool:
    """Whether results are kept on disk: with every other seed. Only then may the supervisor itself be killed."""
    return options.project is None and options.seed % 2 == 1


def worker_environment(options: Options, addresses: Sequence[str], folder: Path) -> dict[str, str]:
    """What goes over the worker's environment. `addresses` are the schedulers', `folder` is for files of runs."""
    overrides = {
        "SCHEDULER_ADDR": addresses[0],
        "SCHEDULER_ADDRS": ",".join(addresses[1:]),
        **dict.fromkeys(("AUTH_TOKEN", "AUTH_TOKEN_FILE", "WORKER_JWT", "SCHEDULER_JWKS_URL", "USE_TLS"), ""),
        "MAX_RECONNECT_ATTEMPTS": "0",
        "RECONNECT_DELAY": "0.1",
        "RECONNECT_MAX_DELAY": "0.5",
        "RECONNECT_JITTER_SECONDS": "0.05",
        "HEARTBEAT_INTERVAL_SECONDS": "2",
        "WORKER_ID": "tortured",
        "WORKER_HTTP_ADDR": "",
        "WORKER_RUN_DIR": str(folder / "run"),
        "WORKER_OUTBOX_DIR": str(folder / "outbox") if keeps_results(options) else "",
        "WORKER_EXECUTORS": str(EXECUTORS),
        "WORKER_CANCEL_GRACE_SECONDS": str(GRACE_S),
        "WORKER_DRAIN_TIMEOUT_SECONDS": str(DRAIN_S),
        "WORKER_MAX_CONCURRENCY": "0",
        "WORKER_LOG_FORMAT": "json",
        "WORKER_LOG_LEVEL": "info",
    }
    if options.project is None:
        # Simulated devices: the same number of executors on every host, and none of them near a real GPU.
        model = folder / functions.MODEL
        model.mkdir()
        (model / functions.WEIGHTS_FILE).write_text(functions.MODEL)
        overrides |= {
            "WORKER_MODEL_ARTIFACTS_JSON": json.dumps({functions.MODEL: {"root_dir": str(model)}}),
            "USER_MODULES": functions.__name__,
            "WORKER_MANIFEST": "",
            "WORKER_EXECUTOR_UID": "",
            "WORKER_EXECUTOR_GID": "",
            "WORKER_FAKE_GPU_COUNT": str(EXECUTORS),
        }
    else:
        overrides["USER_MODULES"] = ",".join(find_modules(options.project))
    return overrides


def command_line(options: Options) -> str:
    """The command that does it again."""
    words = ["gen-worker", "torture", "--seed", str(options.seed), "--minutes", f"{options.seconds / 60:g}"]
    for name, path in (("--project", options.project), ("--payloads", options.payloads)):
        if path is not None:
            words += [name, str(path)]
    default = 0 if options.project is not None else DEFAULT_EXECUTOR_BYTES
    if options.executor_memory_bytes != default:
        words += ["--memory-mib", str(options.executor_memory_bytes // 2**20)]
    return shlex.join(words)
