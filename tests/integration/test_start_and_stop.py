"""How a worker starts, why it may not, what it shows of itself, and how it ends."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from gen_worker.testing.mock_orchestrator import EndedBy, MockOrchestrator, RunHandle
from supervisor.exit_codes import ExitCode
from tests.integration.test_models import artifacts
from tests.support.worker_process import (
    PROGRAM,
    Chain,
    WorkerProcess,
    all_of,
    catches,
    chain,
    eventually,
    is_alive,
    refused,
)

NOWHERE = "127.0.0.1:1"
MIB = 2**20

FUNCTION = """
import msgspec
from gen_worker import ActionContext, worker_function

class In(msgspec.Struct):
    text: str = ""

@worker_function()
def f(ctx: ActionContext, payload: In) -> In:
    return payload
"""


def project(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def the_line(log: list[str], *words: str) -> None:
    """Of all lines one says why it can't go on, and none is a traceback's."""
    critical = [line for line in log if " CRITICAL " in line]
    assert len(critical) == 1, log
    assert critical == [line for line in critical if all(word in line for word in words)], critical
    assert not any("Traceback" in line for line in log)


# -- what stops the start: the settings -----------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WORKER_MAX_CONCURRENCY": "many"}, ("WORKER_MAX_CONCURRENCY", "'many'", "expected")),
        ({"HEARTBEAT_INTERVAL_SECONDS": "0"}, ("HEARTBEAT_INTERVAL_SECONDS", "'0'", "expected")),
        ({"SCHEDULER_ADDR": "no port here"}, ("SCHEDULER_ADDR", "'no port here'", "expected")),
        ({"USE_TLS": "maybe"}, ("USE_TLS", "'maybe'", "expected")),
        ({"WORKER_MODEL_ARTIFACTS_JSON": "{"}, ("WORKER_MODEL_ARTIFACTS_JSON", "expected")),
        ({"USE_TLS": "true", "SCHEDULER_CA_FILE": "/nowhere/ca.pem"}, ("SCHEDULER_CA_FILE", "/nowhere/ca.pem")),
        ({"WORKER_FAKE_GPU_COUNT": "2", "WORKER_GPUS": "5"}, ("WORKER_GPUS", "'5'", "0 to 1")),
    ],
)
async def test_a_bad_variable_is_one_line_and_a_code(env: dict[str, str], words: tuple[str, ...]) -> None:
    code, log = await refused(env=env)
    assert code == ExitCode.CONFIG
    (line,) = log
    assert line.startswith("gen-worker-supervisor: ")
    for word in words:
        assert word in line


async def test_a_bad_secret_is_not_shown() -> None:
    code, log = await refused(env={"AUTH_TOKEN": "with a space-s3cr3t"})
    assert code == ExitCode.CONFIG
    (line,) = log
    assert "AUTH_TOKEN" in line
    assert "s3cr3t" not in line


async def test_a_gpu_that_is_not_there_is_named() -> None:
    code, log = await refused(env={"WORKER_GPUS": "GPU-no-such-uuid"})
    assert code == ExitCode.CONFIG
    the_line(log, "GPU-no-such-uuid")


@pytest.mark.parametrize(
    ("argument", "code", "words"),
    [
        ("--help", ExitCode.OK, "WORKER_MAX_CONCURRENCY"),
        ("--version", ExitCode.OK, "gen-worker "),
        ("--verbose", ExitCode.USAGE, "unexpected argument '--verbose'"),
    ],
)
async def test_arguments(argument: str, code: ExitCode, words: str) -> None:
    got, log = await refused(command=(PROGRAM, argument))
    assert got == code
    assert any(words in line for line in log)


def test_a_reader_of_the_help_who_has_seen_enough() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([PROGRAM, "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=50, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (ExitCode.OK, b"")


async def test_a_likely_typing_error_is_pointed_out() -> None:
    async with WorkerProcess(NOWHERE, env={"WORKER_MAX_CONCURENCY": "3"}) as worker:
        await worker.wait_for_log("WARNING", "WORKER_MAX_CONCURENCY", "did you mean WORKER_MAX_CONCURRENCY")


@pytest.mark.parametrize("name", ["supervisor", "executor"])
@pytest.mark.parametrize("command", [(PROGRAM,), (sys.executable, "-m", "gen_worker.entrypoint")])
async def test_a_foreign_package_in_place_of_ours_is_named(
    tmp_path: Path, name: str, command: tuple[str | Path, ...]
) -> None:
    """PyPI has distributions of both names."""
    project(tmp_path, {f"{name}/__init__.py": "print('this is not ours')"})
    code, log = await refused(env={"PYTHONPATH": str(tmp_path)}, command=command)
    assert code == ExitCode.PACKAGE_CLASH
    (line,) = log
    assert f"the package '{name}' is found at {tmp_path / name / '__init__.py'}" in line


async def test_a_tenants_own_folder_of_such_a_name_is_no_clash(tmp_path: Path) -> None:
    folders = dict.fromkeys(("supervisor/__init__.py", "executor/__init__.py"), "raise SystemExit('not ours')")
    root = project(tmp_path, {"tenant_code.py": FUNCTION, **folders})
    async with (
        MockOrchestrator() as orchestrator,
        WorkerProcess(orchestrator.address, tenant=root, modules="tenant_code"),
    ):
        connection = await orchestrator.wait_for_worker()
        assert connection.resources is not None
        assert list(connection.resources.available_functions) == ["f"]


# -- what stops the start: the tenant's code ------------------------------------------------------

BROKEN = {
    "import": ("import torch_is_not_spelled_so\n", ExitCode.BOOT_FAILED, ("broken_import", "broken_import.py:1")),
    "signature": (
        FUNCTION.replace("payload: In", "payload: int"), ExitCode.BOOT_FAILED, ("broken_signature.f", "payload"),
    ),
    "empty": ("x = 1\n", ExitCode.NO_FUNCTIONS, ("broken_empty", "worker_function")),
    "missing": (None, ExitCode.BOOT_FAILED, ("broken_missing", "ModuleNotFoundError")),
}  # fmt: skip


async def test_broken_code_of_the_tenant_is_one_line_and_a_code(tmp_path: Path) -> None:
    """All at once, since each is tried three times, with pauses."""
    root = project(tmp_path, {f"broken_{name}.py": text for name, (text, *_) in BROKEN.items() if text is not None})
    ends = await all_of(*(refused(NOWHERE, tenant=root, modules=f"broken_{name}") for name in BROKEN))
    for (code, log), (_, expected, words) in zip(ends, BROKEN.values(), strict=True):
        assert code == expected, log
        the_line(log, *words)


async def test_a_module_that_kills_its_process_at_import_is_given_up_too(tmp_path: Path) -> None:
    root = project(tmp_path, {"deadly.py": "import os\nprint('about to go', flush=True)\nos.abort()\n"})
    code, log = await refused(tenant=root, modules="deadly")
    assert code == ExitCode.BOOT_FAILED
    assert any("killed by SIGABRT" in line for line in log if " CRITICAL " in line)
    assert sum("about to go" in line for line in log) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("manifest", "manifest.json", "is not one that this version writes")),
        ('{"functions": 3}', ("manifest.json", "$.functions")),
        (None, ("manifest.json", "can't be read")),
    ],
)
async def test_a_bad_manifest_is_one_line(tmp_path: Path, text: str | None, words: tuple[str, ...]) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    code, log = await refused(env={"WORKER_MANIFEST": str(tmp_path / "manifest.json")})
    assert code == ExitCode.CONFIG
    the_line(log, *words)


# -- what stops the start: the scheduler ----------------------------------------------------------


async def test_an_unreachable_scheduler_is_given_up_when_asked_to() -> None:
    code, log = await refused(NOWHERE, env={"MAX_RECONNECT_ATTEMPTS": "3"})
    assert code == ExitCode.SCHEDULER_UNREACHABLE
    the_line(log, "3 failed dials", NOWHERE, "UNAVAILABLE")


async def test_a_token_that_the_scheduler_refuses_is_given_up_when_asked_to() -> None:
    async with MockOrchestrator(required_token="another") as orchestrator:
        code, log = await refused(
            orchestrator.address, env={"MAX_RECONNECT_ATTEMPTS": "2", "AUTH_TOKEN": "s3cr3t-stale-token"}
        )
    assert code == ExitCode.TOKEN_REFUSED
    the_line(log, "UNAUTHENTICATED", orchestrator.address)
    assert sum("refused the token" in line for line in log) == 2
    assert not any("s3cr3t" in line for line in log)


KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def jwks() -> Iterator[str]:
    """The address of a JWKS with one key."""
    entry = jwt.get_algorithm_by_name("RS256").to_jwk(KEY.public_key(), as_dict=True) | {"kid": "k1", "alg": "RS256"}
    body = json.dumps({"keys": [entry]}).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/jwks.json"
        server.shutdown()
        thread.join()


def token(key: Any = KEY, **claims: Any) -> str:
    now = int(time.time())
    body = {"sub": "worker", "iat": now, "exp": now + 3600, "iss": "us", "aud": "workers", **claims}
    return jwt.encode(body, key, algorithm="RS256", headers={"kid": "k1"})


def jwt_settings(jwks: str, token: str) -> dict[str, str]:
    return {
        "AUTH_TOKEN": token, "SCHEDULER_JWKS_URL": jwks,
        "SCHEDULER_JWT_ISSUER": "us", "SCHEDULER_JWT_AUDIENCE": "workers",
    }  # fmt: skip


async def test_a_token_that_the_jwks_does_not_confirm_is_never_shown_to_a_scheduler(jwks: str) -> None:
    tokens = [
        token(exp=int(time.time()) - 60),
        token(OTHER_KEY),
        token(aud="others"),
        token(iss="them"),
        "no-jwt-at-all",
    ]
    async with MockOrchestrator() as orchestrator:
        ends = await all_of(*(refused(orchestrator.address, env=jwt_settings(jwks, bad)) for bad in tokens))
        assert orchestrator.stream_count == 0
    for bad, (code, log) in zip(tokens, ends, strict=True):
        assert code == ExitCode.TOKEN_REFUSED, log
        the_line(log, "the token from AUTH_TOKEN can't be used")
        assert not any(bad in line for line in log)


async def test_a_token_that_the_jwks_confirms_is_used(jwks: str) -> None:
    good = token()
    async with chain(env=jwt_settings(jwks, good)) as worker:
        assert worker.connection.authorization == f"Bearer {good}"
        assert not worker.worker.lines(good)
        assert "cryptography" not in Path(f"/proc/{worker.worker.pid}/maps").read_text(), "10 MiB for one check a dial"


# -- what is served -------------------------------------------------------------------------------


def discover(root: Path) -> dict[str, Any]:
    """Write the manifest as a build does."""
    command = [sys.executable, "-m", "gen_worker.discover"]
    output = subprocess.run(command, cwd=root, capture_output=True, check=True, timeout=60).stdout
    project(root, {".cozy/manifest.json": output.decode()})
    manifest: dict[str, Any] = json.loads(output)
    return manifest


@contextlib.asynccontextmanager
async def served(root: Path, **options: Any) -> Any:
    """A worker for a project, found without USER_MODULES."""
    async with (
        MockOrchestrator() as orchestrator,
        WorkerProcess(orchestrator.address, tenant=root, **{"modules": "", **options}) as worker,
    ):
        await orchestrator.wait_for_worker()
        yield Chain(orchestrator, worker)


@pytest.mark.parametrize(
    ("layout", "with_manifest"),
    [("src/pack/code.py", True), ("src/pack/code.py", False), ("pack/code.py", True), ("flat_code.py", False)],
)
async def test_a_project_is_served_as_discovery_finds_it(tmp_path: Path, layout: str, with_manifest: bool) -> None:
    files = {layout: FUNCTION, "pyproject.toml": '[tool.cozy]\ndeployment = "some-deployment"\n'}
    if "pack" in layout:
        files[str(Path(layout).parent / "__init__.py")] = ""
    root = project(tmp_path, files)
    if with_manifest:
        assert [entry["name"] for entry in discover(root)["functions"]] == ["f"]
    async with served(root) as worker:
        assert list(worker.resources.available_functions) == ["f"]
        assert (await worker.call("f", {"text": "found"}))["text"] == "found"


async def test_the_manifest_goes_before_user_modules(tmp_path: Path) -> None:
    root = project(tmp_path, {"one.py": FUNCTION, "two.py": "x = 1", "pyproject.toml": "[tool.cozy]\n"})
    discover(root)
    async with served(root, modules="two") as worker:
        assert list(worker.resources.available_functions) == ["f"]


async def test_labels_of_the_project_name_its_models(tmp_path: Path) -> None:
    code = (Path(__file__).parent.parent / "tenants" / "basic" / "basic_functions.py").read_text()
    models = '[tool.cozy.models]\nsmall = "cozy:demo/small"\nother = "hf:demo/other"\n'
    root = project(tmp_path / "project", {"models_code.py": code, "pyproject.toml": f"[tool.cozy]\n{models}"})
    refs = json.loads(artifacts(tmp_path, small={}, other={}))
    env = {
        "WORKER_MODEL_ARTIFACTS_JSON": json.dumps({"cozy:demo/small": refs["small"], "hf:demo/other": refs["other"]})
    }
    for with_manifest in (False, True):
        if with_manifest:
            discover(root)
        async with served(root, env=env) as worker:
            used = await worker.call("use_two", {})
            assert (used["text"], used["other"]) == ("weights of small", "weights of other")


# -- what it is -----------------------------------------------------------------------------------


async def test_the_supervisor_is_light_and_has_no_torch() -> None:
    async with chain(executors=2) as worker:
        for _ in range(3):
            await all_of(*(worker.call("echo", {"text": "x" * 1000}) for _ in range(100)))
        assert psutil.Process(worker.worker.pid).memory_info().rss < 60 * MIB
        maps = Path(f"/proc/{worker.worker.pid}/maps").read_text()
        for library in ("torch", "numpy", "transformers", "basic_functions"):
            assert library not in maps
        assert "uvloop" in maps  # it is the right process, and what it has loaded is seen there
        for executor in worker.worker.executors():  # an operator tells them by `ps`
            assert executor.cmdline()[1:4] == ["-P", "-m", "executor"]


# -- the log --------------------------------------------------------------------------------------


async def test_json_log_lines_have_run_and_executor() -> None:
    async with chain(env={"WORKER_LOG_FORMAT": "json"}) as worker:
        await worker.call("say", {"how": "hello from the tenant"})
        failed = await worker.run("fail", {"how": "key"})
        await failed.result()
        await worker.worker.wait_for_log("fail ended internal")
        records = [json.loads(line) for line in worker.worker.log]
    assert all({"ts", "level", "logger", "message"} <= set(record) for record in records)
    (printed,) = [record for record in records if record["message"] == "stdout: hello from the tenant"]
    assert printed["executor"] == "0"
    (failure,) = [record for record in records if record.get("run_id") == failed.run_id]
    assert failure["executor"] == "0"
    assert "/root/secret-path" in failure["message"]


async def test_what_executors_print_is_in_the_log_line_by_line() -> None:
    async with chain() as worker:
        text = "one\n\ntwo\x1b[31m\tthree\rfour\nünï ✓ last"
        await worker.call("say", {"how": text})
        await eventually(lambda: len(worker.worker.lines("[executor 0] ünï ✓ last")) == 2)
        assert len(worker.worker.lines("[executor 0] stdout: one")) == 1
        assert len(worker.worker.lines("[executor 0] stderr: one")) == 1
        assert not worker.worker.lines("\x1b")


SECRETS = {
    "AUTH_TOKEN": "s3cr3t-auth-token", "WORKER_JWT": "s3cr3t-worker-jwt", "COZY_HUB_TOKEN": "s3cr3t-hub-token",
    "HF_TOKEN": "hf_s3cr3tabcdefghijklmnop", "FILE_API_TOKEN": "s3cr3t-file-token",
}  # fmt: skip


async def test_secrets_are_neither_in_the_log_nor_with_the_tenant() -> None:
    async with chain(env={**SECRETS, "COPIED": "x-s3cr3t-hub-token-x"}) as worker:
        for name, value in SECRETS.items():
            assert (await worker.call("environment", {"how": name}))["text"] == ""
            await worker.call("say", {"how": f"the tenant knows {value} all the same"})
        assert (await worker.call("environment", {"how": "COPIED"}))["text"] == ""
        assert (await worker.call("environment", {"how": "WORKER_ID"}))["text"] == "test-worker"
        await eventually(lambda: len(worker.worker.lines("the tenant knows", "all the same")) == 2 * len(SECRETS))
        assert not worker.worker.lines("s3cr3t")


# -- the end --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def leaves_nothing_behind(worker: Chain) -> Any:
    """When the block is over, the worker has ended and so has all that it had started."""
    processes = worker.worker.descendants()
    assert len(processes) >= 1
    yield
    assert worker.worker.process.returncode is not None
    await eventually(lambda: not any(is_alive(process.pid) for process in processes), 1, what="the processes' end")


async def stopped(worker: Chain, number: signal.Signals = signal.SIGTERM) -> None:
    worker.worker.signal(number)
    await worker.worker.wait_for_log(f"stopping: {number.name}")


def assert_busy(handle: RunHandle) -> None:
    (result,) = handle.results
    assert (result.message.error_type, result.message.retryable) == ("retryable", True)
    assert result.message.safe_message == "worker busy"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_worker_stops_at_once(number: signal.Signals) -> None:
    async with chain(executors=2) as worker, leaves_nothing_behind(worker):
        connection = worker.connection
        worker.worker.signal(number)
        assert await worker.worker.exit_code(8) == ExitCode.OK
        assert (await connection.wait_ended()).by is EndedBy.WORKER
        assert not worker.worker.lines(" ERROR ")


async def test_a_worker_without_a_scheduler_stops_at_once() -> None:
    async with WorkerProcess(NOWHERE) as worker:
        await worker.wait_for_log("no stream to")
        worker.signal(signal.SIGTERM)
        assert await worker.exit_code(8) == ExitCode.OK


async def test_sigterm_lets_running_runs_end_and_takes_no_more(tmp_path: Path) -> None:
    async with chain(executors=2) as worker, leaves_nothing_behind(worker):
        running = [await worker.started("wait_for_file", {"how": str(tmp_path / "go")}) for _ in range(4)]
        limited = [await worker.started("one_at_a_time", {"seconds": 0.5}) for _ in range(2)]
        waiting = await worker.run("one_at_a_time", {"seconds": 0})
        stream = await worker.run("ticks", {"seconds": 0.5})
        await worker.orchestrator.wait_until(lambda: stream.deltas)
        await stopped(worker)
        late = await worker.run("echo", {"text": "too late"})
        await late.result()
        assert_busy(late)
        await waiting.result()
        assert_busy(waiting)
        (tmp_path / "go").touch()
        for handle in (*running, *limited, stream):
            assert (await handle.result()).success
        assert [delta["index"] for delta in stream.deltas] == list(range(50))
        assert await worker.worker.exit_code() == ExitCode.OK
        assert len(late.results) == len(waiting.results) == 1


async def test_what_outlasts_the_drain_time_is_answered_and_ended() -> None:
    async with (
        chain(executors=2, env={"WORKER_DRAIN_TIMEOUT_SECONDS": "0.3"}) as worker,
        leaves_nothing_behind(worker),
    ):
        handles = [await worker.started(name, {"seconds": 30}) for name in ("wait", "asleep", "swallow", "hold_gil")]
        stopped_at = time.monotonic()
        await stopped(worker)
        for handle in handles:
            await handle.result()
            assert_busy(handle)
        assert await worker.worker.exit_code() == ExitCode.OK
        assert 0.3 <= time.monotonic() - stopped_at < 10


async def test_a_second_signal_ends_it_at_once() -> None:
    async with chain(executors=2) as worker, leaves_nothing_behind(worker):
        for name in ("wait", "hold_gil", "swallow"):
            await worker.started(name, {"seconds": 30})
        await stopped(worker)
        stopped_at = time.monotonic()
        worker.worker.signal(signal.SIGTERM)
        assert await worker.worker.exit_code() == ExitCode.FORCED_STOP
        assert time.monotonic() - stopped_at < 5


async def test_a_scheduler_that_is_away_during_the_drain_gets_its_results_when_it_is_back(tmp_path: Path) -> None:
    async with chain() as worker, leaves_nothing_behind(worker):
        handle = await worker.started("wait_for_file", {"how": str(tmp_path / "go")})
        await worker.orchestrator.stop()
        await worker.worker.wait_for_log("stream 1", "ended")
        await stopped(worker)
        (tmp_path / "go").touch()
        await worker.orchestrator.start()
        assert (await handle.output())["text"] == "seen"
        assert await worker.worker.exit_code() == ExitCode.OK


async def test_a_stream_that_breaks_while_the_worker_leaves_takes_no_result_with_it() -> None:
    """What went out and was not read is sent again on another stream, before the worker is gone."""
    async with chain() as worker:
        (executor,) = worker.worker.executors()
        handle = await worker.started("wait", {"seconds": 0.2})
        connection = worker.connection
        connection.pause_reading()
        worker.worker.signal(signal.SIGTERM)
        # Executors leave once nothing runs; the result has gone out, and the worker waits until it is read.
        await eventually(lambda: not is_alive(executor.pid))
        connection.drop()
        assert await worker.worker.exit_code() == ExitCode.OK
        await worker.orchestrator.wait_until(lambda: not worker.orchestrator.connections)
        assert handle.done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_before_the_worker_serves_stops_it_too(number: signal.Signals) -> None:
    """Most of a start is imports."""
    async with WorkerProcess(NOWHERE) as worker:
        await eventually(lambda: catches(worker.pid, signal.SIGTERM), what="it has a handler")
        processes = worker.descendants()
        worker.signal(number)
        assert await worker.exit_code(10) == ExitCode.OK
        assert worker.lines(f"{number.name} before it served") or worker.lines(f"stopping: {number.name}")
        await eventually(lambda: not any(is_alive(process.pid) for process in processes), 1)


def test_a_signal_before_the_worker_serves_stops_it_also_when_nobody_reads_its_stderr() -> None:
    """As when who started it was killed. It comes anywhere, also where an OSError is no harm."""
    program = """if True:
        import os, signal
        from gen_worker.entrypoint import stop_on_signals
        stop_on_signals()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except OSError:
            raise SystemExit(7)
    """
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        assert subprocess.run([sys.executable, "-c", program], stderr=write_end, check=False).returncode == 0
    finally:
        os.close(write_end)


async def test_a_second_signal_does_not_wait_for_executors_that_do_not_leave() -> None:
    async with chain(executors=2, env={"WORKER_LOG_LEVEL": "info"}) as worker, leaves_nothing_behind(worker):
        for executor in worker.worker.executors():
            executor.suspend()
        await stopped(worker)
        worker.worker.signal(signal.SIGTERM)
        assert await worker.worker.exit_code() == ExitCode.FORCED_STOP


async def test_a_stop_while_executors_start_leaves_nothing_behind() -> None:
    async with WorkerProcess(NOWHERE, env={"WORKER_EXECUTORS": "3"}) as worker:
        await worker.wait_for_log("executor 2 started")
        processes = worker.descendants()
        worker.signal(signal.SIGTERM)
        assert await worker.exit_code(10) == ExitCode.OK
        await eventually(lambda: not any(is_alive(process.pid) for process in processes), 1)
