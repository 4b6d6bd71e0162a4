// Watches a training as a person does: opens the page, sees it go on and end. Prints what it saw as JSON.
//
//     node watch.mjs NODE_MODULES CHROMIUM URL PICTURES
//
// Prints "open" once the first step is seen; the training may then go on. Ends when the server does.

import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, executablePath, url, pictures] = process.argv.slice(2);
const require = createRequire(join(modules, "none.js"));
const { chromium } = (await import(pathToFileURL(require.resolve("playwright-core")))).default;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
const elsewhere = [], errors = [];
page.on("request", (request) => request.url().startsWith(new URL(url).origin) || elsewhere.push(request.url()));
page.on("pageerror", (error) => errors.push(error.message));
// Asked from here: the page's policy forbids what waitForFunction does in it.
async function until(expression) {
  while (!(await page.evaluate(expression))) await new Promise((again) => setTimeout(again, 50));
}
const headline = () => page.textContent("h1");

await page.goto(url);
await until("document.querySelector('h1').textContent.startsWith('Step ')");
const seen = { first: await headline(), charts: await page.locator("figure").count() };
await page.screenshot({ path: join(pictures, "light.png"), fullPage: true });
console.log("open");
await until("document.querySelector('h1').textContent.startsWith('Finished')");
seen.last = await headline();
seen.title = await page.title();
seen.log = await page.locator(".log li:last-child span").textContent();
await page.emulateMedia({ colorScheme: "dark" });
await page.setViewportSize({ width: 390, height: 844 });
await page.screenshot({ path: join(pictures, "dark.png"), fullPage: true });
seen.overflow = await page.evaluate("document.documentElement.scrollWidth > innerWidth");
seen.notice = await page.isVisible(".lost");
console.log("done");
await until("document.body.dataset.connection === 'off'");
seen.lost = await page.isVisible(".lost");
console.log(JSON.stringify({ ...seen, elsewhere, errors }));
await browser.close();
