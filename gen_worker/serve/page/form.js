// A form from a JSON Schema, and the payload from the form.
//
// Each field is {element, read, fill}: read(files) gives the value or OMIT and throws Invalid, fill(value) shows one.

const OMIT = Symbol("omit");
const MAX_DEPTH = 4;
const LONG_TEXT = /prompt|text|message|content|body|question|query|code|description/i;
const ASSET_FIELDS = ["ref", "local_path", "sha256", "mime_type"];
let ids = 0;

export class Invalid extends Error {}

export function buildForm(schema) {
  const defs = schema.$defs ?? {};
  const root = objectField(branches(schema, defs)[0] ?? {}, "", defs, 0);
  return {
    element: root.element,
    fill: root.fill,
    // {payload, files: [[path, File]]}
    read() {
      const files = [];
      const payload = root.read(files);
      return { payload: payload === OMIT ? {} : payload, files };
    },
  };
}

function branches(schema, defs) {
  let node = schema;
  for (let step = 0; node.$ref && step < 100; step += 1) node = defs[node.$ref.replace("#/$defs/", "")] ?? {};
  return node.anyOf ? node.anyOf.flatMap((option) => branches(option, defs)) : [node];
}

function objectField(node, path, defs, depth) {
  const element = document.createElement("div");
  const fields = [];
  const required = new Set(node.required ?? []);
  // Schemas come with sorted keys; what must be given goes first.
  const properties = Object.entries(node.properties ?? {}).sort(([a], [b]) => required.has(b) - required.has(a));
  for (const [name, property] of properties) {
    const field = buildField(name, property, path ? `${path}.${name}` : name, required.has(name), defs, depth);
    fields.push([name, field]);
    element.append(field.element);
  }
  if (!fields.length) {
    const nothing = document.createElement("p");
    nothing.className = "muted";
    nothing.textContent = "It takes no fields.";
    element.append(nothing);
  }
  return {
    element,
    read(files) {
      const value = {};
      for (const [name, field] of fields) {
        const item = field.read(files);
        if (item !== OMIT) value[name] = item;
      }
      return value;
    },
    fill(value) {
      for (const [name, field] of fields) if (value && name in value) field.fill(value[name]);
    },
  };
}

function buildField(name, schema, path, required, defs, depth) {
  const all = branches(schema, defs);
  const nullable = all.some((branch) => branch.type === "null");
  const choices = all.filter((branch) => branch.type !== "null");
  const node = choices[0] ?? {};
  const about = schema.description ?? node.description ?? "";
  const spec = { name, path, required, nullable, about, fallback: schema.default, node };
  if (choices.length !== 1) return jsonField(spec);
  if (ASSET_FIELDS.every((key) => node.properties && key in node.properties)) {
    return assetField({ ...spec, about: schema.description ?? "" }); // not what every Asset says of itself
  }
  if (node.contentEncoding === "base64") return fileField(spec);
  if (node.enum) return choiceField(spec);
  if (node.type === "boolean" && !nullable) return checkField(spec);
  if (node.type === "integer" || node.type === "number") return numberField(spec);
  if (node.type === "string") return textField(spec);
  if (node.type === "array" && node.items && node.items !== true) return listField(spec, branches(node.items, defs));
  if (node.type === "object" && node.properties && depth < MAX_DEPTH) return groupField(spec, defs, depth);
  return jsonField(spec);
}

// A label, the control, and a line for what is wrong with it.
function frame({ name, path, required, about }, control, hint = "") {
  const element = document.createElement("div");
  element.className = "field";
  control.id = `field-${(ids += 1)}`;
  control.dataset.path = path;
  const label = document.createElement("label");
  label.htmlFor = control.id;
  label.textContent = required ? `${name} *` : name;
  const help = document.createElement("span");
  help.className = "hint";
  help.textContent = [about, hint].filter(Boolean).map((part) => `  ${part}`).join("");
  label.append(help);
  const wrong = document.createElement("div");
  wrong.className = "wrong";
  wrong.id = `${control.id}-wrong`;
  control.setAttribute("aria-describedby", wrong.id);
  if (required) control.setAttribute("aria-required", "true");
  control.addEventListener("input", () => mark(control, wrong, ""));
  element.append(label, control, wrong);
  return { element, fail: (message) => mark(control, wrong, message, true) };
}

function mark(control, wrong, message, raise = false) {
  wrong.textContent = message;
  control.setAttribute("aria-invalid", message ? "true" : "false");
  if (raise) {
    control.focus();
    throw new Invalid(message);
  }
}

function textField(spec) {
  const isLong = LONG_TEXT.test(spec.name) && !(spec.node.maxLength <= 80);
  const control = document.createElement(isLong ? "textarea" : "input");
  if (isLong) control.rows = 2;
  if (spec.node.maxLength) control.maxLength = spec.node.maxLength;
  if (typeof spec.fallback === "string") control.value = spec.fallback;
  const { element } = frame(spec, control);
  return {
    element,
    read: () => (control.value === "" && (spec.nullable || (!spec.required && !spec.fallback)) ? OMIT : control.value),
    fill: (value) => { control.value = value ?? ""; },
  };
}

