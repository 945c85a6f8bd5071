"""Each transport, and a whole worker, behind nginx's grpc_pass."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
import trustme

from gen_worker.testing.mock_orchestrator import MockOrchestrator
from supervisor.transport import StatusCode, StreamClosed, TlsFiles
from supervisor.transport.grpcio import GrpcioTransport
from tests.integration.test_transport import dialed_and_answered
from tests.support import nginx
from tests.support.seam import plain
from tests.support.stream_server import Dial, serving
from tests.support.transports import TransportFactory
from tests.support.worker_process import WAIT_S, WorkerProcess

pytestmark = pytest.mark.skipif(nginx.PROGRAM is None, reason="nginx is not installed")

MIB = 2**20


async def echo_and_refuse(dial: Dial) -> None:
    while (message := await dial.read()) is not None:
        if message == b"end":
            await dial.abort(grpc.StatusCode.FAILED_PRECONDITION, "not_leader:10.0.0.1:80")
        await dial.send(message)


@pytest.mark.parametrize("encrypted", [False, True], ids=["clear", "tls"])
async def test_messages_and_the_status_pass_a_proxy(
    make_transport: TransportFactory, tmp_path: Path, encrypted: bool
) -> None:
    certificate, files = None, None
    if encrypted:
        ca = trustme.CA()
        pair = ca.issue_cert("127.0.0.1")
        certificate = tmp_path / "chain.pem", tmp_path / "key.pem"
        pair.cert_chain_pems[0].write_to_path(certificate[0])
        pair.private_key_pem.write_to_path(certificate[1])
        ca.cert_pem.write_to_path(tmp_path / "ca.pem")
        files = TlsFiles(ca_file=str(tmp_path / "ca.pem"))
    sent = [b"%d" % number for number in range(2000)] + [b"x" * (5 * MIB), b"y"]
    async with serving(echo_and_refuse) as server, nginx.proxy(tmp_path, server.address, certificate) as address:
        stream = await make_transport(files).open(address, (("authorization", "Bearer abc"),))
        sending = asyncio.create_task(stream.send([*sent, b"end"]))
        received: list[bytes] = []
        async with asyncio.timeout(30):
            while len(received) < len(sent):
                received += plain(await stream.receive())
            with pytest.raises(StreamClosed) as caught:
                await stream.receive()
        assert received == sent
        assert str(caught.value) == "FAILED_PRECONDITION: not_leader:10.0.0.1:80"
        await sending
        assert server.dials[0].metadata["authorization"] == "Bearer abc"
        await stream.close()


async def test_a_proxy_without_its_server(make_transport: TransportFactory, tmp_path: Path) -> None:
    transport = make_transport()
    async with nginx.proxy(tmp_path, "127.0.0.1:1") as address:
        with pytest.raises(StreamClosed) as caught:
            await dialed_and_answered(transport, address)
    status = caught.value.status
    # Where the answer and the reset behind it come together, grpc tells of the reset alone.
    if isinstance(transport, GrpcioTransport) and "RST_STREAM" in status.details:
        assert status.code is StatusCode.INTERNAL
    else:
        assert status.code is StatusCode.UNAVAILABLE
        assert "502" in status.details


@pytest.mark.both_transports
async def test_a_worker_behind_a_proxy(tmp_path: Path) -> None:
    async with (
        MockOrchestrator() as orchestrator,
        nginx.proxy(tmp_path, orchestrator.address) as address,
        WorkerProcess(address) as worker,
    ):
        await worker.while_it_runs(orchestrator.wait_for_worker())
        handles = [await orchestrator.run("echo", {"text": str(number)}) for number in range(200)]
        assert [(await handle.output(WAIT_S))["text"] for handle in handles] == [str(number) for number in range(200)]
