"""What the commands share that start a worker on this machine."""

from __future__ import annotations

from gen_worker.errors import ProjectError


def refuse_clash() -> None:
    """Raises ProjectError when the packages `supervisor` or `executor` that would be started are not ours."""
    from gen_worker.entrypoint import find_clash

    clash = find_clash()
    if clash is not None:
        raise ProjectError(clash)


def child_environment() -> dict[str, str]:
    """This process's environment, for a worker that is to see what its developer set."""
    from supervisor.config import process_environment

    return dict(process_environment())
