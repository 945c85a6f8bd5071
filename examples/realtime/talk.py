"""Realtime sockets: one that answers each frame as it came, and one that answers text in capitals."""

from __future__ import annotations

from gen_worker import ActionContext, RealtimeSocket, ResourceRequirements, worker_websocket

MAX_TEXT_BYTES = 64 * 1024


@worker_websocket()
async def echo(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """Text comes back as text, bytes as bytes, until the other end closes."""
    async for frame in sock.iter_frames():
        if frame.is_text:
            await sock.send_text(frame.data.decode())
        else:
            await sock.send_bytes(frame.data)


@worker_websocket(resources=ResourceRequirements(max_concurrency=64))
async def uppercase(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """A greeting, then each text in capitals; `bye` ends the session, and so does a text that is too long."""
    await sock.send_json({"session": ctx.run_id, "say": "bye to leave"})
    async for data in sock.iter_bytes():
        text = data.decode(errors="replace")
        if text == "bye":
            break
        if len(data) > MAX_TEXT_BYTES:
            await sock.send_json({"error": f"at most {MAX_TEXT_BYTES} bytes at a time"})
            await sock.close()
            return
        await sock.send_json({"text": text.upper()})
    ctx.log("the session is over")
