"""A transfer process with handlers that do what the ref of a FetchModel says: `verb` or `verb argument`.

Started as `python -P -m transfer_child`: the real process around a table of its own. What it did is in the file
`model_cache_dir/log`, a line for each step, so that a test sees it across incarnations.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from gen_worker.errors import AuthError
from supervisor.transfers.__main__ import run
from supervisor.transfers.messages import (
    FetchModel,
    ListModels,
    ModelFiles,
    ModelList,
    ModelRemoved,
    ModelsRemoved,
    RemoveModel,
    TransferSettings,
    Upward,
)
from supervisor.transfers.service import Handlers, OnProgress


async def open_handlers(  # noqa: C901  (one case per order)
    settings: TransferSettings, stack: AsyncExitStack, send: Callable[[Upward], None]
) -> Handlers:
    path = Path(settings.model_cache_dir) / "log"

    def note(line: str) -> None:
        with path.open("a") as file:
            file.write(f"{line}\n")

    async def fetch(request: FetchModel, progress: OnProgress) -> ModelFiles | ModelList:  # noqa: C901
        verb, _, argument = request.ref.partition(" ")
        note(request.ref)
        match verb:
            case "answer":
                progress(1, 2, 3.0)
            case "token":
                return files(request.ref, settings.hub_token)
            case "environment":
                return files(request.ref, repr(dict(os.environ)))
            case "wait":
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    note("canceled")
                    raise
            case "refuse":
                raise AuthError(argument)
            case "defect":
                raise LookupError(argument)
            case "wrong":
                return ModelList(())
            case "die_until":  # a number of attempts
                if path.read_text().splitlines().count(request.ref) < int(argument):
                    print("last words", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
            case "removed":
                send(ModelsRemoved(("a", "b")))
            case _:
                raise AssertionError(verb)
        return files(request.ref, argument)

    async def list_models(request: ListModels, progress: OnProgress) -> ModelList:
        return ModelList((files("x", ""),))

    async def remove(request: RemoveModel, progress: OnProgress) -> ModelRemoved:
        note("remove")
        os.kill(os.getpid(), signal.SIGKILL)
        return ModelRemoved(0)

    stack.callback(note, "closed")
    if settings.hub_url == "broken":
        raise RuntimeError("no disk")
    return {FetchModel: fetch, ListModels: list_models, RemoveModel: remove}


def files(ref: str, root_dir: str) -> ModelFiles:
    return ModelFiles(ref, root_dir, {}, 0, 0, 0.0, "")


if __name__ == "__main__":
    run(open_handlers)
