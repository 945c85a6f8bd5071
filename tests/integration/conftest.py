"""Shows the logs of a failed test's workers."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.support.worker_process import WorkerProcess

SHOWN_LINES = 200


def pytest_runtest_setup() -> None:
    WorkerProcess.known[:] = [worker for worker in WorkerProcess.known if worker.process.returncode is None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for worker in WorkerProcess.known:
            report.sections.append((f"log of worker {worker.pid}", "\n".join(worker.log[-SHOWN_LINES:])))
    return report
