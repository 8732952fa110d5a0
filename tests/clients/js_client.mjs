/** What the JavaScript client sees of a real server, told as JSON: `node js_client.mjs URL OWNER READER SLOW DEAD_URL`. */

import { Client } from "../../clients/js/abmll.js";

const [url, owner, reader, slow, deadUrl] = process.argv.slice(2);
const client = new Client({ url, key: owner });
const options = ["up", "down"];
const question = { options, draws: 4 };
const seen = {};

/** The error that a call ends with. */
async function errorOf(call) {
  try {
    await call();
  } catch (error) {
    const { name, message, status, type, field, retryAfter } = error;
    return { name, message, status, type, field, retryAfter };
  }
  return null;
}

async function collect(items) {
  const found = [];
  for await (const item of items) found.push(item);
  return found;
}

/** Whether a job is still waited for a while later, where it is asked after only in `poll` seconds. */
async function stillWaits(poll) {
  const leaving = new AbortController();
  const waiting = errorOf(() => client.wait(queued, { poll, signal: leaving.signal }));
  setTimeout(() => leaving.abort(), 50);
  return (await waiting)?.name === "AbortError";
}

// First: whoever teaches may still be starting.
const examples = [
  { prompt: "make it brighter in here", options, answer: "up" },
  { prompt: "dim the lamp please", options, answer: 1 },
];
const queued = await client.adapt("lights", examples, { steps: 2 });

seen.healthy = [await client.healthy(), await client.ready(), await new Client({ url: deadUrl }).healthy()];
seen.answer = await client.generate("it is too dark to read", question);
seen.again = await client.generate("it is too dark to read", question);

const parts = await collect(client.stream("what is the capital of france", { max_tokens: 6, tokens: true }));
seen.stream = { tokens: parts.slice(0, -1), answer: parts.at(-1) };
const slowReader = new Client({ url, key: owner, timeout: 3 });
seen.unhurried = [];
for await (const part of slowReader.stream("what is the capital of france", { max_tokens: 2 })) {
  seen.unhurried.push("request_id" in part);
  if (seen.unhurried.length === 1) await new Promise((resolve) => setTimeout(resolve, 3300));
}
seen.jobs = (await client.jobs()).map(({ job }) => job).includes(queued.job);
seen.score = await client.score("what is the capital of france", "it is Paris");

const leaving = client.stream("tell me a long story", { max_tokens: 512 });
for await (const part of leaving) {
  seen.left = part;
  break;
}

seen.early = await errorOf(() => client.wait(queued, { timeout: 0, poll: 0.01 }));
const statuses = await collect(client.follow(queued, { poll: 0.02 }));
seen.statuses = statuses.map(({ status }) => status);
seen.job = await client.wait(statuses.at(-1));
seen.cancelled = (await client.cancel(queued.job)).status;
const long = await client.adapt("lights", examples, { steps: 1000 });
await client.cancel(long.job);
seen.stopped = await errorOf(() => client.wait(long.job, { poll: 0.02 }));

seen.tasks = (await client.tasks()).map(({ task }) => task);
seen.taught = await client.generate("it is too dark to read", { ...question, task: "lights" });
seen.feedback = await client.feedback(seen.taught, { answer: "up" });
seen.reliability = await client.reliability("lights", { version: 1 });
seen.served = (await client.serve("lights", 1)).serving;
seen.unserved = (await client.serve("lights", null)).serving;
const patient = new Client({ url, key: owner, timeout: Infinity });
const ages = new Client({ url, key: owner, timeout: 1e9 });
seen.patient = [await patient.ready(), await ages.ready(), await stillWaits(1e9), await stillWaits(Infinity)];
seen.metrics = (await client.metrics()).includes("abmll_engine_up 1.0");

const broken = new AbortController();
setTimeout(() => broken.abort(), 20);
const endless = { max_tokens: 512, signal: broken.signal };
const slowly = new Client({ url, key: slow });
await slowly.tasks();
seen.errors = {
  noKey: await errorOf(() => new Client({ url }).tasks()),
  noRight: await errorOf(() => new Client({ url, key: reader }).adapt("lights", examples)),
  tooOften: await errorOf(() => slowly.tasks()),
  noTask: await errorOf(() => client.task("none/such")),
  noSuchVersion: await errorOf(() => client.generate("x", { task: "lights", version: 99 })),
  blank: await errorOf(() => client.generate(" ")),
  badExample: await errorOf(() => client.adapt("lights", [examples[0], { ...examples[1], answer: "left" }])),
  streamed: await errorOf(() => collect(client.stream(" "))),
  uncalibrated: await errorOf(() => client.recalibrate("lights")),
  aborted: await errorOf(() => client.generate("tell me a story", endless)),
  late: await errorOf(() => new Client({ url, key: owner, timeout: 0.02 }).generate("a story", { max_tokens: 512 })),
  dead: await errorOf(() => new Client({ url: deadUrl }).generate("x")),
  noNumber: await errorOf(() => client.generate("x", { options, abstain_below: NaN })),
  noUrl: await errorOf(async () => new Client({ url: "nonsense" })),
};
await client.deleteTask("lights");
seen.left_tasks = (await client.tasks()).map(({ task }) => task);
process.stdout.write(JSON.stringify(seen));
