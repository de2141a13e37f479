// A tile for each camera: latest picture, label, exit, age and state. The server has the routes only with cameras.

import { ask, get, token } from "./client.js";
import { showStack } from "./models.js";
import { NONE, count, el, percent, probability, span, write } from "./text.js";

const STATES = { live: "good", starting: "busy", lost: "bad", frozen: "bad", ended: "off" };
const PREVIEW_MS = 250;
const tiles = new Map();

export async function showCameras(section, parent, present) {
  section.hidden = !present;
  if (!present) return;
  const cameras = await get("v1/cameras");
  for (const name of tiles.keys()) {
    if (!cameras.some((camera) => camera.name === name)) {
      tiles.get(name).element.remove();
      tiles.delete(name);
    }
  }
  for (const camera of cameras) {
    if (!tiles.has(camera.name)) tiles.set(camera.name, new Tile(camera.name, parent));
    tiles.get(camera.name).show(camera);
  }
}

class Tile {
  constructor(name, parent) {
    this.path = `v1/cameras/${encodeURIComponent(name)}`;
    this.chip = el("span", { className: "chip" });
    this.label = el("p", { className: "label" });
    this.facts = el("p", { className: "more" });
    this.counts = el("p", { className: "more" });
    this.stack = el("div", { className: "stack", "aria-hidden": "true" });
    this.problem = el("p", { className: "wrong" });
    this.picture = el("img", {
      alt: `Latest picture of ${name}`,
      width: 320,
      height: 240,
      hidden: true,
      onload: () => {
        this.picture.hidden = false;
      },
    });
    this.live = el("button", { type: "button", "aria-pressed": "false", onclick: () => this.toggle() }, "Live preview");
    this.element = el(
      "article",
      { className: "card tile", "aria-label": `Camera ${name}` },
      el("div", { className: "screen" }, this.picture),
      el("header", {}, el("h3", {}, name), this.chip),
      this.label,
      this.facts,
      this.stack,
      this.counts,
      this.problem,
      this.live,
    );
    parent.append(this.element);
  }

  show({ state, answer, age_s, counters, exits, macs, saved_macs, error }) {
    write(this.chip, state);
    this.chip.dataset.state = STATES[state] ?? "off";
    const shown = answer && (answer.steady ?? answer.label ?? "unsure");
    write(this.label, shown ?? "no answer yet");
    this.label.classList.toggle("none", !answer);
    const age = age_s === null ? NONE : age_s < 1 ? "just now" : `${span(age_s)} ago`;
    write(this.facts, answer ? `${probability(answer.confidence)} · exit ${answer.exit} · ${age}` : "");
    const saved = macs + saved_macs ? `, ${percent(saved_macs / (macs + saved_macs), 0)} of the MACs saved` : "";
    write(
      this.counts,
      `${count(counters.answered)} answered${saved}, ${count(counters.dropped)} dropped, ` +
        `${count(counters.undecodable)} undecodable`,
    );
    showStack(this.stack, Object.values(exits));
    write(this.problem, error ?? "");
    this.element.classList.toggle("old", state !== "live");
    if (answer && !this.streams) this.refresh();
  }

  // A picture is fetched with the token in a header, which an address in `src` cannot carry.
  async refresh() {
    if (this.busy) return;
    this.busy = true;
    try {
      const url = URL.createObjectURL(await (await ask(`${this.path}/picture.jpg`)).blob());
      const before = this.picture.src;
      if (!this.streams) this.picture.src = url;
      if (before.startsWith("blob:")) URL.revokeObjectURL(before);
    } catch {
      // The tile keeps the picture before.
    }
    this.busy = false;
  }

  // One camera at a time: a stream occupies one of the few connections that a browser opens to a server.
  toggle() {
    const play = this.live.getAttribute("aria-pressed") !== "true";
    for (const tile of tiles.values()) tile.play(tile === this && play);
  }

  // An address in `src` cannot carry a token: pictures are then fetched quickly one by one.
  play(on) {
    if (on === (this.live.getAttribute("aria-pressed") === "true")) return;
    this.live.setAttribute("aria-pressed", on);
    clearInterval(this.timer);
    this.streams = on && !token.get();
    if (this.streams) this.picture.src = `${this.path}/stream.mjpg`;
    else this.refresh();
    if (on && !this.streams) this.timer = setInterval(() => this.refresh(), PREVIEW_MS);
  }
}
