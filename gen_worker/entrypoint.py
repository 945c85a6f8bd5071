"""`gen-worker-supervisor` and `python -m gen_worker.entrypoint`: the container's entrypoint.

Owns: the check that the packages `supervisor` and `executor` are ours (PyPI has distributions that install packages
of these names, and one of them first on the path would be run in our place), and what a signal does until the worker
has handlers of its own: an orderly stop, since nothing runs yet that would have to be drained.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final, NoReturn

SIBLINGS: Final = ("supervisor", "executor")
EXIT_PACKAGE_CLASH: Final = 5
"""supervisor.exit_codes.ExitCode.PACKAGE_CLASH, which can't be imported before this check."""


def find_clash() -> str | None:
    """A line that says which package is not ours and what to remove, or None."""
    home = Path(__file__).resolve().parent.parent
    for name in SIBLINGS:
        spec = PathFinder.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found is not None and found.parent.parent == home:
            continue
        where = found or "nowhere"
        others = [dist for dist in packages_distributions().get(name, []) if dist != "gen-worker"]
        remedy = f"pip uninstall {' '.join(others)}" if others else "remove it from the path"
        return f"the package {name!r} is found at {where}, which is not gen-worker's: {remedy}"
    return None


def stop_on_signals() -> None:
    """From here on SIGTERM and SIGINT end the process with 0, at once. As PID 1 it would not even notice them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, _frame: object) -> NoReturn:
    # Not by SystemExit, nor by an error of the write: where a signal comes that is anybody's to catch.
    with suppress(OSError):  # who read it may be gone, which may be why the signal came
        os.write(2, f"gen-worker-supervisor: {signal.Signals(number).name} before it served: it leaves\n".encode())
    os._exit(0)


def main() -> int:
    """Run the supervisor; returns its exit code."""
    stop_on_signals()
    clash = find_clash()
    if clash is not None:
        print(f"gen-worker-supervisor: {clash}", file=sys.stderr)  # noqa: T201
        return EXIT_PACKAGE_CLASH
    from supervisor.main import main as supervise  # noqa: PLC0415  (only now is it surely ours)

    return supervise()


if __name__ == "__main__":
    sys.exit(main())
