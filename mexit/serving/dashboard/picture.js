// "Drop a picture": the answer within a budget, and what every exit answers and why.

import { post } from "./client.js";
import { swatch } from "./models.js";
import { el, macs, percent, probability, us, write } from "./text.js";

const TYPED_MS = 150; // the slider rests this long before a request is sent
const SHOWN = 3;
const by = (id) => document.getElementById(id);
const REASONS = {
  last: "No earlier exit was confident enough, so the last exit answered.",
  deadline: "The deadline passed, so the deepest exit computed so far answered.",
  "rate-limit": "The rate limiter had no tokens for the next segment.",
  "max-exit": "Later exits were not allowed to answer.",
  unsure: "The score is below the reject threshold, so the answer is withheld.",
};

export class Picture {
  constructor() {
    this.models = [];
    this.budgets = new Map(); // model to the chosen budget, once moved
    this.number = 0;
    by("file").addEventListener("change", (event) => this.take(event.target.files[0]));
    const drop = by("drop");
    for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
      drop.addEventListener(name, (event) => {
        event.preventDefault();
        drop.classList.toggle("over", name === "dragenter" || name === "dragover");
      });
    }
    drop.addEventListener("drop", (event) => this.take(event.dataTransfer.files[0]));
    document.addEventListener("paste", (event) => this.take(event.clipboardData.files[0]));
    by("model").addEventListener("change", () => {
      this.show_budgets();
      this.soon(0);
    });
    by("budget").addEventListener("input", () => this.choose(Number(by("budget").value)));
  }

  // The models in service, from /v1/stats.
  offer(models) {
    const key = JSON.stringify(models.map(({ name, id, budgets, budget }) => [name, id, budgets, budget]));
    if (key === this.key) return;
    this.key = key;
    const before = by("model").value;
    this.models = models;
    by("model").replaceChildren(
      ...models.map(({ name }) => el("option", { value: name, selected: name === before }, name)),
    );
    by("model-field").hidden = models.length < 2;
    this.show_budgets();
    if (this.file) this.soon(0);
  }

  get model() {
    return this.models.find(({ name }) => name === by("model").value);
  }

  show_budgets() {
    const model = this.model;
    const slider = by("budget");
    slider.disabled = !model || !model.budgets.calibrated || model.budgets.lowest >= 1;
    if (!model) return;
    const { named, lowest, unit, calibrated } = model.budgets;
    slider.min = Math.min(100, Math.ceil(100 * lowest));
    const button = ([name, share]) =>
      el("button", { type: "button", onclick: () => this.choose(Math.round(100 * share), name) }, name);
    by("named").replaceChildren(...Object.entries(named).map(button));
    const what = unit === "us" ? "time" : "MACs";
    write(
      by("budget-note"),
      !calibrated
        ? "This bundle has no thresholds: only the budget full works. Run mexit calibrate."
        : lowest >= 1
          ? "Exit 1 costs as much as the static network here: every budget is full."
          : `Mean ${what} of a picture, as a share of the static network's.`,
    );
    this.set(...(this.budgets.get(model.name) ?? start(model.budget, named)));
  }

  choose(value, name) {
    this.set(value, name);
    if (this.model) this.budgets.set(this.model.name, [value, name]);
    this.soon(TYPED_MS);
  }

  set(value, name) {
    this.budget = name ?? (value >= 100 ? "full" : `${value}%`);
    by("budget").value = value;
    const text = name && name !== "full" ? `${name}, ${value} %` : `${value} %`;
    write(by("budget-text"), text);
    by("budget").setAttribute("aria-valuetext", text);
    for (const button of by("named").children) button.setAttribute("aria-pressed", button.textContent === this.budget);
  }

  take(file) {
    if (!file) return;
    this.file = file;
    const preview = by("preview");
    URL.revokeObjectURL(preview.src);
    preview.onload = () => {
      preview.hidden = false;
      write(by("drop-text"), file.name);
    };
    preview.onerror = () => {
      preview.hidden = true;
      write(by("drop-text"), file.name);
    }; // a format that browsers do not show
    preview.src = URL.createObjectURL(file);
    this.soon(0);
  }

  soon(ms) {
    clearTimeout(this.timer);
    if (this.file && this.model) this.timer = setTimeout(() => this.send(), ms);
  }

  async send() {
    const number = ++this.number;
    const model = this.model;
    const query = new URLSearchParams({ model: model.name, budget: this.budget });
    by("answer").setAttribute("aria-busy", "true");
    try {
      const explained = await post(`v1/explain?${query}`, this.file);
      query.set("receipts", "true");
      const answered = await post(`v1/classify?${query}`, this.file);
      if (number === this.number) by("answer").replaceChildren(...result(explained, answered));
    } catch (error) {
      if (number === this.number)
        by("answer").replaceChildren(el("p", { className: "wrong" }, `No answer: ${error.message}`));
    }
    if (number === this.number) by("answer").setAttribute("aria-busy", "false");
  }
}

