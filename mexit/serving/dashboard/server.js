// What the models of a server share: the rate limiter and the refused requests.

import { NONE, count, el, macs, percent, write } from "./text.js";

const STATUSES = {
  400: "invalid request or image",
  401: "token missing or wrong",
  403: "not an admin token",
  404: "no such model or route",
  405: "wrong method",
  408: "body too slow",
  409: "no thresholds for this engine",
  413: "too large",
  415: "unknown coding of the body",
  499: "client disconnected",
  500: "engine failed or load refused",
  501: "optional package missing",
  503: "no room or no tokens",
  504: "deadline passed in the queue",
};

export function showLimiter(parent, limiter) {
  if (!limiter)
    return once(parent, "none", () => [
      el(
        "p",
        { className: "empty" },
        "No rate is set. ",
        el("code", {}, "mexit serve --rate 2G"),
        " bounds the MACs of all answers together.",
      ),
    ]);
  const rows = [];
  if (limiter.all) {
    rows.push(["Rate", `${macs(limiter.all.macs_per_s)} MACs/s`]);
    rows.push(["Tokens", `${macs(Math.max(0, limiter.tokens))} of ${macs(limiter.all.burst_macs)}`]);
  }
  if (limiter.client) rows.push(["Rate of each client", `${macs(limiter.client.macs_per_s)} MACs/s`]);
  if (limiter.client) rows.push(["Clients", count(limiter.clients)]);
  rows.push(
    ["Waiting now", count(limiter.waiting)],
    ["Waited", count(limiter.waits)],
    ["Answered by an earlier exit", count(limiter.refused_rows)],
    ["Refused", count(limiter.overloaded)],
  );
  once(parent, JSON.stringify(rows.map(([name]) => name)), () => [
    ...(limiter.all ? [el("div", { className: "meter", "aria-hidden": "true" }, el("i"))] : []),
    el(
      "table",
      { className: "list" },
      el("caption", { className: "hidden" }, "Rate limiter"),
      el(
        "tbody",
        {},
        ...rows.map(([name]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { className: "number" }))),
      ),
    ),
  ]);
  parent.querySelectorAll("td").forEach((cell, k) => write(cell, rows[k][1]));
  const fill = parent.querySelector(".meter i");
  if (fill)
    fill.style.width = percent(Math.min(1, Math.max(0, limiter.tokens / limiter.all.burst_macs)), 1).replace(
      "\u00a0",
      "",
    );
}

export function showErrors(parent, errors) {
  const statuses = Object.keys(errors).sort();
  if (!statuses.length) return once(parent, "none", () => [el("p", { className: "empty" }, "No request was refused.")]);
  once(parent, statuses.join(), () => [
    el(
      "table",
      { className: "list" },
      el("caption", { className: "hidden" }, "Refused requests by status"),
      el(
        "tbody",
        {},
        ...statuses.map((status) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, el("code", {}, status), " ", STATUSES[status] ?? NONE),
            el("td", { className: "number" }),
          ),
        ),
      ),
    ),
  ]);
  parent.querySelectorAll("td").forEach((cell, k) => write(cell, count(errors[statuses[k]])));
}

// Make the content again only when its structure changes.
function once(parent, key, make) {
  if (parent.dataset.key === key) return;
  parent.dataset.key = key;
  parent.replaceChildren(...make());
}
