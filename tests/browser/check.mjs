// Open every page of a folder in headless Chromium, as light, dark and on paper: no errors, no requests, nothing that axe calls
// serious or critical, nothing wider than a phone, every scrollable region reachable by keyboard. Screenshots stay in the folder.
import { readFileSync, readdirSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const folder = resolve(process.argv[2]);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const LARGEST = 1_000_000; // bytes
const DESK = { width: 1280, height: 900 };
const PHONE = { width: 360, height: 740 };
let passed = 0;
const failures = [];

function check(page, what, found) {
  const wrong = Array.isArray(found) ? found : found ? [] : ["no"];
  if (wrong.length) failures.push(`${page}: ${what}: ${wrong.join("; ")}`);
  else passed += 1;
}

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
try {
  for (const name of readdirSync(folder).filter((file) => file.endsWith(".html")).sort()) {
    const file = join(folder, name);
    const stem = join(folder, name.replace(/\.html$/, ""));
    check(name, "smaller than 1 MB", statSync(file).size < LARGEST);
    const page = await browser.newPage();
    const errors = [];
    const requests = [];
    page.on("console", (message) => ["error", "warn"].includes(message.type()) && errors.push(message.text()));
    page.on("pageerror", (error) => errors.push(String(error)));
    page.on("request", (request) => requests.push(request.url()));
    for (const [look, media, scheme] of [["light", "screen", "light"], ["dark", "screen", "dark"], ["print", "print", "light"]]) {
      await page.setViewport(DESK);
      await page.emulateMediaType(media);
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await page.goto(pathToFileURL(file).href);
      await page.screenshot({ path: `${stem}-${look}.png`, fullPage: true });
      await page.evaluate(axe);
      const { violations, passes } = await page.evaluate(() => globalThis.axe.run());
      const serious = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
      check(name, `axe, ${look}`, serious.map(({ id, nodes }) => `${id} (${nodes.length}: ${nodes[0].html.slice(0, 120)})`));
      check(name, `axe has looked, ${look}`, passes.length > 15);
      for (const { id, impact, nodes } of violations) console.log(`  ${name}, ${look}: ${impact} ${id} (${nodes.length})`);
    }
    await page.pdf({ path: `${stem}-print.pdf`, format: "A4", margin: { top: "12mm", bottom: "12mm", left: "12mm", right: "12mm" } });
    await page.emulateMediaType("screen");
    await page.setViewport(PHONE);
    check(name, "no wider than a phone", await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth));
    await page.screenshot({ path: `${stem}-phone.png` });
    const missed = await page.evaluate(() =>
      [...document.querySelectorAll("*")]
        .filter((each) => each.scrollWidth > each.clientWidth && getComputedStyle(each).overflowX === "auto" && each.tabIndex < 0)
        .map((each) => each.className),
    );
    check(name, "what scrolls can be reached by keyboard", missed);
    await page.keyboard.press("Tab");
    check(name, "the first stop skips to the content", await page.evaluate(() => document.activeElement.className === "skip"));
    check(name, "no errors in the console", errors);
    check(name, "no requests", requests.filter((url) => url !== pathToFileURL(file).href && !url.startsWith("data:")));
    await page.close();
  }
} finally {
  await browser.close();
}
for (const failure of failures) console.log(failure);
console.log(`${passed} passed, ${failures.length} failed`);
process.exit(failures.length || !passed ? 1 : 0);
