// What has happened in a stretch of time, from two answers of /v1/stats.

const LENGTH_S = 60;

// The answers of the last minute, of one run of the server.
export class History {
  constructor() {
    this.entries = [];
  }

  add(stats, time_s) {
    const last = this.entries.at(-1);
    if (last && last.stats.started_s !== stats.started_s) this.entries = [];
    this.entries.push({ time_s, stats });
    while (this.entries.length > 2 && time_s - this.entries[1].time_s >= LENGTH_S) this.entries.shift();
  }

  get newest() {
    return this.entries.at(-1);
  }

  // A model's entry in each answer, with its time.
  model(name) {
    const found = this.entries.map(({ time_s, stats }) => ({ time_s, model: stats.models.find((one) => one.name === name) }));
    return found.filter(({ model }) => model);
  }
}

// The difference of two entries of a model; `before` null counts from the start.
export function between(before, now) {
  const minus = (read) => read(now) - (before ? read(before) : 0);
  const answersOf = (model, exit) => model.exits.find((one) => one.exit === exit)?.answers ?? 0;
  const exits = now.exits.map(({ exit }) => minus((model) => answersOf(model, exit)));
  const same = before && before.latency.counts.length === now.latency.counts.length;
  return {
    exits,
    answers: exits.reduce((total, one) => total + one, 0),
    macs: minus((model) => model.totals.macs),
    static_macs: minus((model) => model.totals.static_macs),
    profile_s: minus((model) => model.totals.profile_s),
    static_profile_s: minus((model) => model.totals.static_profile_s),
    unsure: minus((model) => model.totals.unsure),
    latency: now.latency.counts.map((value, k) => value - (same ? before.latency.counts[k] : 0)),
  };
}

// The quantile of a histogram, seconds, interpolated within a bucket; NaN without a request.
export function quantile(edges, counts, share) {
  const total = counts.at(-1);
  if (!total) return NaN;
  const wanted = share * total;
  const k = counts.findIndex((one) => one >= wanted);
  if (k >= edges.length) return Infinity;
  const below = k ? counts[k - 1] : 0;
  const lower = k ? edges[k - 1] : 0;
  return lower + ((edges[k] - lower) * (wanted - below)) / (counts[k] - below);
}

// Answers per second between each two entries.
export function rates(entries) {
  const answers = (model) => model.exits.reduce((total, { answers }) => total + answers, 0);
  return entries.slice(1).map((now, k) => {
    const before = entries[k];
    return Math.max(0, answers(now.model) - answers(before.model)) / Math.max(1e-3, now.time_s - before.time_s);
  });
}
