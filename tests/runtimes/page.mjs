// Uses a page as a person does: clicks, types, reads. Prints what it saw as JSON; leaves screenshots.
//
//     node page.mjs NODE_MODULES CHROMIUM URL PICTURES

import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, executablePath, url, pictures] = process.argv.slice(2);
const require = createRequire(join(modules, "none.js"));
const { chromium } = (await import(pathToFileURL(require.resolve("playwright-core")))).default;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1100, height: 760 } });
page.setDefaultTimeout(600_000);
const elsewhere = [], errors = [];
page.on("request", (request) => request.url().startsWith(new URL(url).origin) || elsewhere.push(request.url()));
page.on("pageerror", (error) => errors.push(error.message));
// Asked from here: the page's policy forbids what waitForFunction does in it.
async function until(expression) {
  while (!(await page.evaluate(expression))) await new Promise((again) => setTimeout(again, 50));
}
const ready = () => until("document.body.dataset.state === 'ready'");
const answers = () => page.locator("#messages .assistant .text").allTextContents();

await page.goto(url);
await until("document.body.dataset.state");
const seen = { state: await page.evaluate("document.body.dataset.state"), status: await page.textContent("#status") };
if (seen.state === "ready") {
  seen.title = await page.title();
  await page.screenshot({ path: join(pictures, "ready.png") });
  seen.sendable = await page.isEnabled("#send"); // nothing is typed yet
  await page.click("#input");
  await page.keyboard.type('What does "harbor" mean?');
  await page.click("#send", { force: true }); // it vanishes as soon as it is clicked, which an unforced click takes for a miss
  seen.busy = await page.evaluate("document.body.dataset.state");
  await ready();
  seen.first = (await answers())[0];
  seen.note = await page.textContent("#messages .assistant small");
  await page.keyboard.type("Tell me about the sea.\n"); // the field has the focus again
  await until("document.querySelectorAll('#messages .assistant .text')[1]?.textContent.length > 5");
  seen.growing = (await answers())[1];
  if (await page.isVisible("#stop")) await page.click("#stop");
  await ready();
  seen.second = (await answers())[1];
  seen.asked = await page.locator("#messages .user").allTextContents();
  await until("!['', 'measuring'].includes(document.getElementById('memory').textContent)");
  seen.figures = await page.innerText("#figures");
  seen.memory = await page.textContent("#memory");
  await page.screenshot({ path: join(pictures, "chat.png") });
  await page.emulateMedia({ colorScheme: "dark" });
  await page.setViewportSize({ width: 390, height: 760 });
  await page.screenshot({ path: join(pictures, "dark.png") });
  seen.overflow = await page.evaluate("document.documentElement.scrollWidth > innerWidth");
  await page.click("#new");
  seen.messages = await page.locator("#messages li").count();
  await page.click("#examples button");
  await until("document.querySelectorAll('#messages .assistant .text')[0]?.textContent.length > 0");
}
console.log(JSON.stringify({ ...seen, elsewhere, errors }));
await browser.close();
