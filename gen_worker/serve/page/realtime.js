// A realtime session: frames both ways over a WebSocket.

import { appendLine } from "./answer.js";

export function buildSession(name) {
  const element = document.createElement("div");
  element.innerHTML = `
    <div class="field">
      <label for="frame">Frame <span class="hint">sent as text</span></label>
      <textarea id="frame" rows="2"></textarea>
    </div>
    <pre class="frames" aria-live="polite" aria-label="Frames"></pre>`;
  const input = element.querySelector("textarea");
  const frames = element.querySelector("pre");
  let socket = null;

  function open() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    socket = new WebSocket(`${scheme}://${location.host}/v1/functions/${encodeURIComponent(name)}`);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => appendLine(frames, "— open");
    socket.onmessage = ({ data }) =>
      appendLine(frames, `< ${typeof data === "string" ? data : `${data.byteLength} bytes`}`);
    socket.onclose = ({ code, reason }) => {
      appendLine(frames, `— closed: ${reason || code}`);
      socket = null;
    };
    return new Promise((resolve) => socket.addEventListener("open", resolve, { once: true }));
  }

  return {
    element,
    async send() {
      if (!socket) await open();
      socket.send(input.value);
      appendLine(frames, `> ${input.value}`);
      input.value = "";
    },
    close: () => socket?.close(1000),
  };
}
