// One card for each model: what it answers, what early exits save, and which exits are taken.

import { post } from "./client.js";
import { between, quantile, rates } from "./window.js";
import { NONE, count, el, macs, percent, rate, seconds, us, write } from "./text.js";

const SPARK_POINTS = 60;
const LOAD_TIMEOUT_MS = 600000;
const ENGINES = { ort: "ONNX Runtime", openvino: "OpenVINO", trt: "TensorRT", "trt-rtx": "TensorRT for RTX" };
const cards = new Map();

export function showModels(parent, history, sinceStart, changed) {
  const stats = history.newest.stats;
  const names = [...new Set([...stats.models, ...stats.repository].map(({ name }) => name))].sort();
  for (const name of cards.keys()) {
    if (!names.includes(name)) {
      cards.get(name).element.remove();
      cards.delete(name);
    }
  }
  for (const name of names) {
    if (!cards.has(name)) cards.set(name, new Card(name, parent, changed));
    const known = stats.repository.filter((entry) => entry.name === name);
    cards.get(name).show(
      stats.models.find((model) => model.name === name),
      known,
      history.model(name),
      sinceStart,
    );
  }
  if (!names.length) write(parent, "No model is in service.");
}

class Card {
  constructor(name, parent, changed) {
    this.name = name;
    this.changed = changed;
    this.chip = el("span", { className: "chip" });
    this.facts = el("p", { className: "facts" });
    this.button = el("button", { type: "button", onclick: () => this.load() });
    this.problem = el("p", { className: "wrong", role: "status" });
    this.figures = Object.fromEntries(FIGURES.map(([key, title]) => [key, figure(title)]));
    this.spark = spark();
    this.figures.answers.element.append(this.spark.element);
    this.stack = el("div", { className: "stack", "aria-hidden": "true" });
    this.rows = el("tbody");
    this.note = el("p", { className: "note" });
    const head = EXIT_COLUMNS.map((title, k) => el("th", { scope: "col", className: k ? "number" : "" }, title));
    this.body = el(
      "div",
      {},
      el("div", { className: "figures" }, ...Object.values(this.figures).map((one) => one.element)),
      el("h4", {}, "Exits taken"),
      this.stack,
      el(
        "table",
        { className: "exits" },
        el("caption", { className: "hidden" }, `Exits of ${name}`),
        el("thead", {}, el("tr", {}, ...head)),
        this.rows,
      ),
      this.note,
    );
    const title = el("h3", {}, name);
    this.element = el(
      "article",
      { className: "card model", "aria-label": `Model ${name}` },
      el("header", {}, el("div", {}, el("div", { className: "title" }, title, this.chip), this.facts), this.button),
      this.problem,
      this.body,
    );
    parent.append(this.element);
  }

  show(model, known, entries, sinceStart) {
    Object.assign(this, { model, known });
    const refused = known.filter(({ state, reason }) => reason && (model || state !== "READY"));
    this.body.hidden = !model;
    this.state(model, known);
    if (!this.loading) {
      write(this.button, model ? "Load newest version" : "Load");
      const reasons = refused.map(({ version, state, reason }) =>
        state === "READY"
          ? `Version ${version}: ${reason}`
          : model
            ? `Version ${version} is not in service: ${reason}`
            : reason,
      );
      if (!this.failed || !model)
        write(this.problem, reasons.filter((one) => one !== "unloaded" && one !== "not loaded").join(" "));
    }
    if (!model) return;
    const engine = `${ENGINES[model.engine] ?? model.engine} ${model.precision}`;
    const threads = model.threads === 1 ? "1 thread" : `${model.threads} threads`;
    write(
      this.facts,
      `Version ${model.version} · budget ${model.budget} · ${engine}, ${threads} · ${count(model.classes)} classes`,
    );
    this.show_figures(model, entries, sinceStart);
  }

  state(model, known) {
    const state = this.loading
      ? "loading"
      : model
        ? "in service"
        : known[0]?.reason === "unloaded"
          ? "unloaded"
          : "not in service";
    write(this.chip, state);
    this.chip.dataset.state = this.loading ? "busy" : model ? "good" : "off";
    write(this.facts, model ? this.facts.textContent : known[0] ? `Version ${known[0].version}` : "");
  }

  show_figures(model, entries, sinceStart) {
    const done = between(sinceStart ? null : entries[0].model, model);
    const recent = rates(entries);
    const some = done.answers > 0;
    const now = recent.slice(-5).reduce((total, one) => total + one, 0) / Math.max(1, Math.min(5, recent.length));
    const q = [0.5, 0.95, 0.99].map((share) => latency(model.latency.le_s, done.latency, share));
    const all = model.exits.reduce((total, { answers }) => total + answers, 0);
    const figures = this.figures;
    figures.answers.show(`${rate(recent.length ? now : NaN)} /s`, `${count(all)} since the start`);
    const saved = 1 - done.macs / done.static_macs;
    figures.macs.show(
      some ? percent(saved) : NONE,
      some ? `${macs(done.macs / done.answers)} of ${macs(model.static_macs)} per answer` : "no answers yet",
    );
    const timed = model.static_us !== null;
    const time = 1 - done.profile_s / done.static_profile_s;
    const each = seconds(done.profile_s / done.answers);
    figures.time.show(
      timed && some ? percent(time) : NONE,
      !timed ? "budgets are in MACs here" : some ? `${each} of ${us(model.static_us)} per answer` : "no answers yet",
    );
    figures.latency.show(q[0], `p95\u00a0${q[1]}, p99\u00a0${q[2]}`);
    figures.unsure.show(
      some ? percent(done.unsure / done.answers) : NONE,
      `${count(done.unsure)} ${done.unsure === 1 ? "answer" : "answers"} withheld`,
    );
    figures.flight.show(count(model.in_flight), "requests");
    this.spark.show(recent.slice(-SPARK_POINTS));
    this.show_exits(model, done);
    this.rows.parentElement.classList.toggle("untimed", !timed);
    write(this.note, drift(model.drift));
    this.note.classList.toggle("wrong", Boolean(model.drift?.alarms));
  }

