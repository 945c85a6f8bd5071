"""Which transport a test's workers use, and the logs of a failed test's workers."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.support import worker_process
from tests.support.transports import TRANSPORTS, TransportFactory
from tests.support.worker_process import WorkerProcess

SHOWN_LINES = 200


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not any(hasattr(metafunc.module, name) for name in ("chain", "WorkerProcess", "refused", "torture")):
        return
    chosen = metafunc.config.getoption("transport")
    if chosen is None and metafunc.definition.get_closest_marker("both_transports"):
        chosen = "both"
    if chosen is not None:
        values = list(TRANSPORTS) if chosen == "both" else [chosen]
        metafunc.parametrize("worker_transport", values, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def worker_transport(request: pytest.FixtureRequest) -> str:
    """The transport of the workers that are started from now on; a shared worker's fixture asks for it."""
    worker_process.transport = getattr(request, "param", worker_process.DEFAULT_TRANSPORT)
    return worker_process.transport


@pytest.fixture(params=list(TRANSPORTS))
def make_transport(request: pytest.FixtureRequest) -> TransportFactory:
    """Each transport in turn."""
    return TRANSPORTS[request.param]


def pytest_runtest_setup() -> None:
    WorkerProcess.known[:] = [worker for worker in WorkerProcess.known if worker.process.returncode is None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for worker in WorkerProcess.known:
            report.sections.append((f"log of worker {worker.pid}", "\n".join(worker.log[-SHOWN_LINES:])))
    return report
