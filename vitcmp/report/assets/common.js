// What the sections share: rows, the best of them, the looks of models, and how numbers and rows are said.
"use strict";

(() => {
  const COLOURS = ["blue", "vermilion", "green", "purple", "orange", "sky", "ink"].map((name) => `var(--${name})`);
  const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "wye", "cross"];
  const CHOICES = ["numerics", "attention", "compile", "layout", "batch_norm"];
  // What could not run, the most telling first: where several settings failed, a mark shows the first of these.
  const STATUSES = {
    oom: { text: "out of memory", symbol: "times" },
    timeout: { text: "timed out", symbol: "plus" },
    crashed: { text: "crashed", symbol: "asterisk" },
    error: { text: "error", symbol: "triangle2" },
    interrupted: { text: "interrupted", symbol: "square2" },
    unsupported: { text: "unsupported", symbol: "circle" },
    refused: { text: "refused", symbol: "diamond2" },
  };
  const UNDER_COUNTED = " The article's FLOPs (dashed) are under-counted: its counter leaves out attention.";
  const caches = new WeakMap();
  const formatters = [];

  /** Returns what `make()` gave the first time for this payload and name. */
  function cached(payload, name, make) {
    if (!caches.has(payload)) caches.set(payload, new Map());
    const cache = caches.get(payload);
    if (!cache.has(name)) cache.set(name, make());
    return cache.get(name);
  }

  /** Returns the settings as row objects; `id` is the row's index, `px` the side of a square of its area. */
  function rows(payload) {
    return cached(payload, "rows", () => {
      const list = decode(payload.settings);
      nameDevices(list, [
        list,
        payload.comparisons,
        payload.knobs,
        payload.crossovers,
        payload.ceilings,
        payload.environments,
      ]);
      return list;
    });
  }

  /** Puts the source behind a device that several sources of ours measured: nothing of one is compared with another. */
  function nameDevices(list, tables) {
    const ours = list.filter((row) => !isOfArticle(row));
    const counts = d3.rollup(
      ours,
      (group) => distinct(group, "source").length,
      (row) => row.device,
    );
    for (const item of tables.flat()) {
      if (counts.get(item.device) > 1 && !isOfArticle(item)) item.device = `${item.device} (${item.source})`;
    }
  }

  function decode(settings) {
    const columns = Object.entries(settings).map(([name, column]) => [name, values(column)]);
    const count = columns[0]?.[1].length ?? 0;
    return Array.from({ length: count }, (_, id) => {
      const row = { id };
      for (const [name, column] of columns) row[name] = column[id];
      row.px = Math.sqrt(row.height * row.width);
      return row;
    });
  }

  function values(column) {
    return Array.isArray(column) ? column : column.index.map((i) => column.values[i] ?? null);
  }

  /** Groups rows by `key(row)`: the row of lowest median latency (or null), all rows, the failed. */
  function best(list, key) {
    const groups = new Map();
    for (const row of list) {
      const name = key(row);
      if (!groups.has(name)) groups.set(name, { row: null, rows: [], failed: [] });
      const group = groups.get(name);
      group.rows.push(row);
      if (row.status !== "ok") group.failed.push(row);
      if (isTimed(row) && !(group.row && group.row.latency_s <= row.latency_s)) group.row = row;
    }
    return groups;
  }

  function isTimed(row) {
    return row.latency_s !== null && row.latency_s !== undefined; // some of its runs may have failed all the same
  }

  function isOfArticle(row) {
    return row.origin === "article";
  }

  /** Returns the distinct values of a column that are known, in order of appearance. */
  function distinct(list, name) {
    return [...new Set(list.map((row) => row[name]))].filter((value) => value !== null && value !== undefined);
  }

  /** Returns {name, label, family, colour, symbol} of every model, by name. */
  function models(payload) {
    return cached(payload, "models", () => {
      const families = new Map(rows(payload).map((row) => [row.model, row.family]));
      const bases = d3.rollup(
        families.keys(),
        (list) => list.length,
        (name) => name.split(":")[0],
      );
      return new Map(
        [...families].map(([name, family], i) => [name, { name, family, label: short(name, bases), ...look(i) }]),
      );
    });
  }

  function look(i) {
    const turn = Math.floor(i / COLOURS.length); // after seven models the pairs of colour and shape change
    return { colour: COLOURS[i % COLOURS.length], symbol: SYMBOLS[(i + turn) % SYMBOLS.length] };
  }

  /** Returns a model's name without its overrides, where that tells it from all others. */
  function short(name, bases) {
    const [base, ...overrides] = name.split(":");
    return overrides.length && bases.get(base) === 1 && base !== "timm" && base !== "big_vision" ? `${base}:…` : name;
  }

  // Numbers: four digits as on screen and in the README, never an exponent, a dash for what is unknown.

  /** Returns the value to `digits` digits, or to the decimals that `like` would get. */
  function number(value, { digits = 4, like = value } = {}) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    const size = Number(Math.abs(like).toPrecision(digits));
    const decimals = size > 0 ? Math.min(12, Math.max(0, digits - 1 - Math.floor(Math.log10(size)))) : 0;
    return formatter(decimals).format(value);
  }

  /** Returns the format of so many decimals: made once, because making one takes far longer than using it. */
  function formatter(decimals) {
    const digits = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
    return (formatters[decimals] ??= new Intl.NumberFormat("en", digits));
  }

  /** Says a length of an image's side. */
  function px(value) {
    return value === null || value === undefined ? "–" : String(Math.round(value));
  }

  function interval(low, high, like, digits = 4) {
    if (low === null || high === null || low === undefined || high === undefined) return "";
    return `[${number(low, { like, digits })}, ${number(high, { like, digits })}]`;
  }

  /** Returns the value times `scale`, null staying null. */
  function scaled(value, scale) {
    return value === null || value === undefined ? null : value * scale;
  }

  /** Returns a / b, null where either is unknown. */
  function ratio(a, b) {
    return a === null || a === undefined || !b ? null : a / b;
  }

  function cut(text) {
    return text.length > 160 ? `${text.slice(0, 159)}…` : text;
  }

  function plural(count, word) {
    return `${formatter(0).format(count)} ${word}${count === 1 ? "" : "s"}`;
  }

  function list(words) {
    return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
  }

  /** Says the choices of a row: `torch, float32 flash default nchw`. */
  function setting(row) {
    const chosen = CHOICES.map((name) => row[name]).filter((value) => value && value !== "kept");
    return [row.backend, chosen.join(" ")].filter(Boolean).join(", ");
  }

  function marks(row) {
    const share = row.others_cpu_share ? ` (${number(100 * row.others_cpu_share, { digits: 2 })} % of the CPU)` : "";
    return [
      row.is_converged === 0 && "~ not converged",
      row.is_contended && `! others used the machine${share}`,
      row.status === "ok" && row.message, // some of its runs failed
    ].filter(Boolean);
  }

  /** Says how many of the rows failed in which way: `2 out of memory, 1 unsupported`. */
  function failures(failed) {
    const counts = d3.rollup(
      failed,
      (group) => group.length,
      (row) => row.status,
    );
    return [...counts].map(([status, count]) => `${count} ${STATUSES[status]?.text ?? status}`).join(", ");
  }

  function worst(failed) {
    const found = new Set(failed.map((row) => row.status));
    return Object.keys(STATUSES).find((status) => found.has(status)) ?? "error";
  }

  // Figures.

  const figures = (scale, ...values) => values.map((value) => scaled(value, scale));
  /** The figures of a row: {title, unit, of: (row) => [value, low, high]}, in the unit that the page shows. */
  const METRICS = {
    throughput: {
      title: "Throughput",
      unit: "images/s",
      of: (r) => [r.call_s, r.call_high_s, r.call_low_s].map((s) => ratio(r.batch_size, s)),
    },
    latency: {
      title: "Latency per batch",
      unit: "ms",
      of: (r) => figures(1e3, r.latency_s, r.latency_low_s, r.latency_high_s),
    },
    image: {
      title: "Latency per image",
      unit: "ms/image",
      of: (r) => figures(1e3 / r.batch_size, r.latency_s, r.latency_low_s, r.latency_high_s),
    },
    flops: {
      title: "FLOPs per image",
      unit: "GFLOP",
      of: (r) => figures(1e-9, r.mode === "train" ? ratio(r.step_flops, r.batch_size) : r.image_flops),
    },
    parameters: { title: "Memory: parameters", unit: "MB", of: (r) => figures(1e-6, r.parameters_bytes) },
    activations: { title: "Memory: activation peak", unit: "MB", of: (r) => figures(1e-6, r.activation_peak_bytes) },
    process: { title: "Memory: process peak", unit: "MB", of: (r) => figures(1e-6, r.process_peak_bytes) },
  };

  /** Says a figure of a row with its interval and unit: `12.30 ms [12.10, 12.50]`. */
  function figureText(metric, row) {
    const [value, low, high] = metric.of(row);
    return value === null
      ? "unknown"
      : [`${number(value)} ${metric.unit}`, interval(low, high, value)].filter(Boolean).join(" ");
  }

  /** Says all that a reader should know of a point: which setting, the figures that are named, n, marks, failures. */
  function describe(point, ...metrics) {
    const { row } = point;
    const calls = row.num_calls ? `, ${plural(row.num_calls, "call")}` : "";
    const counts = row.num_runs ? `n: ${plural(row.num_runs, "run")}${calls}` : null;
    const lost = point.failed?.length ? `did not run: ${failures(point.failed)}` : null;
    const origin = isOfArticle(row) ? "the article's own row" : null;
    const title = `${row.model}, ${row.image_size} px, batch ${row.batch_size}`;
    return [
      title,
      ...metrics.map((metric) => `${metric.title}: ${figureText(metric, row)}`),
      counts,
      setting(row),
      ...marks(row),
      lost,
      origin,
    ]
      .filter(Boolean)
      .join("\n");
  }

  Object.assign(vitcmp, {
    STATUSES,
    UNDER_COUNTED,
    METRICS,
    cached,
    rows,
    best,
    isTimed,
    isOfArticle,
    distinct,
    models,
    number,
    px,
    interval,
    scaled,
    ratio,
    cut,
    plural,
    list,
    setting,
    marks,
    failures,
    worst,
    figureText,
    describe,
  });
})();
