/** Reliability diagram and risk-coverage curve, each with its numbers in a table. */

import { h, newId, svg, table } from "../elements.js";
import { percent, several } from "../figures.js";

const [WIDTH, HEIGHT] = [360, 300];
const EDGE = { left: 46, right: 12, top: 12, bottom: 42 };
const x = (/** @type {number} */ share) => EDGE.left + share * (WIDTH - EDGE.left - EDGE.right);

/**
 * @param {string} title
 * @param {any} found What the server tells; null where it knows nothing.
 * @param {string} nothing What to say then.
 */
export function curves(title, found, nothing) {
  if (found === null) return h("section", {}, h("h3", {}, title), h("p", { class: "empty" }, nothing));
  return h(
    "section",
    {},
    h("h3", {}, `${title}: ${several(found.answers, "answer")}`),
    h("div", { class: "charts" }, reliability(found.bins), riskCoverage(found.risk_coverage)),
  );
}

/** @param {{low: number, high: number, count: number, confidence: number, accuracy: number}[]} bins */
function reliability(bins) {
  const y = scale(1);
  const most = Math.max(...bins.map(({ count }) => count));
  const marks = bins.flatMap(({ confidence, accuracy, count }) => [
    svg("line", { class: "gap", x1: x(confidence), y1: y(confidence), x2: x(confidence), y2: y(accuracy) }),
    svg("circle", { class: "point", cx: x(confidence), cy: y(accuracy), r: 3 + 6 * Math.sqrt(count / most) }),
  ]);
  const ideal = svg("line", { class: "ideal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) });
  const rows = bins.map(({ low, high, count, confidence, accuracy }) => [
    `${percent(low, 0)} to ${percent(high, 0)}`,
    `${count}`,
    percent(confidence),
    percent(accuracy),
  ]);
  return figure(
    "Said and right",
    "Each dot: answers of about the same confidence, larger the more. On the line, as many are right as was said.",
    frame(1, "confidence", "right", [ideal, ...marks]),
    table(
      "Confidence and share of right answers",
      ["Confidence", "Answers", "Mean confidence", "Right"],
      rows,
      "figures",
    ),
  );
}

/** @param {{coverage: number, risk: number}[]} points */
function riskCoverage(points) {
  const highest = Math.min(1, Math.max(0.1, Math.ceil(10 * Math.max(...points.map(({ risk }) => risk))) / 10));
  const y = scale(highest);
  const line = points.map(({ coverage, risk }) => `${x(coverage)},${y(risk)}`).join(" ");
  const last = points.at(-1);
  const end = last && svg("circle", { class: "point", cx: x(last.coverage), cy: y(last.risk), r: 4 });
  const rows = points.map(({ coverage, risk }) => [percent(coverage, 0), percent(risk)]);
  return figure(
    "Wrong, if only the surest are answered",
    "From the surest answers alone, at the left, to all of them, at the right.",
    frame(highest, "answered", "wrong", [svg("polyline", { class: "curve", points: line }), end]),
    table("Share of wrong answers by share answered", ["Answered", "Wrong"], rows, "figures"),
  );
}

/** @param {number} highest */
function scale(highest) {
  return (/** @type {number} */ share) => HEIGHT - EDGE.bottom - (share / highest) * (HEIGHT - EDGE.top - EDGE.bottom);
}

/**
 * @param {number} highest Of the vertical axis.
 * @param {string} across
 * @param {string} up
 * @param {any[]} marks
 */
function frame(highest, across, up, marks) {
  const y = scale(highest);
  const quarters = [0, 0.25, 0.5, 0.75, 1];
  const lines = quarters.flatMap((share) => [
    svg("line", { class: "rule", x1: x(0), x2: x(1), y1: y(share * highest), y2: y(share * highest) }),
    svg("text", { x: x(share), y: HEIGHT - EDGE.bottom + 17, "text-anchor": "middle" }, `${100 * share}`),
    svg(
      "text",
      { x: EDGE.left - 7, y: y(share * highest) + 4, "text-anchor": "end" },
      `${+(100 * share * highest).toFixed(1)}`,
    ),
  ]);
  const middle = (HEIGHT - EDGE.bottom + EDGE.top) / 2;
  return svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img" },
    ...lines,
    ...marks,
    svg("text", { class: "name", x: (x(0) + x(1)) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, `${across}, %`),
    svg(
      "text",
      { class: "name", transform: `translate(11 ${middle}) rotate(-90)`, "text-anchor": "middle" },
      `${up}, %`,
    ),
  );
}

/**
 * @param {string} title
 * @param {string} explained
 * @param {SVGElement} chart
 * @param {Node} numbers
 */
function figure(title, explained, chart, numbers) {
  const [name, text] = [newId(), newId()];
  chart.setAttribute("aria-labelledby", name);
  chart.setAttribute("aria-describedby", text);
  return h(
    "figure",
    {},
    h("figcaption", {}, h("strong", { id: name }, title), h("span", { class: "hint", id: text }, explained)),
    chart,
    h("details", {}, h("summary", {}, "The numbers"), numbers),
  );
}
