/**
 * Makes the type declarations: `schema.d.ts` from a running server's OpenAPI page, the others from the code's comments.
 *
 *     node types.mjs [URL]           makes them anew; fetches the two tools below from npm
 *     node types.mjs --check [URL]   says whether they are current; fetches nothing
 */

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const TOOLS = ["openapi-typescript@7.13.0", "typescript@5.9.3"];
const SOURCES = ["abmll.js", "connection.js", "errors.js", "events.js"];
const DECLARED = ["abmll.d.ts", "connection.d.ts", "errors.d.ts"]; // all that abmll.d.ts leads to
// With typescript's rules for a library that others compile: strict, and nothing of Node's.
const RULES = "--allowJs --checkJs --strict --noUncheckedIndexedAccess --noPropertyAccessFromIndexSignature";
const TARGET = "--target es2022 --module nodenext --moduleResolution nodenext --lib es2022,dom,dom.asynciterable";

const here = import.meta.dirname ?? new URL(".", import.meta.url).pathname;
const words = process.argv.slice(2);
const checking = words.includes("--check");
const url = (words.find((word) => !word.startsWith("--")) ?? "http://127.0.0.1:8000").replace(/\/+$/, "");

const page = await read(`${url}/openapi.json`);
const schemas = inOrder(page.components.schemas);
const marks = { "schema.d.ts": mark(schemas), "abmll.d.ts": mark(SOURCES.map(source)) };
if (checking) check();
else make();

function check() {
  const stale = Object.entries(marks).filter(([name, line]) => !source(name).startsWith(line));
  if (stale.length === 0) return;
  console.error(`${stale.map(([name]) => name).join(", ")}: not current; start a server, then \`npm run types\``);
  process.exitCode = 1;
}

function make() {
  const folder = mkdtempSync(join(tmpdir(), "abmll-types-"));
  try {
    const forms = { ...page, paths: {}, components: { schemas } };
    writeFileSync(join(folder, "openapi.json"), JSON.stringify(forms));
    run("openapi-typescript", join(folder, "openapi.json"), "--output", "schema.d.ts");
    const rules = `${RULES} ${TARGET} --declaration --emitDeclarationOnly --outDir`.split(" ");
    run("tsc", ...rules, folder, ...SOURCES);
    for (const name of DECLARED) writeFileSync(join(here, name), readFileSync(join(folder, name)));
  } finally {
    rmSync(folder, { recursive: true });
  }
  for (const [name, line] of Object.entries(marks)) writeFileSync(join(here, name), `${line}\n${source(name)}`);
}

/**
 * @param {string} tool
 * @param {string[]} words
 */
function run(tool, ...words) {
  const packages = TOOLS.flatMap((name) => ["--package", name]);
  execFileSync("npx", ["--yes", ...packages, "--", tool, ...words], { cwd: here, stdio: "inherit" });
}

/** @param {string} address */
async function read(address) {
  try {
    return await (await fetch(address)).json();
  } catch (error) {
    console.error(`${address} cannot be read (${error}); start a server, or name another's address`);
    process.exit(1);
  }
}

/** @param {string} name */
function source(name) {
  return existsSync(join(here, name)) ? readFileSync(join(here, name), "utf8") : "";
}

/** @param {unknown} content */
function mark(content) {
  const hash = createHash("sha256").update(JSON.stringify(content)).digest("hex");
  return `// Made by types.mjs from what has the hash ${hash}`;
}

/**
 * The same value with every object's fields in one order.
 *
 * @param {any} value
 * @returns {any}
 */
function inOrder(value) {
  if (Array.isArray(value)) return value.map(inOrder);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.keys(value)
      .sort()
      .map((key) => [key, inOrder(value[key])]),
  );
}
