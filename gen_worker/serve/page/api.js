// The server's API: JSON, and streams of events over fetch, which can post and be aborted.

export async function getJson(path) {
  const response = await fetch(path);
  const body = await response.json();
  if (!response.ok) throw body.error;
  return body;
}

export async function cancelRun(runId) {
  await fetch(`/v1/runs/${encodeURIComponent(runId)}`, { method: "DELETE" });
}

// Calls a function; onEvent(type, data) gets every event, the last one "result" or "error".
export async function callFunction(name, { payload, files }, onEvent, signal) {
  const headers = { Accept: "text/event-stream" };
  let body;
  if (files.length) {
    body = new FormData();
    body.append("payload", JSON.stringify(payload));
    for (const [path, file] of files) body.append(path, file, file.name);
  } else {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(payload);
  }
  const path = `/v1/functions/${encodeURIComponent(name)}`;
  const response = await fetch(path, { method: "POST", headers, body, signal });
  if (!response.ok || !response.headers.get("content-type").startsWith("text/event-stream")) {
    onEvent("error", (await response.json()).error);
    return;
  }
  await readEvents(response.body, onEvent);
}

async function readEvents(stream, onEvent) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let last = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    pending += value;
    const blocks = pending.split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const event = lines.find((line) => line.startsWith("event: "));
      const data = lines.find((line) => line.startsWith("data: "));
      if (!event || !data) continue;
      last = event.slice(7);
      onEvent(last, JSON.parse(data.slice(6)));
    }
  }
  if (last !== "result" && last !== "error") {
    onEvent("error", { type: "unavailable", message: "the server ended the stream before the result", retryable: true });
  }
}
