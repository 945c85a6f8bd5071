"""`gen-worker download` and `gen-worker models`: the model files of this machine, by the worker's own engine.

Owns: nothing; settings and cache directories are the worker's, from the same environment variables. A running worker
may share the cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from supervisor.transfers.messages import ModelFiles, ReplyBody, RequestBody, TransferSettings
    from supervisor.transfers.service import OnProgress

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

models = typer.Typer(
    help="List the models on this machine's disk, or remove one.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


def download(
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="cozy:org/repo[:tag] or hf:org/repo[@revision].")],
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Download models into the cache, where a worker finds them.

    COZY_HUB_URL, COZY_HUB_TOKEN, HF_TOKEN, WORKER_MODEL_CACHE_DIR and the COZY_HF_* settings hold as for the worker.
    What was interrupted is resumed.
    """
    import asyncio

    from supervisor.transfers.messages import FetchModel, ModelFiles

    _check(refs)

    async def run() -> list[ModelFiles]:
        with _bars(hidden=as_json) as progress_of:
            async with _engine(settings) as ask:
                found = await asyncio.gather(*(ask(FetchModel(ref), progress_of(ref)) for ref in refs))
        return [each for each in found if isinstance(each, ModelFiles)]

    settings = _settings()
    with _errors():
        found = asyncio.run(run())
    if as_json:
        typer.echo(json.dumps([_shown(model) for model in found], indent=2))
        return
    for model in found:
        typer.echo(model.root_dir)


@models.callback()
def list_models(context: typer.Context, as_json: AsJson = False) -> None:  # noqa: FBT002
    """List the models on this machine's disk with their sizes and when they were last used."""
    import asyncio

    from supervisor.transfers.messages import ListModels, ModelList

    if context.invoked_subcommand is not None:
        return
    with _errors():
        reply = asyncio.run(_ask(_settings(), ListModels()))
    assert isinstance(reply, ModelList)  # noqa: S101  (by the message's definition)
    found = sorted(reply.models, key=lambda model: -model.last_used)
    if as_json:
        typer.echo(json.dumps([_shown(model) for model in found], indent=2))
    elif not found:
        typer.echo("no models on disk")
    else:
        _print_table(found)


@models.command("rm")
def remove(ref: Annotated[str, typer.Argument(metavar="REF", help="As the list shows it.")]) -> None:
    """Remove a model from disk; refused while a worker uses it."""
    import asyncio

    from supervisor.transfers.messages import ModelRemoved, RemoveModel

    _check([ref])

    with _errors():
        reply = asyncio.run(_ask(_settings(), RemoveModel(ref)))
    assert isinstance(reply, ModelRemoved)  # noqa: S101  (by the message's definition)
    typer.echo(f"freed {_size(reply.freed_bytes)}")


def _check(refs: list[str]) -> None:
    """A word that is no ref ends the command before anything is begun."""
    from gen_worker.errors import ValidationError
    from gen_worker.model_refs import parse_model_ref

    try:
        for ref in refs:
            parse_model_ref(ref)
    except ValidationError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None


async def _ask(settings: TransferSettings, request: RequestBody) -> ReplyBody:
    async with _engine(settings) as ask:
        return await ask(request, lambda *_: None)


@asynccontextmanager
async def _engine(
    settings: TransferSettings,
) -> AsyncIterator[Callable[[RequestBody, OnProgress], Awaitable[ReplyBody]]]:
    """The handlers of the transfer process, in this one."""
    from supervisor.transfers.models import model_handlers

    async with AsyncExitStack() as stack:
        handlers = await model_handlers(settings, stack, lambda _: None)

        async def ask(request: RequestBody, on_progress: OnProgress) -> ReplyBody:
            return await handlers[type(request)](request, on_progress)

        yield ask


def _settings() -> TransferSettings:
    from supervisor.config import ConfigError, load_settings, process_environment
    from supervisor.devices import DeviceError, open_probe
    from supervisor.wiring import transfer_settings

    environ = process_environment()
    try:
        settings = load_settings(environ)
        probe = open_probe(
            gpus=settings.gpus,
            visible=environ.get("CUDA_VISIBLE_DEVICES"),
            executors=settings.executors,
            fake_count=settings.fake_gpu_count,
            fake_memory_bytes=settings.fake_gpu_memory_bytes,
            fake_name=settings.fake_gpu_name,
            held=lambda _: 0,
        )
    except (ConfigError, DeviceError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None
    return transfer_settings(settings, probe.devices)


@contextmanager
def _errors() -> Iterator[None]:
    from gen_worker.errors import WorkerError

    try:
        yield
    except WorkerError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None


@contextmanager
def _bars(*, hidden: bool) -> Iterator[Any]:
    """A function from a ref to what shows its progress on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:

        def progress_of(ref: str) -> OnProgress:
            bar = progress.add_task(ref, total=None)

            def tell(done_bytes: int, total_bytes: int, _bytes_per_s: float) -> None:
                progress.update(bar, completed=done_bytes, total=total_bytes or None)

            return tell

        yield progress_of


def _print_table(found: list[ModelFiles]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "size", "last used", "path", box=None, pad_edge=False)
    for model in found:
        table.add_row(model.ref, _size(model.size_bytes), _ago(model.last_used), model.root_dir)
    Console(soft_wrap=True).print(table)


def _shown(model: ModelFiles) -> dict[str, Any]:
    return {
        "ref": model.ref,
        "path": model.root_dir,
        "size_bytes": model.size_bytes,
        "last_used": model.last_used,
        "metadata": model.metadata,
    }


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"


def _ago(moment: float) -> str:
    seconds = time.time() - moment
    for name, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {name} ago"
    return "just now"
