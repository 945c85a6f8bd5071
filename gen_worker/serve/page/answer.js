// The answer of one run as it comes: progress, streaming output, media, errors, events.

import { hasMedia, show, soleText, textElement } from "./show.js";

const MAX_LINES = 500;
const find = (id) => document.getElementById(id);

export class Answer {
  constructor() {
    this.text = null;
    this.list = null;
    this.started = performance.now();
    find("answer").hidden = false;
    find("output").replaceChildren();
    find("error").hidden = true;
    find("events").hidden = true;
    find("event-lines").replaceChildren();
    find("took").textContent = "";
    this.progress(undefined, "running");
    this.reveal();
  }

  take(type, data) {
    if (type === "output.delta") this.delta(data);
    else if (type === "job.progress") this.progress(data.progress, data.stage ?? "");
    else if (type === "result") this.result(data);
    else if (type === "error") this.error(data);
    if (!["output.delta", "result", "error", "run"].includes(type)) this.event(type, data);
  }

  delta(value) {
    const text = soleText(value);
    if (text !== null) {
      if (!this.text) {
        this.text = textElement("pre", "", "text");
        find("output").append(this.text);
      }
      this.text.append(text);
    } else if (hasMedia(value)) {
      this.list = null;
      find("output").append(...show(value));
    } else {
      if (!this.list) {
        this.list = document.createElement("pre");
        find("output").append(this.list);
      }
      appendLine(this.list, JSON.stringify(value));
    }
  }

  progress(fraction, stage) {
    const bar = find("progress");
    bar.hidden = false;
    if (fraction === undefined) bar.removeAttribute("value");
    else bar.value = fraction;
    find("stage").textContent = fraction === undefined ? stage : `${Math.round(fraction * 100)} % ${stage}`;
  }

  event(type, data) {
    find("events").hidden = false;
    appendLine(find("event-lines"), `${type} ${JSON.stringify(data)}`);
  }

  result({ output, seconds }) {
    if (output !== null && output !== undefined) find("output").append(...show(output));
    this.end("done", seconds);
    for (const image of find("output").querySelectorAll("img")) image.addEventListener("load", () => this.reveal());
  }

  error({ type, message, detail }) {
    const box = find("error");
    const head = document.createElement("strong");
    head.textContent = type ? `${type}: ${message}` : message;
    box.replaceChildren(head);
    if (detail && detail !== message) box.append(textElement("pre", detail));
    box.hidden = false;
    this.end("failed");
  }

  // The whole answer if it fits, else its beginning.
  reveal() {
    const box = find("answer");
    box.scrollIntoView({ block: box.offsetHeight > innerHeight ? "start" : "nearest" });
  }

  end(word, seconds = (performance.now() - this.started) / 1000) {
    find("progress").hidden = true;
    find("stage").textContent = word;
    find("took").textContent = seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`;
  }
}

export function appendLine(element, line) {
  element.append(`${line}\n`);
  while (element.childNodes.length > MAX_LINES) element.firstChild.remove();
  element.scrollTop = element.scrollHeight;
}
