// Runs the page that make_page.py wrote in Chromium without a screen, prints its figures, and takes a picture:
// `node examples/browser/look.mjs page node_modules page.png`. WebGPU is a software adapter's.

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const [folder, modules, picture] = process.argv.slice(2);
const { chromium } = createRequire(join(resolve(modules), "x.js"))("playwright-core");
const KINDS = { html: "text/html", mjs: "text/javascript", wasm: "application/wasm", json: "application/json" };

const server = createServer(async (request, response) => {
  const name = request.url.slice(1) || "index.html";
  try {
    const body = await readFile(join(folder, name));
    response.writeHead(200, { "content-type": KINDS[name.split(".").pop()] ?? "application/octet-stream" }).end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"],
});
try {
  const page = await browser.newPage({ viewport: { width: 1000, height: 760 } });
  page.setDefaultTimeout(300_000);
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  await page.waitForFunction(() => document.querySelector("#status").textContent === "ready");
  const rows = await page.evaluate(() => window.play(false));
  if (picture) await page.screenshot({ path: picture });
  console.log(JSON.stringify({ chromium: browser.version(), rows }));
} finally {
  await browser.close();
  server.close();
}
