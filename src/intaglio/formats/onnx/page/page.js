// The page: what is typed goes to the worker, what it writes goes on the screen.
//
// `?device=wasm` or `?device=webgpu` chooses for the browser; `?tokens=N` sets the longest answer.

const $ = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
const asked = new URLSearchParams(location.search);
const longest = Number(asked.get("tokens")) || 512;
const threads = Math.max(1, Math.min(8, navigator.hardwareConcurrency || 1));
const EXAMPLES = ["Who are you?", 'What does "harbor" mean?', "Tell me about the sea."];

let messages = []; // { role, content }, as the chat template wants them
let worker, stopFlag, calls = 0;
let sampling = null; // the model's settings for a sampled answer
const waiting = new Map(); // number of a call -> what to do with its answers

// One call of the worker: `onProgress` gets what it says meanwhile, the promise its last word.
function call(kind, body = {}, onProgress = () => {}) {
  const id = ++calls;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject, onProgress });
    worker.postMessage({ id, kind, ...body });
  });
}

function received({ data }) {
  const { resolve, reject, onProgress } = waiting.get(data.id);
  if (data.progress) return onProgress(data.progress);
  waiting.delete(data.id);
  data.error ? reject(new Error(data.error)) : resolve(data.result);
}

async function hasGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
}

function load(device, bytes) {
  worker?.terminate();
  waiting.clear();
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = received;
  worker.onerror = (event) => fail(new Error(event.message || "the worker could not be loaded"));
  return call("load", { device, threads, stopFlag, bytes }, ({ share, text }) => {
    $("bar").style.width = `${Math.round(100 * share)}%`;
    $("loading").setAttribute("aria-valuenow", Math.round(100 * share));
    $("status").textContent = text;
  });
}

async function start() {
  if (!crossOriginIsolated)
    throw new Error("This server does not send the two headers that the page needs. Start it with: python serve.py");
  const about = await (await fetch("model.json")).json();
  document.title = $("name").textContent = about.name;
  sampling = about.sampling;
  $("about").textContent = `recipe ${about.recipe}, exported by intaglio`;
  $("weights").textContent = megabytes(about.bytes);
  stopFlag = new Int32Array(new SharedArrayBuffer(4));
  const began = performance.now();
  const chosen = asked.get("device");
  let device = chosen ?? (about.devices.includes("webgpu") && (await hasGpu()) ? "webgpu" : "wasm");
  await load(device, about.bytes).catch((error) => {
    if (chosen || device === "wasm") throw error;
    console.warn(error);
    $("device").title = `WebGPU could not run this model: ${error.message}`;
    device = "wasm";
    return load(device, about.bytes);
  });
  $("device").textContent = device === "webgpu" ? "WebGPU" : `CPU, ${threads} thread${threads > 1 ? "s" : ""}`;
  $("status").textContent = `Ready after ${((performance.now() - began) / 1000).toFixed(1)} s`;
  $("bar").style.width = "100%";
  for (const text of EXAMPLES) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.onclick = () => ask(text);
    $("examples").append(button);
  }
  $("examples").hidden = false;
  ready();
  measureMemory();
}

function fail(error) {
  $("loading").classList.add("failed");
  $("status").textContent = error.message;
  $("input").placeholder = "The model could not be loaded";
  document.body.dataset.state = "failed";
}

function ready() {
  document.body.dataset.state = "ready";
  $("input").disabled = $("new").disabled = false;
  $("input").placeholder = "Write a message";
  $("send").hidden = !($("stop").hidden = true);
  typed();
  $("input").focus();
}

function busy() {
  document.body.dataset.state = "busy";
  $("new").disabled = true;
  $("send").hidden = !($("stop").hidden = false);
}

function typed() {
  $("send").disabled = !$("input").value.trim() || $("input").disabled;
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

function show(role, content) {
  const item = Object.assign(document.createElement("li"), { className: role });
  item.append(Object.assign(document.createElement("div"), { className: "text", textContent: content }));
  $("messages").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

async function ask(text) {
  if (document.body.dataset.state !== "ready") return;
  $("welcome").hidden = true;
  $("input").value = "";
  typed();
  busy();
  messages.push({ role: "user", content: text });
  show("user", text);
  const item = show("assistant", "");
  const body = item.firstChild;
  item.classList.add("writing");
  Atomics.store(stopFlag, 0, 0);
  let first, count = 0;
  try {
    const how = $("decoding").value === "sampled" ? sampling : null;
    await call("chat", { messages, sampling: how, longest }, ({ text, tokens }) => {
      body.textContent += text;
      count += tokens;
      first ??= { at: performance.now(), count };
      const seconds = (performance.now() - first.at) / 1000;
      if (count > first.count) $("speed").textContent = `${((count - first.count) / seconds).toFixed(1)} tokens/s`;
      if ($("messages").parentNode.scrollHeight - $("messages").parentNode.scrollTop < innerHeight + 200)
        item.scrollIntoView({ block: "end" });
    });
    messages.push({ role: "assistant", content: body.textContent });
    const stopped = Atomics.load(stopFlag, 0) ? ", stopped" : "";
    item.append(Object.assign(document.createElement("small"), { textContent: `${count} tokens, ${$("speed").textContent}${stopped}` }));
  } catch (error) {
    messages.pop();
    item.classList.add("wrong");
    body.textContent = error.message;
  }
  item.classList.remove("writing");
  item.scrollIntoView({ block: "end" });
  ready();
  measureMemory();
}

// Of the page with its workers; the browser answers when it has collected garbage, which may take a while.
async function measureMemory() {
  if (!performance.measureUserAgentSpecificMemory) return void ($("memory").textContent = "not told");
  $("memory").textContent = "measuring";
  try {
    $("memory").textContent = megabytes((await performance.measureUserAgentSpecificMemory()).bytes);
  } catch {
    $("memory").textContent = "not told"; // some browsers have the function and refuse it
  }
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (text) ask(text);
};
$("input").oninput = typed;
$("input").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
};
$("stop").onclick = () => Atomics.store(stopFlag, 0, 1);
$("new").onclick = () => {
  messages = [];
  $("messages").replaceChildren();
  $("welcome").hidden = false;
  $("input").focus();
};

window.intaglio = { call }; // for the console: await intaglio.call("greedy", { ids: [2, 651], tokens: 10 })
start().catch(fail);