function numberField(spec) {
  const control = document.createElement("input");
  control.type = "number";
  const { node } = spec;
  const isInteger = node.type === "integer";
  control.step = isInteger ? "1" : "any";
  if (node.minimum !== undefined) control.min = node.minimum;
  if (node.maximum !== undefined) control.max = node.maximum;
  if (typeof spec.fallback === "number") control.value = spec.fallback;
  const range = [["≥", node.minimum], [">", node.exclusiveMinimum], ["≤", node.maximum], ["<", node.exclusiveMaximum]];
  const hint = range.filter(([, bound]) => bound !== undefined).map(([sign, bound]) => `${sign} ${bound}`).join(", ");
  const { element, fail } = frame(spec, control, hint);
  return {
    element,
    read() {
      if (control.value === "" && !control.validity.badInput) {
        if (spec.required && !spec.nullable) fail("a number is needed");
        return spec.required ? null : OMIT;
      }
      const value = Number(control.value);
      if (control.validity.badInput || Number.isNaN(value)) fail("not a number");
      if (isInteger && !Number.isInteger(value)) fail("a whole number is needed");
      return value;
    },
    fill: (value) => { control.value = value ?? ""; },
  };
}

function checkField(spec) {
  const control = document.createElement("input");
  control.type = "checkbox";
  control.checked = spec.fallback === true;
  const { element } = frame(spec, control);
  element.classList.add("check");
  element.prepend(control);
  return { element, read: () => control.checked, fill: (value) => { control.checked = value === true; } };
}

function choiceField(spec) {
  const control = document.createElement("select");
  const values = spec.nullable || (!spec.required && spec.fallback === undefined) ? [OMIT, ...spec.node.enum] : spec.node.enum;
  for (const value of values) {
    const option = document.createElement("option");
    option.textContent = value === OMIT ? "" : String(value);
    control.append(option);
  }
  const show = (value) => { control.selectedIndex = Math.max(0, values.indexOf(value)); };
  show(spec.fallback);
  const { element } = frame(spec, control);
  return { element, read: () => values[control.selectedIndex], fill: show };
}

function listField(spec, items) {
  const kind = items.length === 1 ? items[0].type : "";
  if (ASSET_FIELDS.every((key) => items[0]?.properties && key in items[0].properties)) return assetField(spec, true);
  if (items[0]?.contentEncoding || items[0]?.enum || !["string", "integer", "number"].includes(kind)) return jsonField(spec);
  const control = document.createElement("textarea");
  control.rows = 2;
  const show = (value) => { control.value = (value ?? []).join("\n"); };
  show(spec.fallback);
  const { element, fail } = frame(spec, control, "one per line");
  return {
    element,
    read() {
      const lines = control.value.split("\n").filter((line) => line !== "");
      if (!lines.length && !spec.required) return OMIT;
      if (kind === "string") return lines;
      const numbers = lines.map(Number);
      if (numbers.some(Number.isNaN)) fail("a line is not a number");
      return numbers;
    },
    fill: show,
  };
}

function assetField(spec, many = false) {
  const file = document.createElement("input");
  file.type = "file";
  file.multiple = many;
  const { element, fail } = frame(spec, file, many ? "files, or URLs, one per line" : "a file, or a URL");
  const url = document.createElement(many ? "textarea" : "input");
  url.placeholder = "https://… or a ref";
  url.setAttribute("aria-label", `${spec.name}: URL or ref`);
  url.dataset.path = `${spec.path}:url`;
  file.after(url);
  return {
    element,
    read(files) {
      for (const each of file.files) files.push([spec.path, each]);
      const refs = url.value.split("\n").filter(Boolean).map((ref) => ({ ref }));
      if (many) return refs.length || (spec.required && !file.files.length) ? refs : OMIT;
      if (file.files.length) return OMIT;
      if (!refs.length && spec.required) fail("a file or a URL is needed");
      return refs[0] ?? OMIT;
    },
    fill(value) {
      url.value = (many ? value ?? [] : [value]).map((each) => each?.ref ?? each ?? "").join("\n");
    },
  };
}

function fileField(spec) {
  const control = document.createElement("input");
  control.type = "file";
  const { element, fail } = frame(spec, control);
  return {
    element,
    read(files) {
      if (!control.files.length && spec.required) fail("a file is needed");
      for (const each of control.files) files.push([spec.path, each]);
      return OMIT;
    },
    fill() {},
  };
}

function groupField(spec, defs, depth) {
  const element = document.createElement("fieldset");
  const legend = document.createElement("legend");
  legend.textContent = spec.required ? `${spec.name} *` : spec.name;
  element.append(legend);
  const inner = objectField(spec.node, spec.path, defs, depth + 1);
  element.append(inner.element);
  if (spec.required) return { element, read: inner.read, fill: inner.fill };
  // What is optional as a whole is sent only when it is asked for: it may have fields that are required.
  const use = document.createElement("input");
  use.type = "checkbox";
  use.setAttribute("aria-label", `give ${spec.name}`);
  const show = () => { inner.element.hidden = !use.checked; };
  use.addEventListener("change", show);
  legend.prepend(use, " ");
  show();
  return {
    element,
    read: (files) => (use.checked ? inner.read(files) : OMIT),
    fill(value) {
      use.checked = value !== null && value !== undefined;
      show();
      inner.fill(value);
    },
  };
}

function jsonField(spec) {
  const control = document.createElement("textarea");
  control.rows = 2;
  control.className = "code";
  const show = (value) => { control.value = value === undefined ? "" : JSON.stringify(value); };
  show(spec.fallback);
  const { element, fail } = frame(spec, control, "JSON");
  return {
    element,
    read() {
      if (control.value.trim() === "") {
        if (spec.required) fail("JSON is needed");
        return OMIT;
      }
      try {
        return JSON.parse(control.value);
      } catch (error) {
        return fail(`not JSON: ${error.message}`);
      }
    },
    fill: show,
  };
}
