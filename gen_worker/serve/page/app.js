// The page: which function is chosen, the run under way, and what the server says of its worker.

import { Answer } from "./answer.js";
import { callFunction, cancelRun, getJson } from "./api.js";
import { buildForm, Invalid } from "./form.js";
import { buildSession } from "./realtime.js";
import { textElement } from "./show.js";

const find = (id) => document.getElementById(id);
const functions = new Map();
let chosen = null; // {name, form} or {name, session}
let running = null; // {abort, runId}
let version = "";
let shownLog = "";

// -- functions ------------------------------------------------------------------------------------

async function loadFunctions() {
  const list = await getJson("/v1/functions");
  functions.clear();
  for (const each of list) functions.set(each.name, each);
  find("functions").replaceChildren(...list.map(functionItem));
  const name = [decodeURIComponent(location.hash.slice(1)), chosen?.name].find((each) => functions.has(each));
  choose(name ?? list[0]?.name);
}

function functionItem(each) {
  const item = document.createElement("li");
  const button = textElement("button", each.name);
  button.type = "button";
  button.dataset.name = each.name;
  const kind = each.realtime ? "realtime" : each.incremental ? "stream" : "";
  if (kind) button.append(textElement("small", kind));
  button.addEventListener("click", () => {
    choose(each.name);
    find("fields").querySelector("input, textarea, select")?.focus();
  });
  item.append(button);
  return item;
}

function choose(name) {
  const each = functions.get(name);
  if (!each) return;
  const before = chosen?.name === name && chosen.form ? readQuietly(chosen.form) : null;
  chosen?.session?.close();
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  for (const button of find("functions").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button.dataset.name === name));
  }
  find("function-name").textContent = name;
  find("function-about").textContent = describe(each);
  if (each.realtime) {
    chosen = { name, session: buildSession(name) };
    find("fields").replaceChildren(chosen.session.element);
  } else {
    chosen = { name, form: buildForm(each.input_schema) };
    find("fields").replaceChildren(chosen.form.element);
    if (before) chosen.form.fill(before);
    else find("answer").hidden = running === null;
  }
  find("run").textContent = each.realtime ? "Send" : "Run";
  updateButtons();
}

function describe(each) {
  const ref = each.input_schema.$ref?.replace("#/$defs/", "");
  const about = each.input_schema.$defs?.[ref]?.description ?? "";
  const kind = each.realtime ? "A realtime handler." : each.incremental ? "It streams its output." : "";
  return [about, kind].filter(Boolean).join(" ");
}

// What stands in the form, to be shown again after a reload of the code; a form that can't be read is not kept.
function readQuietly(form) {
  try {
    return form.read().payload;
  } catch {
    return null;
  }
}

// -- running --------------------------------------------------------------------------------------

async function run() {
  if (!chosen || running) return;
  if (chosen.session) {
    await chosen.session.send();
    return;
  }
  let request;
  try {
    request = chosen.form.read();
  } catch (error) {
    if (error instanceof Invalid) return; // the field says what is wrong
    throw error;
  }
  const answer = new Answer();
  running = { abort: new AbortController(), runId: null };
  updateButtons();
  try {
    const onEvent = (type, data) => {
      if (type === "run") running.runId = data.run_id;
      answer.take(type, data);
    };
    await callFunction(chosen.name, request, onEvent, running.abort.signal);
  } catch (error) {
    const message = error.name === "AbortError" ? "canceled" : `the server can't be reached: ${error.message}`;
    answer.take("error", { type: "", message });
  } finally {
    running = null;
    updateButtons();
  }
}

function cancel() {
  chosen?.session?.close();
  if (!running) return;
  if (running.runId) cancelRun(running.runId);
  else running.abort.abort();
}

function updateButtons() {
  find("run").disabled = !chosen || running !== null;
  find("cancel").hidden = running === null;
}

// -- the worker -----------------------------------------------------------------------------------

function followState() {
  const source = new EventSource("/v1/state");
  source.addEventListener("state", ({ data }) => showState(JSON.parse(data)));
  source.onerror = () => showPhase("lost");
}

async function showState(state) {
  showPhase(state.phase);
  document.title = `${state.title} · gen-worker`;
  find("title").textContent = state.title;
  find("problem").textContent = state.problem;
  find("problem").hidden = !state.problem;
  showFacts("executors", state.executors.map((each) => [`pid ${each.pid}`, `${size(each.memory_bytes)}, ${age(each.seconds)}`]), "none yet");
  showFacts("device", deviceFacts(state.resources), "not registered");
  showFacts("models", state.models.map((each) => [each.id, each.where]), "none loaded");
  showRuns(state.runs);
  showLog(state.log);
  if (state.functions_version !== version && state.phase === "serving") {
    version = state.functions_version;
    await loadFunctions();
  }
}

