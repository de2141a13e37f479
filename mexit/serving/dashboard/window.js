// What has happened in a stretch of time, from two answers of /v1/stats.

const LENGTH_S = 60;

// The answers of the last minute, of one run of the server.
export class History {
  constructor() {
    this.entries = [];
  }

  add(stats, time_s) {
    if (this.newest && restarted(this.newest.stats, stats)) this.entries = [];
    this.entries = this.entries.filter((entry) => time_s - entry.time_s <= LENGTH_S);
    this.entries.push({ time_s, stats });
  }

  get newest() {
    return this.entries.at(-1);
  }

  // A model's entry in each answer, with its time.
  model(name) {
    const found = this.entries.map(({ time_s, stats }) => ({
      time_s,
      model: stats.models.find((one) => one.name === name),
    }));
    return found.filter(({ model }) => model);
  }
}

const answers = (model) => model.exits.reduce((total, one) => total + one.answers, 0);

// Whether the server has ended in between: counts never fall while it runs.
export function restarted(before, now) {
  return now.models.some((model) => {
    const known = before.models.find(({ name }) => name === model.name);
    return known && (answers(model) < answers(known) || model.latency.counts.at(-1) < known.latency.counts.at(-1));
  });
}

// The difference of two entries of a model; `before` null counts from the start.
export function between(before, now) {
  const minus = (read) => read(now) - (before ? read(before) : 0);
  const at = (model, exit) => model.exits.find((one) => one.exit === exit)?.answers ?? 0;
  const exits = now.exits.map(({ exit }) => minus((model) => at(model, exit)));
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
  return entries.slice(1).map((now, k) => {
    const before = entries[k];
    return Math.max(0, answers(now.model) - answers(before.model)) / Math.max(1e-3, now.time_s - before.time_s);
  });
}
