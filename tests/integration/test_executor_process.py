"""A real executor process over a real pipe: what it answers, streams, refuses, and how it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from gen_worker.pipe.arena import create_arena
from gen_worker.pipe.messages import (
    EVENT_OVERHEAD_BYTES,
    Credit,
    Event,
    Fatal,
    Free,
    InjectionInfo,
    LoadModel,
    ModelLoaded,
    ModelUnloaded,
    Result,
    Shutdown,
    UnloadModel,
    encode,
)
from tests.support.executor_process import TENANT, ExecutorProcess, wait_until


@pytest.fixture(scope="module")
def shared() -> Iterator[ExecutorProcess]:
    """One process for all tests that leave it alive."""
    with ExecutorProcess() as executor:
        executor.start()
        yield executor


@pytest.fixture
def own() -> Iterator[ExecutorProcess]:
    """A process that the test may end."""
    with ExecutorProcess() as executor:
        executor.start()
        yield executor


def failure(result: Result) -> tuple[str, str, bool]:
    assert result.failure is not None, result
    return result.failure.error_type, result.failure.safe_message, result.failure.retryable


def deltas(executor: ExecutorProcess, key: int) -> list[tuple[str, object]]:
    return [(event.type, msgspec.json.decode(event.payload)) for event in executor.events.get(key, [])]


# -- start ----------------------------------------------------------------------------------------


def test_ready_says_functions_and_versions() -> None:
    with ExecutorProcess() as executor:
        ready = executor.start()
    functions = {function.name: function for function in ready.functions}
    assert functions["echo"].mode == "sync"
    assert functions["stream_async"].mode == "async_generator"
    assert functions["realtime"].mode == "websocket"
    assert functions["where"].max_concurrency == 3
    assert functions["echo"].max_concurrency == 0
    assert msgspec.json.decode(functions["stream"].delta_schema)
    assert functions["use_engine"].injections == (
        InjectionInfo("engine", "exec_functions.Engine", "deployment", "main"),
    )
    assert ready.versions["python"].startswith("3.")
    assert ("torch" in ready.versions) == (find_spec("torch") is not None)
    assert ready.protocol == executor.init.protocol


def test_boot_imports_no_torch(shared: ExecutorProcess) -> None:
    assert shared.call("where")["torch_imported"] is False


def test_prints_reach_the_parent_line_by_line(shared: ExecutorProcess) -> None:
    wait_until(lambda: "imported" in shared.stdout)


def test_empty_modules_are_looked_for(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "found_here.py").write_text((TENANT / "exec_functions.py").read_text())
    with ExecutorProcess(tmp_path, ()) as executor:
        assert "echo" in {function.name for function in executor.start().functions}
        assert executor.call("echo", {"text": "hi"}) == {"text": "hi"}


@pytest.mark.parametrize(
    ("source", "reason", "words"),
    [
        ("import no_such_thing_here", "import", ("broken_tenant", "no_such_thing_here", "broken_tenant.py:1")),
        ("import sys; sys.exit(3)", "import", ("broken_tenant", "SystemExit: 3")),
        ("x = 1", "no_functions", ("broken_tenant",)),
        (
            "from gen_worker import *\n@worker_function()\ndef f(ctx: ActionContext) -> int:\n    return 1\n",
            "signature",
            ("broken_tenant.f", "payload"),
        ),
    ],
)
def test_a_broken_project_is_named(tmp_path: Path, source: str, reason: str, words: tuple[str, ...]) -> None:
    (tmp_path / "broken_tenant.py").write_text(source)
    with ExecutorProcess(tmp_path, ("broken_tenant",)) as executor:
        fatal = executor.fatal()
        assert executor.exit_code() == 3
    assert fatal.reason == reason
    assert "\n" not in fatal.message
    for word in words:
        assert word in fatal.message


def test_another_protocol_is_refused() -> None:
    with ExecutorProcess(protocol=999) as executor:
        fatal = executor.fatal()
        assert executor.exit_code() == 3
    assert fatal.reason == "protocol"
    assert "999" in fatal.message


def test_the_loop_of_a_blocked_import_ends_with_the_pipe(tmp_path: Path) -> None:
    (tmp_path / "slow_tenant.py").write_text("print('importing')\nimport time\ntime.sleep(60)\n")
    with ExecutorProcess(tmp_path, ("slow_tenant",)) as executor:
        executor.send(executor.init)
        wait_until(lambda: "importing" in executor.stdout)
        executor.socket.shutdown(2)
        assert executor.process.wait(10) == 4


# -- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["echo", "echo_async"])
def test_echo(shared: ExecutorProcess, function: str) -> None:
    assert shared.call(function, {"text": "héllo"}) == {"text": "héllo"}


def test_many_runs_at_once(shared: ExecutorProcess) -> None:
    keys = {shared.run(("echo", "echo_async")[n % 2], {"text": str(n)}): str(n) for n in range(500)}
    for key, text in keys.items():
        assert shared.output(shared.result(key)) == {"text": text}


def test_what_the_context_says(shared: ExecutorProcess) -> None:
    found = shared.call("where", run_id="r-1", tenant_id="t-1", user_id="u-1", timeout_ms=1234)
    assert found["thread"].startswith("run-")
    assert (found["run_id"], found["tenant_id"], found["user_id"], found["timeout_ms"]) == ("r-1", "t-1", "u-1", 1234)


def test_blocking_functions_get_all_the_threads(shared: ExecutorProcess) -> None:
    keys = [shared.run("meet") for _ in range(8)]
    for key in keys:
        shared.output(shared.result(key))


def test_large_payloads_go_through_shared_memory(shared: ExecutorProcess) -> None:
    data = os.urandom(3 * 1024 * 1024)
    for function in ("echo_data", "echo_view"):
        shared.freed.clear()
        result = shared.result(shared.run(function, {"data": data}))
        assert not isinstance(result.output, bytes)
        assert shared.output(result) == {"data": data}
        wait_until(lambda: bool(shared.freed) or shared.wait(Free) is not None)


def test_a_payload_that_does_not_fit_names_the_field(shared: ExecutorProcess) -> None:
    kind, message, retryable = failure(shared.result(shared.run("echo", {"text": 7})))
    assert (kind, retryable) == ("validation", False)
    assert "text" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("value", ("validation", "why", False)),
        ("retry", ("retryable", "why", True)),
        ("memory", ("resource", "out of memory", False)),
        ("other", ("internal", "internal error", False)),
    ],
)
def test_errors_are_mapped(shared: ExecutorProcess, text: str, expected: tuple[str, str, bool]) -> None:
    result = shared.result(shared.run("fail", {"text": text}))
    assert failure(result) == expected
    assert result.failure is not None
    assert "exec_functions.py" in result.failure.detail


def test_a_wrong_output_is_the_functions_fault(shared: ExecutorProcess) -> None:
    kind, message, _ = failure(shared.result(shared.run("wrong")))
    assert kind == "fatal"
    assert "Nothing" in message
    assert "Text" in message


def test_a_keyboard_interrupt_is_only_that_runs_failure(shared: ExecutorProcess) -> None:
    assert failure(shared.result(shared.run("interrupt")))[0] == "internal"
    assert shared.call("echo", {"text": "on"}) == {"text": "on"}


def test_unknown_function_and_websocket_are_refused(shared: ExecutorProcess) -> None:
    assert failure(shared.result(shared.run("nobody")))[0] == "fatal"
    kind, message, _ = failure(shared.result(shared.run("realtime")))
    assert kind == "fatal"
    assert "websocket" in message


def test_no_file_store(shared: ExecutorProcess) -> None:
    kind, message, _ = failure(shared.result(shared.run("save")))
    assert kind == "internal"
    assert "no file store" in message


def test_output_limit_names_limit_and_size() -> None:
    with ExecutorProcess(max_output_bytes=100) as executor:
        executor.start()
        kind, message, _ = failure(executor.result(executor.run("echo", {"text": "x" * 200})))
        assert kind == "validation"
        assert "WORKER_MAX_OUTPUT_BYTES=100" in message
        assert "208 bytes" in message
        assert executor.call("echo", {"text": "x"}) == {"text": "x"}


# -- streams and events ---------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["stream", "stream_async"])
def test_a_stream(shared: ExecutorProcess, function: str) -> None:
    key = shared.run(function, {"count": 3})
    result = shared.result(key)
    assert (result.output, result.failure) == (b"", None)
    assert deltas(shared, key) == [
        ("output.delta", {"text": "0"}),
        ("output.delta", {"text": "1"}),
        ("output.delta", {"text": "2"}),
        ("output.completed", {}),
    ]


def test_a_stream_from_a_plain_iterator_with_bytes(shared: ExecutorProcess) -> None:
    key = shared.run("stream_list", {"count": 2})
    shared.result(key)
    assert deltas(shared, key)[0] == ("output.delta", {"data": "AP8="})


def test_a_broken_stream_says_so_and_fails(shared: ExecutorProcess) -> None:
    key = shared.run("stream_broken")
    kind, message, _ = failure(shared.result(key))
    assert (kind, message) == ("validation", "broken at <url>")
    assert deltas(shared, key)[1:] == [("output.error", {"error_type": "validation", "message": "broken at <url>"})]


def test_a_wrong_delta(shared: ExecutorProcess) -> None:
    assert failure(shared.result(shared.run("stream_wrong")))[0] == "fatal"


@pytest.mark.parametrize("function", ["stream", "stream_async"])
def test_delta_limits(function: str, tmp_path: Path) -> None:
    with ExecutorProcess(max_delta_events=2, max_delta_bytes=100) as executor:
        executor.start()
        path = str(tmp_path / function)
        kind, message, _ = failure(executor.result(executor.run(function, {"count": 3, "path": path})))
        assert kind == "validation"
        assert "WORKER_MAX_OUTPUT_DELTA_EVENTS=2" in message
        assert Path(path).read_text() == "closed"
        kind, message, _ = failure(executor.result(executor.run(function, {"count": 1, "size": 100})))
        assert kind == "validation"
        assert "WORKER_MAX_OUTPUT_DELTA_BYTES=100" in message


@pytest.mark.parametrize("function", ["stream", "stream_async", "emit"])
def test_the_window_bounds_what_is_under_way(shared: ExecutorProcess, function: str) -> None:
    """The events stop at the window, go on as credits come, and other runs are not held up."""
    window, count = 1000, 40
    key = shared.run(function, {"count": count, "size": 200}, window=window)
    taken = shared.wait(Event, lambda event: event.key == key)
    assert shared.call("echo", {"text": "meanwhile"}) == {"text": "meanwhile"}
    assert shared.call("echo_async", {"text": "meanwhile"}) == {"text": "meanwhile"}
    under_way = sum(len(event.payload) + EVENT_OVERHEAD_BYTES for event in shared.events[key])
    assert 0 < under_way <= window
    received = 1
    while received < count:
        shared.send(Credit(key, len(taken.payload) + EVENT_OVERHEAD_BYTES))
        taken = shared.wait(Event, lambda event: event.key == key)
        received += 1
    assert shared.result(key).failure is None


def test_a_coroutines_emit_goes_over_before_it_blocks(shared: ExecutorProcess) -> None:
    window, count = 1000, 40
    key = shared.run("emit_async", {"count": count, "size": 200}, window=window)
    credited = 0
    for _ in range(count):
        taken = shared.wait(Event, lambda event: event.key == key)
        under_way = sum(len(event.payload) + EVENT_OVERHEAD_BYTES for event in shared.events[key]) - credited
        assert under_way <= 4 * window
        credited += len(taken.payload) + EVENT_OVERHEAD_BYTES
        shared.send(Credit(key, len(taken.payload) + EVENT_OVERHEAD_BYTES))
    assert shared.result(key).failure is None


def test_an_event_larger_than_the_window_goes_alone(shared: ExecutorProcess) -> None:
    key = shared.run("emit", {"count": 2, "size": 5000}, window=100)
    first = shared.wait(Event, lambda event: event.key == key)
    shared.send(Credit(key, len(first.payload) + EVENT_OVERHEAD_BYTES))
    assert shared.result(key).failure is None
    assert len(shared.events[key]) == 2


def test_an_event_over_the_frame_cap_is_an_error_of_the_run(shared: ExecutorProcess) -> None:
    kind, message, _ = failure(shared.result(shared.run("emit", {"count": 1, "size": 9 * 1024 * 1024})))
    assert kind == "validation"
    assert "my.event" in message


def test_progress_and_log(shared: ExecutorProcess) -> None:
    key = shared.run("report")
    shared.result(key)
    (first, progress), (second, line) = deltas(shared, key)
    assert (first, second) == ("job.progress", "job.log")
    assert isinstance(progress, dict)
    assert isinstance(line, dict)
    assert (progress["progress"], progress["stage"]) == (0.5, "half")
    assert (line["message"], line["level"]) == ("hello", "warning")


def test_no_event_follows_the_result(shared: ExecutorProcess) -> None:
    key = shared.run("keep_context")
    shared.result(key)
    assert "after the end" in shared.call("use_kept")["text"]
    assert key not in shared.events


# -- cancel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["canceled", "timeout"])
@pytest.mark.parametrize(
    ("function", "payload"),
    [
        ("cooperate", {}),
        ("cleanup_error", {}),
        ("spin", {"text": ""}),
        ("spin", {"text": "stubborn"}),
        ("sleep_async", {"text": ""}),
        ("sleep_async", {"text": "stubborn"}),
    ],
)
def test_cancel(shared: ExecutorProcess, function: str, payload: dict[str, str], cause: str) -> None:
    key = shared.run(function, payload)
    shared.event(key, "job.log")
    shared.cancel(key, cause)  # type: ignore[arg-type]
    result = shared.result(key)
    assert failure(result)[0] == cause
    if function == "cleanup_error":
        assert result.failure is not None
        assert "lost my state" in result.failure.detail
    assert shared.call("echo", {"text": "alive"}) == {"text": "alive"}


@pytest.mark.parametrize("function", ["stream", "stream_async", "emit", "emit_async"])
def test_cancel_ends_the_wait_for_room_and_closes_the_generator(
    shared: ExecutorProcess, function: str, tmp_path: Path
) -> None:
    path = tmp_path / "closed"
    key = shared.run(function, {"count": 1000, "size": 100, "path": str(path)}, window=50)
    shared.wait(Event, lambda event: event.key == key)
    started = time.monotonic()
    shared.cancel(key)
    assert failure(shared.result(key))[0] == "canceled"
    assert time.monotonic() - started < 10
    if function.startswith("stream"):
        assert path.read_text() == "closed"
        assert deltas(shared, key)[-1] == ("output.error", {"error_type": "canceled", "message": "canceled"})


def test_cancel_of_a_run_that_waits_for_a_thread_is_answered_at_once(tmp_path: Path) -> None:
    with ExecutorProcess(threads=1) as executor:
        executor.start()
        first = executor.run("block", {"text": str(tmp_path / "go")})
        executor.event(first, "job.log")
        second = executor.run("echo_data", {"data": b"x" * 2_000_000})
        executor.cancel(second)
        assert failure(executor.result(second))[0] == "canceled"
        executor.wait(Free)
        (tmp_path / "go").touch()
        executor.output(executor.result(first))
        assert executor.call("echo", {"text": "on"}) == {"text": "on"}


def test_cancel_of_an_unknown_key_is_ignored(shared: ExecutorProcess) -> None:
    shared.cancel(10**9)
    assert shared.call("echo", {"text": "on"}) == {"text": "on"}


def test_a_function_may_cancel_itself(shared: ExecutorProcess) -> None:
    assert failure(shared.result(shared.run("cancel_myself")))[0] == "canceled"


def test_each_run_is_answered_once_whenever_the_cancel_comes(shared: ExecutorProcess) -> None:
    keys = []
    for number in range(400):
        keys.append(shared.run("tick"))
        if number % 2:
            shared.cancel(keys[-1])
    for key in keys:
        result = shared.result(key)
        assert result.failure is None or result.failure.error_type == "canceled"
    assert shared.call("echo", {"text": "on"}) == {"text": "on"}
    assert not [message for message in shared.inbox if isinstance(message, Result) and message.key in keys]


# -- models ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> LoadModel:
    (tmp_path / "words.txt").write_text("good words")
    files = {"words": str(tmp_path / "words.txt")}
    return LoadModel("cozy:o/r:latest", "exec_functions.Engine", str(tmp_path), files, {"k": "v"})


def test_load_use_unload(own: ExecutorProcess, model: LoadModel) -> None:
    own.send(model)
    loaded = own.wait(ModelLoaded)
    assert (loaded.model_id, loaded.type_name, loaded.failure) == (model.model_id, model.type_name, None)
    assert loaded.seconds > 0
    run = {"models": {"engine": model.model_id}}
    first = own.call("use_engine", **run)["text"]
    assert first.startswith("good words on cpu")
    assert own.call("use_engine", **run)["text"] == first, "one object serves all calls"
    own.send(UnloadModel(model.model_id))
    assert own.wait(ModelUnloaded).failure is None
    result = own.result(own.run("use_engine", **run))
    assert failure(result)[:2] == ("internal", "internal error")
    assert result.failure is not None
    assert model.model_id in result.failure.detail


def test_artifacts_are_injected_as_files(own: ExecutorProcess, model: LoadModel) -> None:
    own.send(msgspec.structs.replace(model, type_name="gen_worker.injection.ModelArtifacts"))
    assert own.wait(ModelLoaded).failure is None
    found = own.call("use_files", {"text": "any"}, models={"files": model.model_id})
    assert found == {"text": f"{model.model_id} good words v"}


@pytest.mark.parametrize("fault", ["directory", "type", "exit", "file"])
def test_a_failed_load_says_what_and_why(own: ExecutorProcess, model: LoadModel, fault: str) -> None:
    faults: dict[str, dict[str, Any]] = {
        "directory": {"root_dir": "/nonexistent"},
        "type": {"type_name": "no.Such"},
        "file": {"files": {}},
        "exit": {},
    }
    changed = faults[fault]
    if fault == "exit":
        Path(model.files["words"]).write_text("sys.exit")
    own.send(msgspec.structs.replace(model, **changed))
    loaded = own.wait(ModelLoaded)
    assert loaded.failure is not None
    for word in (model.model_id, loaded.type_name, changed.get("root_dir", model.root_dir)):
        assert word in loaded.failure.detail
    assert str(model.root_dir) not in loaded.failure.safe_message
    assert own.call("echo", {"text": "on"}) == {"text": "on"}


def test_a_configured_loader_is_used(tmp_path: Path, model: LoadModel) -> None:
    (tmp_path / "own_loader.py").write_text(
        "def load(ctx, artifacts):\n    from exec_functions import Engine\n    return Engine('configured', 'nowhere')\n"
        "def wrong(ctx, artifacts):\n    return 'a string'\n"
    )
    (tmp_path / "exec_functions.py").write_text((TENANT / "exec_functions.py").read_text())
    with ExecutorProcess(tmp_path, runtime_loaders={"exec_functions.Engine": "own_loader:load"}) as executor:
        executor.start()
        executor.send(model)
        assert executor.wait(ModelLoaded).failure is None
        assert executor.call("use_engine", models={"engine": model.model_id})["text"].startswith("configured")
    with ExecutorProcess(tmp_path, runtime_loaders={"exec_functions.Engine": "own_loader:wrong"}) as executor:
        executor.start()
        executor.send(model)
        loaded = executor.wait(ModelLoaded)
        assert loaded.failure is not None
        assert "builtins.str" in loaded.failure.detail
        assert "exec_functions.Engine" in loaded.failure.detail


# -- ends -----------------------------------------------------------------------------------------


def test_shutdown(own: ExecutorProcess) -> None:
    own.send(Shutdown())
    assert own.exit_code() == 0


def test_shutdown_does_not_wait_for_a_stuck_thread(own: ExecutorProcess) -> None:
    own.event(own.run("spin", {"text": "stubborn"}), "job.log")
    own.send(Shutdown())
    assert own.exit_code() == 0


def test_the_end_of_the_pipe_ends_it_though_a_run_goes_on(own: ExecutorProcess) -> None:
    own.event(own.run("spin", {"text": ""}), "job.log")
    own.socket.shutdown(2)
    assert own.process.wait(10) == 4


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff\x00\x00", b"\x00\x00\x00\x02\xc1\xc1", b"\x00\x00\x00\x02\x91\x63"]
)
def test_garbage_ends_it(own: ExecutorProcess, data: bytes) -> None:
    own.socket.sendall(data)
    assert own.exit_code() == 5
    assert [message.reason for message in own.inbox if isinstance(message, Fatal)] == ["protocol"]


def test_results_before_a_sys_exit_are_delivered() -> None:
    with ExecutorProcess(threads=1) as executor:
        executor.start()
        done = [executor.run("echo", {"text": "x"}) for _ in range(50)]
        executor.run("leave", {"count": 7})
        assert executor.exit_code() == 7
        assert [message.key for message in executor.inbox if isinstance(message, Result)] == done
        wait_until(lambda: any("exec_functions.leave called sys.exit(7)" in line for line in executor.stderr))


@pytest.mark.parametrize(
    ("function", "payload", "code"), [("leave_async", {"text": "bye"}, 1), ("leave_task", {"count": 9}, 9)]
)
def test_sys_exit_on_the_event_loop(own: ExecutorProcess, function: str, payload: dict[str, object], code: int) -> None:
    own.run(function, payload)
    assert own.exit_code() == code


def test_a_poisoned_context_fails_the_run_retryable_and_ends_the_process(own: ExecutorProcess) -> None:
    key = own.run("poison")
    assert failure(own.result(key)) == ("retryable", "the device failed", True)
    assert own.wait(Fatal).reason == "poisoned"
    assert own.exit_code() == 6


def test_a_wrong_parent_is_noticed() -> None:
    with ExecutorProcess(parent_pid=1) as executor:
        assert executor.process.wait(10) == 4


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    """A child of ours starts an executor and is killed; the pipe stays open in this process's hands."""
    ours, theirs = multiprocessing.Pipe()
    fds = (theirs.fileno(), create_arena("down"), create_arena("up"))
    code = (
        "import os, subprocess, sys, time\n"
        "pipe, down, up = map(int, sys.argv[1:])\n"
        "command = [sys.executable, '-P', '-m', 'executor', '--pipe-fd', str(pipe), '--down-fd', str(down)]\n"
        "command += ['--up-fd', str(up), '--parent-pid', str(os.getpid())]\n"
        "print(subprocess.Popen(command, pass_fds=(pipe, down, up)).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    arguments = [sys.executable, "-c", code, *map(str, fds)]
    with subprocess.Popen(arguments, pass_fds=fds, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        executor = ExecutorProcess(tmp_path)
        ours.send_bytes(encode(msgspec.structs.replace(executor.init, project_root=str(TENANT))))
        assert ours.poll(20), "not ready"
        parent.send_signal(signal.SIGKILL)
        assert psutil.wait_procs([child], timeout=10)[0]
    ours.close()
    theirs.close()
    for fd in fds[1:]:
        os.close(fd)
