// The dashboard of a server: asks for /v1/stats once a second and shows it.

import { showCameras } from "./cameras.js";
import { ServerError, get, token } from "./client.js";
import { showModels } from "./models.js";
import { Picture } from "./picture.js";
import { showErrors, showLimiter } from "./server.js";
import { bytes, clock, el, span, write } from "./text.js";
import { History, restarted } from "./window.js";

const PERIOD_MS = 1000;
const SHOWN_CHANGES = 8;
const PLAIN = ["unloaded", "not loaded", "the server is stopping"]; // reasons that other lines report
const by = (id) => document.getElementById(id);
const history = new History();
const picture = new Picture();
let answered_s = null;
let timer = 0;
let asking = false;

const now_s = () => performance.now() / 1000;

async function update() {
  clearTimeout(timer);
  if (asking || document.hidden || by("token-dialog").open) return;
  asking = true;
  try {
    const stats = await get("v1/stats");
    note(stats);
    history.add(stats, now_s());
    if (by("banner").hidden === false && answered_s !== null) change("The server answers again");
    answered_s = now_s();
    by("banner").hidden = true;
    document.body.classList.remove("stale");
    show();
    await showCameras(by("cameras"), by("camera-tiles"), stats.cameras);
  } catch (error) {
    if (error instanceof ServerError && error.status === 401) return ask_token();
    lost(error);
  } finally {
    asking = false;
  }
  timer = setTimeout(update, PERIOD_MS);
}

function show() {
  const stats = history.newest.stats;
  write(by("state"), stats.state);
  by("state").dataset.state = stats.state === "ready" ? "good" : "busy";
  const facts = [`version ${stats.version}`];
  if (stats.started_s !== null) facts.push(`up ${span(Date.now() / 1000 - stats.started_s)}`);
  if (stats.memory_bytes) facts.push(bytes(stats.memory_bytes));
  if (stats.batching !== "off") facts.push(`${stats.batching} batching`);
  write(by("facts"), facts.join(" · "));
  const since_start = document.querySelector("input[name=window]:checked").value === "start";
  showModels(by("models"), history, since_start, change);
  picture.offer(stats.models);
  showLimiter(by("limiter"), stats.rate_limiter);
  showErrors(by("errors"), stats.errors);
}

// Report what differs from the answer before.
function note(stats) {
  const before = history.newest?.stats;
  if (!before) return change("The dashboard was opened");
  if (restarted(before, stats)) change("The server was started again");
  const old = new Map(before.models.map((model) => [model.name, model]));
  for (const model of stats.models) {
    const known = old.get(model.name);
    old.delete(model.name);
    if (!known) change(`${model.name}: version ${model.version} is in service`);
    else if (known.version !== model.version)
      change(`${model.name}: version ${model.version} replaced version ${known.version}`);
    else if (known.id !== model.id) change(`${model.name}: the files of version ${model.version} changed`);
    if (model.drift?.alarms > (known?.drift?.alarms ?? 0)) change(`${model.name}: drift alarm, the data has changed`);
  }
  for (const name of old.keys()) change(`${name}: no longer in service`);
  const refused = (entries) =>
    entries
      .filter(({ reason, state }) => state !== "READY" && reason && !PLAIN.includes(reason))
      .map(({ name, version, reason }) => `${name}: version ${version}: ${reason}`);
  const known = new Set(refused(before.repository));
  for (const text of refused(stats.repository)) if (!known.has(text)) change(text);
  if (before.state !== stats.state)
    change(stats.state === "stopping" ? "The server is stopping" : "The server is ready");
}

function change(text) {
  const list = by("changes");
  list.prepend(el("li", {}, el("time", {}, clock(new Date())), " ", text));
  while (list.children.length > SHOWN_CHANGES) list.lastChild.remove();
}

function lost(error) {
  const since = answered_s === null ? "" : ` since ${span(now_s() - answered_s)}`;
  const reason = error instanceof ServerError ? ` (${error.message})` : "";
  if (by("banner").hidden) change("The server does not answer");
  write(by("banner"), `No answer from the server${since}${reason}. The figures are the last ones.`);
  by("banner").hidden = false;
  document.body.classList.add("stale");
  write(by("state"), "no answer");
  by("state").dataset.state = "bad";
}

function ask_token() {
  write(by("token-wrong"), token.get() ? "The server does not know this token." : "");
  token.forget();
  by("sign-out").hidden = true;
  by("token-dialog").showModal();
}

by("token-dialog").addEventListener("cancel", (event) => event.preventDefault());
by("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set(by("token").value.trim());
  by("token").value = "";
  by("token-dialog").close();
  by("sign-out").hidden = false;
  update();
});
by("sign-out").addEventListener("click", () => {
  token.forget();
  location.reload();
});
by("window").addEventListener("change", () => history.newest && show());
document.addEventListener("visibilitychange", update);
by("sign-out").hidden = !token.get();
update();
