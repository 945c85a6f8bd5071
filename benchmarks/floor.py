"""The floor: the same chain written by hand, with nothing around it. It sets what the worker is measured against.

grpc.aio stream -> multiprocessing pipe -> msgspec -> function -> back. No supervision, no limits, no reconnect, no
uvloop. It registers as a worker with one function, `echo`, and one stream, `count`.

    python benchmarks/floor.py HOST:PORT
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

import grpc
import msgspec

from gen_worker.wire import METHOD, TRANSPORT_LIMIT_BYTES
from gen_worker.wire import worker_scheduler_pb2 as pb

OPTIONS = [
    ("grpc.max_send_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.max_receive_message_length", TRANSPORT_LIMIT_BYTES),
]


class Echo(msgspec.Struct):
    text: str = ""
    data: bytes = b""


class Count(msgspec.Struct):
    count: int
    size: int = 0


class Delta(msgspec.Struct):
    index: int
    text: str


def executor(pipe: Connection) -> None:
    """The other process: one request after the other."""
    decode_request = msgspec.msgpack.Decoder(tuple[str, str, bytes]).decode
    decode_echo, decode_count = msgspec.msgpack.Decoder(Echo).decode, msgspec.msgpack.Decoder(Count).decode
    encode, encode_json = msgspec.msgpack.Encoder().encode, msgspec.json.Encoder().encode
    while True:
        try:
            run_id, function, payload = decode_request(pipe.recv_bytes())
        except EOFError:
            return
        if function == "echo":
            pipe.send_bytes(encode((run_id, "", encode(decode_echo(payload)))))
            continue
        job = decode_count(payload)
        for index in range(job.count):
            pipe.send_bytes(encode((run_id, "output.delta", encode_json(Delta(index, "x" * job.size)))))
        pipe.send_bytes(encode((run_id, "output.completed", b"{}")))
        pipe.send_bytes(encode((run_id, "", b"")))


async def worker(target: str, pipe: Connection) -> None:
    outgoing: asyncio.Queue[bytes] = asyncio.Queue()
    decode_reply, encode = msgspec.msgpack.Decoder(tuple[str, str, bytes]).decode, msgspec.msgpack.Encoder().encode

    def on_readable() -> None:
        while pipe.poll():
            run_id, event, payload = decode_reply(pipe.recv_bytes())
            if event:
                message = pb.WorkerSchedulerMessage(
                    worker_event=pb.WorkerEvent(run_id=run_id, event_type=event, payload_json=payload)
                )
            else:
                message = pb.WorkerSchedulerMessage(
                    run_result=pb.TaskExecutionResult(run_id=run_id, success=True, output_payload=payload)
                )
            outgoing.put_nowait(message.SerializeToString())

    asyncio.get_running_loop().add_reader(pipe.fileno(), on_readable)
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        call: Any = channel.stream_stream(METHOD)()
        resources = pb.WorkerResources(worker_id=f"floor-{os.getpid()}", available_functions=["echo", "count"])
        registration = pb.WorkerRegistration(resources=resources)
        await call.write(pb.WorkerSchedulerMessage(worker_registration=registration).SerializeToString())

        async def send() -> None:
            while True:
                await call.write(await outgoing.get())

        sender = asyncio.create_task(send())
        while (data := await call.read()) is not grpc.aio.EOF:
            request = pb.WorkerSchedulerMessage.FromString(data).run_request
            pipe.send_bytes(encode((request.run_id, request.function_name, request.input_payload)))
        sender.cancel()


def main() -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=executor, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        asyncio.run(worker(sys.argv[1], ours))
    except (KeyboardInterrupt, grpc.RpcError) as error:
        print(f"floor: {error!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