// Where the slider begins: at the budget of the server, if it is a name or a share.
function start(budget, named) {
  if (named[budget]) return [Math.round(100 * named[budget]), budget];
  return budget.endsWith("%") ? [Math.round(parseFloat(budget))] : [100, "full"];
}

function result(explained, answered) {
  const number = explained.exits.length;
  const reached = explained.exits.findIndex(({ exit }) => exit === answered.exit);
  const label = answered.label ?? "unsure";
  const share = answered.macs / explained.static_macs;
  const { queue_us, segment_us } = answered.receipt;
  const computed = segment_us.reduce((total, one) => total + one, 0);
  const before = `${us(queue_us)} of waiting and decoding`;
  return [
    el("p", { className: "label" }, el("strong", {}, label), " ", el("span", {}, probability(answered.confidence))),
    el("p", {}, why(answered, explained)),
    el(
      "dl",
      { className: "costs" },
      ...entry("Cost", `${macs(answered.macs)} MACs, ${percent(share, 0)} of the static network`),
      ...entry("Time", `${us(computed)} in the network, after ${before}`),
    ),
    el("h3", { className: "hidden" }, "Every exit"),
    el("ol", { className: "ladder" }, ...explained.exits.map((exit, k) => step(exit, k, number, reached, explained))),
  ];
}

const entry = (name, text) => [el("dt", {}, name), el("dd", {}, text)];

function why(answered, explained) {
  if (explained.static && answered.reason === "last")
    return "This budget runs the static network, whose only exit is the last one.";
  if (answered.reason !== "confident") return REASONS[answered.reason] ?? answered.reason;
  return `Exit ${answered.exit} was confident: its score reached the threshold.`;
}

function step(exit, k, number, reached, explained) {
  const skipped = explained.static ? k < number - 1 : k > reached;
  const fate = k === reached ? "left here" : skipped ? "not needed" : "went on";
  const chip = el("span", { className: "chip" }, fate);
  chip.dataset.state = k === reached ? "good" : "off";
  const time = exit.us === null ? "" : ` · ${us(exit.us)}`;
  const item = el(
    "li",
    { className: skipped ? "skipped" : "" },
    el("header", {}, swatch(k, number), el("h4", {}, `Exit ${exit.exit}`), chip),
    el("p", { className: "more" }, `${macs(exit.macs)} MACs${time}`),
    el(
      "table",
      {},
      el("caption", { className: "hidden" }, `Most probable classes at exit ${exit.exit}`),
      el("tbody", {}, ...exit.classes.slice(0, SHOWN).map(bar)),
    ),
    el("p", { className: "note" }, score(exit, explained.measure, k === number - 1)),
  );
  return item;
}

function bar({ label, probability: p }) {
  const fill = el("i", { className: "fill", "aria-hidden": "true" });
  fill.style.width = `${100 * p}%`;
  const track = el("div", { className: "track" }, fill);
  return el(
    "tr",
    {},
    el("th", { scope: "row", title: label }, label, track),
    el("td", { className: "number" }, probability(p)),
  );
}

const times = (margin) =>
  margin > 20
    ? "over 100 million"
    : new Intl.NumberFormat("en", {
        maximumSignificantDigits: 3,
        notation: margin > 9 ? "compact" : "standard",
      }).format(Math.exp(margin));
const of_log_odds = (s) => probability(1 / (1 + Math.exp(-s)), 4);
const MEASURES = {
  "max-probability": [(s) => `The first class has ${of_log_odds(s)}`, (s) => `it needs ${of_log_odds(s)}`],
  margin: [
    (s) => `The first class is ${times(s)} times as probable as the second`,
    (s) => `it needs ${times(s)} times`,
  ],
  entropy: [(s) => `The entropy is ${Math.abs(s).toFixed(3)}`, (s) => `it needs at most ${Math.abs(s).toFixed(3)}`],
  agreement: [
    (s) =>
      `${Math.floor(s) === 1 ? "1 exit" : `${Math.floor(s)} exits`} in a row named this class: score ${s.toFixed(2)}`,
    (s) => `it needs ${s.toFixed(2)}`,
  ],
};

// The score in words, beside the threshold of the exit.
function score(exit, measure, last) {
  if (exit.score === null) return "The score is not a number, so nothing leaves here.";
  const [found, needed] = MEASURES[measure];
  const text = found(exit.score);
  if (last) return `${text}. The last exit answers whatever is left.`;
  if (exit.everything) return `${text}. Every picture leaves here.`;
  if (exit.threshold === null) return `${text}. No picture leaves here within this budget.`;
  return `${text}; ${needed(exit.threshold)} to leave here.`;
}