  show_exits(model, done) {
    if (this.rows.children.length !== model.exits.length) this.make_exits(model.exits.length);
    showStack(this.stack, done.exits);
    model.exits.forEach((exit, k) => {
      const share = done.answers ? done.exits[k] / done.answers : 0;
      const [name, part, answers, cost, time] = this.rows.children[k].children;
      write(name.lastChild, `Exit ${exit.exit}`);
      write(part, done.answers ? percent(share) : NONE);
      write(answers, count(done.exits[k]));
      write(cost, macs(exit.macs));
      write(time, us(exit.us));
    });
  }

  make_exits(number) {
    const row = (k) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, swatch(k, number), el("span")),
        ...EXIT_COLUMNS.slice(1).map(() => el("td", { className: "number" })),
      );
    this.rows.replaceChildren(...Array.from({ length: number }, (_, k) => row(k)));
  }

  async load() {
    this.loading = true;
    this.failed = false;
    this.button.disabled = true;
    write(this.problem, "");
    write(this.chip, "loading");
    this.chip.dataset.state = "busy";
    try {
      await post(`v2/repository/models/${encodeURIComponent(this.name)}/load`, "", LOAD_TIMEOUT_MS);
      this.changed(`${this.name}: the newest version was loaded`);
    } catch (error) {
      this.failed = true;
      write(this.problem, `Not loaded: ${error.message}`);
      this.changed(`${this.name}: not loaded`);
    }
    this.loading = false;
    this.button.disabled = false;
    this.state(this.model, this.known);
  }
}

const FIGURES = [
  ["answers", "Answers"],
  ["macs", "MACs saved"],
  ["time", "Time saved"],
  ["latency", "Latency, median"],
  ["unsure", "Unsure"],
  ["flight", "In flight"],
];
const EXIT_COLUMNS = ["Exit", "Share", "Answers", "MACs", "Time"];

function figure(title) {
  const value = el("p", { className: "value" });
  const more = el("p", { className: "more" });
  const element = el("div", { className: "figure" }, el("h4", {}, title), value, more);
  return {
    element,
    show: (text, rest) => {
      write(value, text);
      write(more, rest);
    },
  };
}

// The colour of an exit, from the first one to the last along one scale.
export function swatch(k, number) {
  const element = el("i", { className: "swatch", "aria-hidden": "true" });
  const share = number > 1 ? (100 * k) / (number - 1) : 0;
  element.style.background = `color-mix(in oklab, var(--first-exit), var(--last-exit) ${share}%)`;
  return element;
}

// The shares of the exits as one bar, from the answers at each exit.
export function showStack(stack, answers) {
  if (stack.children.length !== answers.length)
    stack.replaceChildren(...answers.map((_, k) => swatch(k, answers.length)));
  const total = answers.reduce((sum, one) => sum + one, 0);
  answers.forEach((one, k) => {
    stack.children[k].style.flexGrow = total ? one / total : 0;
    stack.children[k].hidden = !one;
  });
}

// A quantile of fewer requests than it needs says nothing.
function latency(edges, counts, share) {
  if (counts.at(-1) * (1 - share) < 1 && share > 0.5) return NONE;
  const s = quantile(edges, counts, share);
  return s === Infinity ? `>\u00a0${seconds(edges.at(-1))}` : seconds(s);
}

function drift(watch) {
  if (!watch) return "";
  const pair = `${count(watch.disagreed)} of ${count(watch.compared)}`;
  const compared = `${pair} early answers that were compared differ from the full network's`;
  return watch.alarms ? `Drift: the data has changed. ${compared}.` : `Drift watch: no alarm. ${compared}.`;
}

function spark() {
  const space = "http://www.w3.org/2000/svg";
  const element = document.createElementNS(space, "svg");
  const [area, line] = ["area", "line"].map((name) => {
    const path = document.createElementNS(space, "path");
    path.setAttribute("class", name);
    element.append(path);
    return path;
  });
  for (const [name, value] of [
    ["viewBox", `0 0 ${SPARK_POINTS} 20`],
    ["preserveAspectRatio", "none"],
    ["class", "spark"],
    ["aria-hidden", "true"],
  ])
    element.setAttribute(name, value);
  const show = (values) => {
    const most = Math.max(1e-9, ...values);
    const points = values.map(
      (value, k) => `${SPARK_POINTS - values.length + k + 0.5},${(19 - (17 * value) / most).toFixed(2)}`,
    );
    line.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
    area.setAttribute(
      "d",
      points.length > 1 ? `M${points.join("L")}L${SPARK_POINTS},20L${SPARK_POINTS - values.length + 0.5},20Z` : "",
    );
  };
  return { element, show };
}