function showPhase(phase) {
  const badge = find("phase");
  if (badge.textContent === phase) return; // a status region speaks when it changes
  badge.textContent = phase;
  badge.className = `badge ${phase}`;
}

function deviceFacts(resources) {
  if (!resources) return [];
  if (!resources.gpu_count) {
    return [["CPU", `${resources.cpu_cores} cores`], ["memory", size(resources.memory_bytes)], ["torch", resources.torch_version || "none"]];
  }
  return [
    [resources.gpu_name, `× ${resources.gpu_count}${resources.gpu_is_busy ? ", busy" : ""}`],
    ["VRAM", `${size(resources.gpu_memory_used_bytes)} of ${size(resources.gpu_memory_bytes)}`],
    ["CUDA", resources.cuda_version || "none"],
    ["torch", resources.torch_version || "none"],
  ];
}

function showFacts(id, facts, otherwise) {
  const rows = facts.length ? facts : [[otherwise, ""]];
  find(id).replaceChildren(
    ...rows.map(([name, value]) => {
      const item = document.createElement("li");
      item.append(textElement("span", name), textElement("span", value));
      return item;
    }),
  );
}

// Items stay the same elements, so that a click or the focus on one survives the next state.
function showRuns(runs) {
  const list = find("runs");
  const known = new Map([...list.children].map((item) => [item.dataset.runId, item]));
  const items = runs.map((each) => updateRun(known.get(each.run_id) ?? runItem(each), each));
  for (const [runId, item] of known) if (!runs.some((each) => each.run_id === runId)) item.remove();
  items.forEach((item, index) => {
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
  if (!runs.length) list.append(textElement("li", "none yet", "muted"));
}

function runItem(each) {
  const item = document.createElement("li");
  item.dataset.runId = each.run_id;
  const button = document.createElement("button");
  button.type = "button";
  const mark = textElement("span", "", "mark");
  mark.setAttribute("role", "img");
  button.append(mark, textElement("span", each.function), textElement("small", ""));
  button.addEventListener("click", () => showRun(each.run_id));
  item.append(button);
  return item;
}

function updateRun(item, each) {
  const marks = { running: "●", succeeded: "✓", failed: "✗" };
  item.className = each.state;
  item.firstChild.title = each.error ? `${each.error.type}: ${each.error.message}` : each.run_id;
  const mark = item.querySelector(".mark");
  mark.textContent = marks[each.state];
  mark.setAttribute("aria-label", each.state);
  const progress = each.progress === null ? "…" : `${Math.round(each.progress * 100)} %`;
  item.querySelector("small").textContent = each.state === "running" ? progress : `${each.seconds.toFixed(2)} s`;
  return item;
}

// A run of before: its payload in the form, its end in the answer.
async function showRun(runId) {
  if (running) return;
  const record = await getJson(`/v1/runs/${encodeURIComponent(runId)}`);
  if (!functions.has(record.function)) return;
  choose(record.function);
  if (chosen.form && record.payload && typeof record.payload === "object") chosen.form.fill(record.payload);
  const answer = new Answer();
  if (record.state === "running") answer.progress(record.progress ?? undefined, record.stage || "running");
  else if (record.error) answer.error(record.error);
  else if (Array.isArray(record.output)) {
    for (const delta of record.output) answer.delta(delta);
    answer.result({ output: null, seconds: record.seconds });
  } else answer.result(record);
}

function showLog(lines) {
  const text = lines.map((line) => line.text).join("\n");
  if (text === shownLog) return;
  shownLog = text;
  const box = find("log");
  const follows = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
  box.replaceChildren(
    ...lines.map((line) => textElement("div", line.text, line.is_error ? "error" : line.is_output ? "output" : "")),
  );
  if (follows) box.scrollTop = box.scrollHeight;
}

function size(bytes) {
  return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;
}

function age(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  return seconds < 3600 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// -- the page itself ------------------------------------------------------------------------------

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function wire() {
  const preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setTheme(localStorage.getItem("theme") ?? preferred);
  find("theme").addEventListener("click", () => {
    const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", other);
    setTheme(other);
  });
  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  find("cancel").addEventListener("click", cancel);
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    } else if (event.key === "Escape") cancel();
  });
  addEventListener("hashchange", () => choose(decodeURIComponent(location.hash.slice(1))));
  followState();
}

wire();
