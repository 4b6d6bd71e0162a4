// Transformers.js, asked on standard input: a request in JSON a line, { kind: "greedy" | "logits", ids, tokens }, an
// answer a line, { result } or { error }. The first line that it writes says what runs.
//
//     node transformersjs.mjs NODE_MODULES node FOLDER          an ONNX folder, in node
//     node transformersjs.mjs NODE_MODULES wasm|webgpu URL      a page that `export web` made, in Chromium

import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [modules, device, target] = process.argv.slice(2);
const require = createRequire(join(modules, "none.js"));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const version = (name) => JSON.parse(readFileSync(join(modules, name, "package.json"))).version;
const transformers = `Transformers.js ${version("@huggingface/transformers")}`;
const base64 = (floats) => Buffer.from(floats.buffer, floats.byteOffset, floats.byteLength).toString("base64");

async function inNode() {
  const { env, AutoModelForCausalLM, Tensor } = (await load("@huggingface/transformers")).default;
  env.allowRemoteModels = false;
  env.localModelPath = dirname(target) + "/";
  const model = await AutoModelForCausalLM.from_pretrained(basename(target), { dtype: "q4" });
  const int64 = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const inputs = (ids) => ({ input_ids: int64(ids), attention_mask: int64(ids.map(() => 1)) });
  const kinds = {
    async greedy({ ids, tokens }) {
      const made = await model.generate({ ...inputs(ids), do_sample: false, eos_token_id: -1, max_new_tokens: tokens });
      return Array.from(made.data.slice(ids.length), Number);
    },
    logits: async ({ ids }) => base64((await model(inputs(ids))).logits.data),
  };
  const about = `${transformers}, node ${process.versions.node}`;
  return { about, answer: ({ kind, ...body }) => kinds[kind](body), end: () => {} };
}

function chromium() {
  for (const name of ["chromium", "chromium-headless-shell", "google-chrome"])
    try {
      return execFileSync("which", [name], { encoding: "utf8" }).trim();
    } catch {}
  throw new Error("no Chromium found: apt-get install chromium");
}

export const FLAGS = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];

async function inBrowser() {
  const playwright = (await load("playwright-core")).default;
  const browser = await playwright.chromium.launch({ executablePath: chromium(), args: FLAGS });
  const page = await browser.newPage();
  page.setDefaultTimeout(0);
  await page.goto(`${target}/?device=${device}`);
  // the page's policy forbids what waitForFunction does in it
  while (!(await page.evaluate("document.body.dataset.state"))) await new Promise((again) => setTimeout(again, 50));
  if ((await page.evaluate("document.body.dataset.state")) !== "ready")
    throw new Error(await page.textContent("#status"));
  const answer = (request) =>
    page.evaluate(async ({ kind, ...body }) => {
      const result = await window.intaglio.call(kind, body);
      if (!(result instanceof Float32Array)) return result;
      const blob = new Blob([result]);
      const reader = new FileReader();
      await new Promise((done) => (reader.onload = done, reader.readAsDataURL(blob)));
      return reader.result.slice(reader.result.indexOf(",") + 1);
    }, request);
  const about = `${transformers}, Chromium ${browser.version()}, ${device}`;
  return { about, answer, end: () => browser.close() };
}

const say = (message) => process.stdout.write(JSON.stringify(message) + "\n");
try {
  const { about, answer, end } = await (device === "node" ? inNode() : inBrowser());
  say({ result: about });
  for await (const line of createInterface({ input: process.stdin })) say({ result: await answer(JSON.parse(line)) });
  await end();
} catch (error) {
  say({ error: String(error?.stack ?? error) });
}
process.exit(0);
