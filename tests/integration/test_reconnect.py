"""The scheduler goes, comes back, moves or refuses: nothing that runs is lost."""

from __future__ import annotations

from pathlib import Path

import grpc
import psutil
import pytest
import trustme

from gen_worker.testing.mock_orchestrator import MockOrchestrator, RunHandle, in_turn, redirect
from gen_worker.testing.mock_orchestrator import accept as accept_stream
from gen_worker.wire import NOT_LEADER_PREFIX
from tests.support.worker_process import WAIT_S, WorkerProcess, all_of, chain, eventually

MIB = 2**20
NOWHERE = "127.0.0.1:1"


class StandsStill:
    """True when a process has not used the CPU for many looks in a row."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._seen: object = None
        self._looks = 0

    def __call__(self) -> bool:
        before, self._seen = self._seen, self._process.cpu_times()
        self._looks = self._looks + 1 if before == self._seen else 0
        return self._looks >= 50


async def begin(orchestrator: MockOrchestrator, function: str, payload: object) -> RunHandle:
    """Start a run and wait until it surely runs."""
    handle = await orchestrator.run(function, payload)
    await orchestrator.wait_until(lambda: handle.events, WAIT_S, what=f"an event of {handle!r}")
    return handle


# -- a scheduler that goes and comes back ---------------------------------------------------------


async def test_runs_go_on_without_a_scheduler_and_are_answered_on_the_next_stream(tmp_path: Path) -> None:
    async with chain(executors=2) as worker:
        executors = [executor.pid for executor in worker.worker.executors()]
        ends_meanwhile = [await worker.started("wait_for_file", {"how": str(tmp_path / "now")}) for _ in range(10)]
        ends_later = [await worker.started("wait_for_file", {"how": str(tmp_path / "later")}) for _ in range(10)]
        await worker.orchestrator.stop()
        await worker.worker.wait_for_log("stream 1", "ended")
        (tmp_path / "now").touch()
        await worker.orchestrator.start()
        await worker.orchestrator.wait_for_worker()
        outputs = await all_of(*(handle.output() for handle in ends_meanwhile))
        assert [output["text"] for output in outputs] == ["seen"] * 10
        assert not any(handle.done for handle in ends_later)
        (tmp_path / "later").touch()
        await all_of(*(handle.output() for handle in ends_later))
        assert all(result.connection.index == 1 for handle in ends_later for result in handle.results)
        assert [executor.pid for executor in worker.worker.executors()] == executors
        assert worker.orchestrator.stream_count == 2


@pytest.mark.both_transports
async def test_an_outage_in_the_midst_of_streams_keeps_their_order() -> None:
    async with chain() as worker:
        streams = [await begin(worker.orchestrator, name, {"seconds": 1.5}) for name in ("ticks", "aticks")]
        await worker.orchestrator.stop()
        await worker.orchestrator.start()
        for stream in streams:
            assert (await stream.result()).success
            indexes = [delta["index"] for delta in stream.deltas]
            assert indexes == sorted(set(indexes))
            assert indexes[-1] == 149
            assert stream.events[-1].type == "output.completed"
            assert {event.connection.index for event in stream.events} == {0, 1}


async def test_a_result_that_may_be_lost_with_its_stream_is_sent_again_alike() -> None:
    """There are no acknowledgements; the scheduler drops what it has by run_id."""
    async with chain() as worker:
        handle = await worker.run("echo", {"text": "once or twice"})
        await handle.result()
        worker.connection.drop()
        await worker.orchestrator.wait_until(lambda: len(handle.results) == 2)
        first, second = handle.results
        assert first.message == second.message
        assert (first.connection.index, second.connection.index) == (0, 1)


async def test_a_stream_that_the_scheduler_ends_is_replaced() -> None:
    async with chain() as worker:
        for number in range(1, 4):
            ended = worker.connection
            ended.half_close()
            await ended.wait_ended()
            await worker.orchestrator.wait_for_worker()
            assert worker.orchestrator.stream_count == number + 1
            assert (await worker.call("echo", {"text": str(number)}))["text"] == str(number)


async def test_cancels_and_deadlines_hold_over_an_outage() -> None:
    async with chain() as worker:
        overdue = await worker.started("wait", {"seconds": 30}, timeout_ms=400)
        canceled = await worker.started("wait", {"seconds": 30})
        await worker.orchestrator.stop()
        await worker.worker.wait_for_log("wait ended timeout")
        await worker.orchestrator.start()
        await worker.orchestrator.wait_for_worker()
        assert (await overdue.result()).error_type == "timeout"
        await canceled.cancel()
        assert (await canceled.result()).error_type == "canceled"


async def test_a_death_while_there_is_no_scheduler_is_answered_later() -> None:
    async with chain() as worker:
        handle = await worker.started("wait", {"seconds": 30})
        await worker.orchestrator.stop()
        worker.worker.executors()[0].kill()
        await worker.worker.wait_for_log("executor of slot 0 died")
        await worker.orchestrator.start()
        result = await handle.result()
        assert (result.safe_message, result.retryable) == ("worker process crashed", True)


# -- a scheduler that is slow ---------------------------------------------------------------------


async def test_a_scheduler_that_does_not_read_costs_no_memory() -> None:
    """64 MiB of deltas are produced as fast as they are read, not faster."""
    async with chain() as worker:
        stream = await begin(worker.orchestrator, "count", {"count": 4096, "size": 16_384})
        worker.connection.pause_reading()
        processes = [psutil.Process(worker.worker.pid), *worker.worker.executors()]
        before = sum(process.memory_info().rss for process in processes)
        (executor,) = worker.worker.executors()

        await eventually(StandsStill(executor))
        assert not stream.done
        grown = sum(process.memory_info().rss for process in processes) - before
        assert grown < 24 * MIB
        worker.connection.resume_reading()
        assert (await stream.result(WAIT_S)).success
        assert [delta["index"] for delta in stream.deltas] == list(range(4096))


# -- a scheduler that moved -----------------------------------------------------------------------


async def test_a_redirect_to_the_leader_is_followed() -> None:
    async with (
        MockOrchestrator() as leader,
        MockOrchestrator(on_connect=redirect(leader.address)) as follower,
        WorkerProcess(follower.address),
    ):
        connection = await leader.wait_for_worker()
        assert connection.registrations[0].is_heartbeat is False
        assert await (await leader.run("echo", {"text": "led"})).output() == {"text": "led", "data": b""}
        assert follower.stream_count == 1
        assert not follower.workers


@pytest.mark.both_transports
async def test_a_leader_that_steps_down_takes_no_run_with_it() -> None:
    async with MockOrchestrator() as new, chain() as worker:
        old = worker.orchestrator
        handle = await worker.started("wait", {"seconds": 30})
        worker.connection.close(grpc.StatusCode.FAILED_PRECONDITION, f"{NOT_LEADER_PREFIX}{new.address}")
        await new.wait_for_worker()
        # The new leader knows the run, and its cancel arrives by the new stream.
        new.runs[handle.run_id] = moved = RunHandle(
            handle.run_id, "wait", "test-worker", send=new.send, keep_events=True
        )
        await moved.cancel()
        assert (await moved.result()).error_type == "canceled"
        assert old.stream_count == 1


async def test_after_the_leader_is_lost_the_seeds_are_asked_in_order() -> None:
    async with MockOrchestrator() as leader, MockOrchestrator() as follower:
        follower.on_connect = in_turn(redirect(leader.address), accept_stream)
        async with WorkerProcess(NOWHERE, env={"SCHEDULER_ADDRS": f"127.0.0.1:2,{follower.address}"}):
            await leader.wait_for_worker()
            await leader.stop()
            await follower.wait_for_worker()
            assert (await (await follower.run("echo", {"text": "by a seed"})).output())["text"] == "by a seed"


async def test_a_seed_that_answers_is_found_behind_one_that_does_not() -> None:
    async with (
        MockOrchestrator() as orchestrator,
        WorkerProcess(NOWHERE, env={"SCHEDULER_ADDRS": orchestrator.address}) as worker,
    ):
        await orchestrator.wait_for_worker()
        assert worker.lines("WARNING", NOWHERE, "UNAVAILABLE")


# -- who may connect ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "token"),
    [
        ({}, ""),
        ({"AUTH_TOKEN": "token-one"}, "Bearer token-one"),
        ({"WORKER_JWT": "token-two"}, "Bearer token-two"),
        ({"AUTH_TOKEN": "token-one", "WORKER_JWT": "token-two"}, "Bearer token-one"),
    ],
)
async def test_the_token_goes_with_the_call(env: dict[str, str], token: str) -> None:
    async with chain(env=env) as worker:
        assert worker.connection.authorization == token


async def test_the_token_file_is_read_at_every_connect(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first-token\n")
    async with chain(env={"AUTH_TOKEN_FILE": str(file), "AUTH_TOKEN": "unused-token"}) as worker:
        assert worker.connection.authorization == "Bearer first-token"
        file.write_text("second-token")
        worker.connection.half_close()
        await worker.orchestrator.wait_until(lambda: worker.orchestrator.stream_count == 2)
        assert (await worker.orchestrator.wait_for_worker()).authorization == "Bearer second-token"
        assert not worker.worker.lines("-token")  # neither is in the log


async def test_a_refused_token_is_said_in_one_line_and_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("stale-token")
    async with (
        MockOrchestrator(required_token="fresh-token") as orchestrator,
        WorkerProcess(orchestrator.address, env={"AUTH_TOKEN_FILE": str(file)}) as worker,
    ):
        line = await worker.wait_for_log("refused the token")
        assert "ERROR" in line
        assert "UNAUTHENTICATED" in line
        assert "AUTH_TOKEN_FILE" in line
        assert "stale" not in line
        file.write_text("fresh-token")
        await orchestrator.wait_for_worker()


@pytest.mark.both_transports
async def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    authority = trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("worker@example.org")
    for name, blob in [
        ("ca", authority.cert_pem),
        ("certificate", client.cert_chain_pems[0]),
        ("key", client.private_key_pem),
    ]:
        blob.write_to_path(tmp_path / name)
    credentials = grpc.ssl_server_credentials(
        [(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())],
        authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    env = {
        "USE_TLS": "true",
        "SCHEDULER_CA_FILE": str(tmp_path / "ca"),
        "SCHEDULER_CLIENT_CERT_FILE": str(tmp_path / "certificate"),
        "SCHEDULER_CLIENT_KEY_FILE": str(tmp_path / "key"),
        "AUTH_TOKEN": "over-tls-only",
    }
    async with chain(env=env, tls=credentials) as worker:
        assert worker.connection.authorization == "Bearer over-tls-only"
        assert (await worker.call("echo", {"text": "private"}))["text"] == "private"


async def test_without_the_right_ca_there_is_no_stream_and_a_line_says_why(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    server = authority.issue_cert("127.0.0.1")
    other.cert_pem.write_to_path(tmp_path / "ca")
    credentials = grpc.ssl_server_credentials([(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())])
    env = {"USE_TLS": "true", "SCHEDULER_CA_FILE": str(tmp_path / "ca")}
    async with (
        MockOrchestrator(tls=credentials) as orchestrator,
        WorkerProcess(orchestrator.address, env=env) as worker,
    ):
        line = await worker.wait_for_log("no stream to", orchestrator.address)
        assert "certificate" in line.lower()
        assert orchestrator.stream_count == 0


async def test_a_worker_that_lost_its_scheduler_for_good_keeps_its_beat_of_dials() -> None:
    """No storm of dials while it is away, no long silence either."""
    async with chain(env={"RECONNECT_DELAY": "0.1", "RECONNECT_MAX_DELAY": "0.2"}) as worker:
        await worker.orchestrator.stop()
        await eventually(lambda: len(worker.worker.lines("no stream to")) >= 5)
        await worker.orchestrator.start()
        await worker.orchestrator.wait_for_worker(timeout=5)
