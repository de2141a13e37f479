// Elements, and numbers as text.

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Write a text only where it has changed, so that screen readers and selections are left alone.
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const NONE = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const minus = (text) => text.replace("-", "−");

export const count = (value) => whole.format(value);

// Three significant digits, without trailing zeros after a unit.
function digits(value, places = 3) {
  const size = Math.abs(value);
  const after = size >= 100 || size === 0 ? 0 : size >= 10 ? 1 : 2;
  return minus(value.toFixed(Math.max(0, Math.min(after, places - 1))));
}

export function macs(value) {
  for (const [unit, size] of [
    ["G", 1e9],
    ["M", 1e6],
    ["k", 1e3],
  ]) {
    if (Math.abs(value) >= size) return digits(value / size) + unit;
  }
  return count(value);
}

export function percent(share, places = 1) {
  return Number.isFinite(share) ? `${minus((100 * share).toFixed(places))}\u00a0%` : NONE;
}

// A probability that rounding would turn into one stays below it.
export function probability(p, places = 1) {
  const unit = 0.1 ** (places + 2);
  return p >= 1 - unit / 2 ? `>\u00a0${percent(1 - unit, places)}` : percent(p, places);
}

export function seconds(s) {
  if (!Number.isFinite(s)) return NONE;
  if (s < 1e-3) return `${digits(s * 1e6)}\u00a0µs`;
  if (s < 1) return `${digits(s * 1e3)}\u00a0ms`;
  return `${digits(s)}\u00a0s`;
}

export const us = (value) => (value === null ? NONE : seconds(value / 1e6));

export function rate(value) {
  if (!Number.isFinite(value)) return NONE;
  return value >= 100 ? count(value) : value === 0 ? "0" : digits(value, 2);
}

export function span(s) {
  if (s < 60) return `${Math.max(0, Math.round(s))} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export const bytes = (value) => (value >= 1e9 ? `${digits(value / 1e9)} GB` : `${count(value / 1e6)} MB`);

export const clock = (date) => date.toLocaleTimeString("en-GB");
