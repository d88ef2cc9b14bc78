// Files served to a page of Chromium without a screen; WebGPU is a software adapter's.

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { extname, join, resolve } from "node:path";

const KINDS = {
  ".html": "text/html",
  ".json": "application/json",
  ".mjs": "text/javascript",
  ".wasm": "application/wasm",
};

// Resolves to {browser, page, close}: a page at the root of `folder`, empty where there is no index.html.
// playwright-core is that of the folder `modules`; the environment's CHROMIUM names another program.
export async function open(folder, modules, options = {}) {
  const { chromium } = createRequire(join(resolve(modules), "x.js"))("playwright-core");
  const server = createServer(async (request, response) => {
    const name = request.url.slice(1) || "index.html";
    const body = await readFile(join(folder, name)).catch(() => name === "index.html" && "<!doctype html>");
    const headers = { "content-type": KINDS[extname(name)] ?? "application/octet-stream" };
    if (body === false) response.writeHead(404).end();
    else response.writeHead(200, headers).end(body);
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"],
  });
  const page = await browser.newPage(options);
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  const close = async () => {
    await browser.close();
    server.close();
  };
  return { browser, page, close };
}
