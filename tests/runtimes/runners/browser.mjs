// Runs ONNX files by onnxruntime-web in Chromium: `node browser.mjs MODULES ort.webgpu.min.mjs webgpu`.
// Reads a line of JSON for each request, {load: path} or {run: {name: [type, shape, base64]}}, and writes one for each
// answer, {ok: true}, {results: [[type, shape, base64], ...]} or {error: text}.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { createInterface } from "node:readline";

import { open } from "../../../examples/browser/chromium.mjs";

const [modules, build, provider] = process.argv.slice(2);
const { browser, page, close } = await open(join(modules, "onnxruntime-web", "dist"), modules);

const load = async ([build, provider, bytes]) => {
  const ort = (globalThis.ort ??= await import(`/${build}`));
  ort.env.wasm.wasmPaths = "/";
  ort.env.wasm.numThreads = 1;
  const model = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0));
  globalThis.session = await ort.InferenceSession.create(model, { executionProviders: [provider] });
};

const run = async (given) => {
  const arrays = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array };
  const feeds = {};
  for (const [name, [type, dims, data]] of Object.entries(given)) {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    feeds[name] = new ort.Tensor(type, type === "bool" ? bytes : new arrays[type](bytes.buffer), dims);
  }
  const found = await session.run(feeds);
  return session.outputNames.map((name) => {
    const { type, dims, data } = found[name];
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    return [type, dims, btoa(String.fromCharCode(...bytes))];
  });
};

console.log(JSON.stringify({ version: browser.version() }));
for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  try {
    if (request.load) {
      await page.evaluate(load, [build, provider, (await readFile(request.load)).toString("base64")]);
      console.log(JSON.stringify({ ok: true }));
    } else console.log(JSON.stringify({ results: await page.evaluate(run, request.run) }));
  } catch (error) {
    console.log(JSON.stringify({ error: String(error.message ?? error) }));
  }
}
await close();
