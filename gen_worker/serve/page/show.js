// Outputs as people see them: pictures, sound and films as such, text as text, all else as JSON.

const LONG = 2000;
const MEDIA_TEXT = 64; // shorter texts are no files in base64

// The elements for one value.
export function show(value) {
  const elements = [];
  const media = [...mediaIn(value)];
  if (media.length) elements.push(gallery(media));
  const text = soleText(value);
  if (text !== null && !media.length) {
    elements.push(textElement("pre", text, "text"));
  } else if (!(media.length && isAsset(value))) {
    elements.push(textElement("pre", JSON.stringify(shorten(value), null, 2)));
  }
  return elements;
}

// The text of {"text": "..."} and its like: a struct of one text; else null.
export function soleText(value) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return null;
  const values = Object.values(value);
  return values.length === 1 && typeof values[0] === "string" && !fromBase64(values[0]) ? values[0] : null;
}

export function hasMedia(value) {
  return !mediaIn(value).next().done;
}

export function textElement(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

export function gallery(media) {
  const element = document.createElement("div");
  element.className = "media";
  for (const { url, type, name } of media) element.append(figure(url, type, name));
  return element;
}

function* mediaIn(value) {
  if (typeof value === "string") {
    const found = fromBase64(value);
    if (found) yield found;
  } else if (isAsset(value)) {
    const isUrl = /^https?:/.test(value.ref);
    const url = isUrl ? value.ref : `/v1/files/${value.ref.split("/").map(encodeURIComponent).join("/")}`;
    yield { url, type: value.mime_type ?? guess(value.ref), name: value.ref };
  } else if (value !== null && typeof value === "object") {
    for (const item of Object.values(value)) yield* mediaIn(item);
  }
}

function isAsset(value) {
  return value !== null && typeof value === "object" && typeof value.ref === "string" && "sha256" in value;
}

function figure(url, type, name) {
  const element = document.createElement("figure");
  const kind = type.split("/")[0];
  if (kind === "image") {
    const image = document.createElement("img");
    image.src = url;
    image.alt = name || "the output as a picture";
    element.append(image);
  } else if (kind === "audio" || kind === "video") {
    const player = document.createElement(kind);
    player.controls = true;
    player.src = url;
    element.append(player);
  }
  const caption = document.createElement("figcaption");
  const link = document.createElement("a");
  link.href = url;
  link.target = "_blank";
  link.rel = "noopener";
  link.textContent = name || type;
  if (url.startsWith("data:")) link.download = `output.${type.split("/")[1]}`;
  caption.append(link);
  element.append(caption);
  return element;
}

function guess(ref) {
  const extension = ref.split(".").pop().toLowerCase();
  const types = {
    png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", gif: "image/gif", webp: "image/webp",
    wav: "audio/wav", mp3: "audio/mpeg", ogg: "audio/ogg", flac: "audio/flac", mp4: "video/mp4", webm: "video/webm",
  };
  return types[extension] ?? "application/octet-stream";
}

// Bytes come as base64; what they are is told by how they begin.
function fromBase64(text) {
  if (text.length < MEDIA_TEXT || !/^[A-Za-z0-9+/]{64}/.test(text)) return null;
  let head;
  try {
    head = atob(text.slice(0, 64));
  } catch {
    return null;
  }
  const type = sniff(head);
  return type && { url: `data:${type};base64,${text}`, type, name: "" };
}

function sniff(head) {
  if (head.startsWith("\x89PNG")) return "image/png";
  if (head.startsWith("\xff\xd8\xff")) return "image/jpeg";
  if (head.startsWith("GIF8")) return "image/gif";
  if (head.startsWith("RIFF")) return head.slice(8, 12) === "WEBP" ? "image/webp" : "audio/wav";
  if (head.startsWith("ID3")) return "audio/mpeg";
  if (head.startsWith("OggS")) return "audio/ogg";
  if (head.startsWith("fLaC")) return "audio/flac";
  if (head.slice(4, 8) === "ftyp") return "video/mp4";
  if (head.startsWith("\x1a\x45\xdf\xa3")) return "video/webm";
  return null;
}

function shorten(value) {
  if (typeof value === "string" && value.length > LONG) return `${value.slice(0, 60)}… (${value.length} characters)`;
  if (typeof value === "string" && fromBase64(value)) return `(${value.length} characters of base64)`;
  if (Array.isArray(value)) return value.map(shorten);
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, shorten(item)]));
  }
  return value;
}
