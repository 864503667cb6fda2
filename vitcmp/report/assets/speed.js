// Speed, FLOPs and memory against image size: the article's charts, with intervals, and with what did not run.
"use strict";

vitcmp.section("speed", (root, payload) => {
  const { state, element, METRICS } = vitcmp;
  const SCALES = [
    ["log", "logarithmic"],
    ["linear", "linear"],
  ];
  const SHARED = ["device", "mode", "batch", "backend", "numerics", "vitdet", "off"];
  const MEASURED = new Set(["throughput", "latency", "image", "activations", "process"]); // others need no run

  vitcmp.share(payload);
  for (const axis of ["speed.x", "speed.y"]) state.define(axis, "log", ["log", "linear"]);
  state.define("speed.table", "0", vitcmp.isFlag);
  root.append(
    element(
      "p",
      {},
      "Every point is the setting of lowest median latency among those that were measured; ",
      "bars are intervals of the median ",
      "(95 %; of 2 to 5 runs, which cannot give that, the span of their own). ",
      "Hover, or focus a chart and use the arrow keys, to see its figures and which setting it is.",
    ),
    vitcmp.controls(
      payload,
      ["device", "mode", "backend", "batch", "numerics"],
      vitcmp.select("speed.x", "Image size axis", SCALES),
      vitcmp.select("speed.y", "Value axis", SCALES),
      vitcmp.check("speed.table", "numbers as a table"),
    ),
    vitcmp.switches(payload),
  );
  vitcmp.view(root, [...SHARED, "speed.x", "speed.y", "speed.table"], (width) => draw(width));

  function draw(width) {
    const points = vitcmp.points(payload);
    if (!points.length) return vitcmp.nothing(payload);
    const failures = vitcmp.failed(points);
    const size = (i) => (i ? vitcmp.half(width) : width);
    const charts = Object.keys(METRICS).map((name, i) => chart(name, points, failures, size(i)));
    const grid = element("div", { class: "grid" }, ...charts);
    const isTable = state.get("speed.table") === "1";
    return [vitcmp.stripLegend(failures), lineLegend(points), grid, isTable ? table(points) : null];
  }

  function chart(name, all, failures, width) {
    const metric = METRICS[name];
    const points = all.map((point) => place(point, metric)).filter(isDrawn);
    const shown = MEASURED.has(name) ? failures : [];
    const sizes = [...points, ...shown].map((point) => point.x);
    const title = `${metric.title}, ${metric.unit}`;
    if (!sizes.length) return vitcmp.unknown(title, "Unknown for all of these.");
    const x = vitcmp.sizeAxis(sizes, width, state.get("speed.x"));
    const ends = points.flatMap((point) => [point.y, point.low, point.high]);
    const isEmpty = !points.length;
    const y = isEmpty ? { domain: [0, 1], axis: null } : vitcmp.valueAxis(ends, state.get("speed.y"), metric.unit);
    const height = isEmpty ? 70 : name === "throughput" ? 320 : 250;
    const svg = vitcmp.plot({ width, height, x, y, marks: vitcmp.series(points) });
    const className = `${name}${name === "throughput" ? " wide" : ""}`;
    return vitcmp.figure({ title, note: note(name, all), svg, points, failures: shown, width, x, className });
  }

  /** Gives a point its place; of one that did not run, FLOPs may be known all the same. */
  function place(point, metric) {
    const row = point.row ?? point.failed[0];
    const [y, low = null, high = null] = row ? metric.of(row) : [null];
    return { ...point, y, low, high, text: row ? vitcmp.describe({ ...point, row }, metric) : "" };
  }

  function isDrawn({ y }) {
    return y !== null && (y > 0 || state.get("speed.y") !== "log");
  }

  function note(name, points) {
    const isArticle = points.some((point) => point.key.endsWith("|article"));
    const isTrain = state.get("mode") === "train";
    const notes = {
      throughput: "Calls are queued, with one synchronisation at the end.",
      latency: "The device is idle after each call.",
      image: "Latency per batch over the batch size.",
      flops: `${isTrain ? "Train step" : "Forward pass"}, 2 per multiply-add.${isArticle ? vitcmp.UNDER_COUNTED : ""}`,
      parameters: "The weights as they are stored.",
      activations: "What one call allocates beyond weights and inputs.",
      process: "What the device reserved, or on a CPU the process's resident peak. Not to be compared with the others.",
    };
    return notes[name];
  }

  function lineLegend(points) {
    const hasArticle = points.some((point) => point.key.endsWith("|article"));
    const parts = [
      vitcmp.isApart() && "Solid and filled: JAX; dotted and hollow: torch.",
      hasArticle && "Dashed and hollow: rows of the article's own results, which hold no throughput and no comparable memory.",
    ];
    const text = parts.filter(Boolean).join(" ");
    return text ? element("p", { class: "note" }, text) : null;
  }

  function table(points) {
    const figure = (name) => ({
      title: `${METRICS[name].title}, ${METRICS[name].unit}`,
      isNumber: true,
      text: ({ row }) => (row ? number(METRICS[name].of(row)) : "–"),
    });
    const columns = [
      { title: "Model", text: (point) => point.model },
      { title: "Image, px", text: (point) => point.image_size, isNumber: true },
      { title: "Setting", text: ({ row }) => (row ? vitcmp.setting(row) : "–") },
      ...Object.keys(METRICS).map(figure),
      {
        title: "Runs, calls",
        text: ({ row }) => (row ? `${row.num_runs ?? "–"}, ${row.num_calls ?? "–"}` : "–"),
        isNumber: true,
      },
      { title: "Marks", text: ({ row }) => (row ? vitcmp.marks(row).join("; ") : "") },
      { title: "Did not run", text: ({ failed }) => vitcmp.failures(failed) },
    ];
    return vitcmp.table(columns, points, { caption: "What the charts show: value [interval]" });
  }

  function number([value, low, high]) {
    return [vitcmp.number(value), vitcmp.interval(low, high, value)].filter(Boolean).join(" ");
  }
});
