// Runs the page that make_page.py wrote in Chromium without a screen, prints its figures, and takes a picture:
// `node examples/browser/look.mjs page node_modules page.png run`; `listen` presses "Run and listen", at the sound's pace.

import { open } from "./chromium.mjs";

const [folder, modules, picture, button = "run"] = process.argv.slice(2);
const { browser, page, close } = await open(folder, modules, { viewport: { width: 1000, height: 760 } });
try {
  page.setDefaultTimeout(300_000);
  await page.waitForFunction(() => document.querySelector("#status").textContent === "ready");
  await page.click(`#${button}`);
  await page.waitForFunction(() => !/^(ready|running)$/.test(document.querySelector("#status").textContent));
  const told = await page.textContent("#status");
  if (told !== "done") throw new Error(told);
  const rows = await page.evaluate(() => window.rows);
  if (picture) await page.screenshot({ path: picture });
  console.log(JSON.stringify({ chromium: browser.version(), rows }));
} finally {
  await close();
}
