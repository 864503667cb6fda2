// FLOPs are not speed: latency against FLOPs with lines of equal share of the peak, and the roofline.
"use strict";

vitcmp.section("flops", (root, payload) => {
  const { state, element, METRICS } = vitcmp;
  const SHARES = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001];
  const REACHED = {
    title: "Reached",
    unit: "GFLOP/s",
    of: (row) => [vitcmp.scaled(vitcmp.ratio(row.step_flops, seconds(row)), 1e-9)],
  };
  const INTENSITY = {
    title: "Operational intensity, at most",
    unit: "FLOP/byte",
    of: (row) => [vitcmp.ratio(row.step_flops, row.traffic_bytes)],
  };
  const STEP = { title: "FLOPs of the step", unit: "GFLOP", of: (row) => [vitcmp.scaled(row.step_flops, 1e-9)] };

  vitcmp.share(payload);
  state.define("flops.table", "0", vitcmp.isFlag);
  root.append(
    element(
      "p",
      {},
      "Equal FLOPs are not equal latency: ",
      "a model's distance from the ceiling is what its kernels, shapes and memory traffic cost.",
    ),
    vitcmp.controls(
      payload,
      ["device", "mode", "backend", "batch", "numerics"],
      vitcmp.check("flops.table", "numbers as a table"),
    ),
    vitcmp.switches(payload),
  );
  vitcmp.view(root, ["device", "mode", "batch", "backend", "numerics", "vitdet", "off", "flops.table"], draw);

  function draw(width) {
    const timed = vitcmp.points(payload).filter((point) => point.row);
    if (!timed.length) return vitcmp.nothing(payload);
    const ceilings = ceilingsFor(timed);
    const half = vitcmp.half(width);
    return [
      element("div", { class: "grid" }, share(timed, ceilings, half), roofline(timed, ceilings, half)),
      state.get("flops.table") === "1" ? table(timed) : null,
    ];
  }

  /** Returns the ceilings of the device for the frameworks and numerics of the points. */
  function ceilingsFor(timed) {
    const numerics = new Set(timed.map((point) => point.row.numerics));
    const backends = new Set(timed.map((point) => point.row.backend));
    const fits = (c) =>
      c.device === state.get("device") && numerics.has(c.numerics) && (c.backend === null || backends.has(c.backend));
    return payload.ceilings.filter(fits);
  }

  function seconds(row) {
    return row.call_s ?? row.latency_s; // the roofline is about throughput; latency has idle gaps between calls in it
  }

  // Latency against FLOPs.

  function share(timed, ceilings, width) {
    const place = (point) => ({
      ...point,
      x: STEP.of(point.row)[0],
      y: 1e3 * point.row.latency_s,
      low: 1e3 * point.row.latency_low_s,
      high: 1e3 * point.row.latency_high_s,
      text: vitcmp.describe(point, METRICS.latency, STEP),
    });
    const points = timed.map(place).filter((point) => point.x > 0);
    const title = "Latency against FLOPs of a step";
    if (!points.length) return vitcmp.unknown(title, "The FLOPs of these rows are unknown.");
    const axes = {
      x: vitcmp.valueAxis(
        points.map((p) => p.x),
        "log",
        "GFLOP of a step",
      ),
      y: vitcmp.valueAxis(
        points.flatMap((p) => [p.y, p.low, p.high]),
        "log",
        "ms",
      ),
    };
    const peak = reference(ceilings);
    const diagonals = peak ? SHARES.map((part) => diagonal(part, peak.value, axes)).filter(Boolean) : [];
    const svg = vitcmp.plot({ width, height: 380, ...axes, marks: [...diagonals.flat(), ...vitcmp.series(points)] });
    const note = peak
      ? `Diagonals: equal share of ${peak.text}.`
      : "No ceiling was measured here and no maker's peak is known, so no share of a peak is drawn.";
    return vitcmp.figure({ title, note: note + articleNote(points), svg, points, className: "share" });
  }

  /** Returns the rate that shares refer to: the maker's highest peak, or else the highest that was measured. */
  function reference(ceilings) {
    const [makers, measured] = ["peak_flops_per_s", "flops_per_s"].map((name) => highest(ceilings, name));
    if (makers) return { value: makers.value, text: `the maker's peak of ${rate(makers.value)} (${makers.numerics})` };
    return (
      measured && { value: measured.value, text: `the measured ceiling of ${rate(measured.value)} (${measured.of})` }
    );
  }

  function highest(ceilings, name) {
    const ceiling = d3.greatest(ceilings, (c) => c[name] ?? 0);
    if (!ceiling?.[name]) return null;
    const { backend, numerics } = ceiling;
    return { value: ceiling[name], numerics, of: [backend, numerics].filter(Boolean).join(", ") };
  }

  function rate(flopsPerS) {
    return flopsPerS >= 1e12
      ? `${vitcmp.number(flopsPerS / 1e12, { digits: 3 })} TFLOP/s`
      : `${vitcmp.number(flopsPerS / 1e9, { digits: 3 })} GFLOP/s`;
  }

  /** Draws latency = FLOPs / (share of the peak) inside the frame, with its label where it leaves. */
  function diagonal(part, peak, { x, y }) {
    const latency = (gflop) => (1e12 * gflop) / (part * peak);
    const gflop = (ms) => (ms * part * peak) / 1e12;
    const left = Math.max(x.domain[0], gflop(y.domain[0]));
    const right = Math.min(x.domain[1], gflop(y.domain[1]));
    if (left >= right) return null;
    const ends = [left, right].map((at) => ({ x: at, y: latency(at) }));
    const text = `${vitcmp.number(100 * part, { digits: 1 })} %`;
    const label = Plot.text([{ ...ends[1], text }], {
      x: "x",
      y: "y",
      text: "text",
      textAnchor: "end",
      dx: -3,
      dy: 8,
      fill: "var(--soft)",
      fontSize: 10,
    });
    return [Plot.line(ends, { x: "x", y: "y", stroke: "var(--soft)", strokeOpacity: part === 1 ? 0.9 : 0.4 }), label];
  }

  function articleNote(points) {
    return points.some((point) => vitcmp.isOfArticle(point.row)) ? vitcmp.UNDER_COUNTED : "";
  }

  // The roofline.

  function roofline(timed, ceilings, width) {
    const place = (point) => ({
      ...point,
      x: INTENSITY.of(point.row)[0],
      y: REACHED.of(point.row)[0],
      low: null,
      high: null,
      text: vitcmp.describe(point, REACHED, INTENSITY),
    });
    const points = timed.map(place).filter((point) => point.x > 0 && point.y > 0);
    const title = "Roofline";
    if (!points.length) return vitcmp.unknown(title, "The bytes that a step must move are unknown for these rows.");
    const roofs = roofsOf(ceilings);
    const xs = points.map((point) => point.x);
    const knees = roofs.map(knee).filter((at) => at > d3.min(xs) / 30 && at < d3.max(xs) * 30);
    const x = vitcmp.valueAxis([...xs, ...knees, d3.min([...xs, ...knees]) / 2, d3.max(xs) * 2], "log", "FLOP/byte");
    const tops = roofs
      .flatMap((roof) => [roof.flops, roof.bytes === null ? null : roof.bytes * x.domain[0]])
      .filter(Boolean)
      .map((value) => value / 1e9);
    const y = vitcmp.valueAxis(
      [...points.map((point) => point.y), ...tops.filter((top) => top > d3.min(points, (p) => p.y) / 10)],
      "log",
      "GFLOP/s",
    );
    const svg = vitcmp.plot({ width, height: 380, x, y, marks: [...roofMarks(roofs, x, y), ...vitcmp.series(points)] });
    return vitcmp.figure({
      title,
      note: rooflineNote(roofs, timed.length - points.length),
      svg,
      points,
      className: "roofline",
    });
  }

  /** Returns {text, flops, bytes, isMakers} of each distinct roof. */
  function roofsOf(ceilings) {
    const measured = ceilings
      .filter((c) => c.flops_per_s || c.bytes_per_s)
      .map((c) => ({
        text: `${[c.numerics, c.backend].filter(Boolean).join(", ")}, measured`,
        flops: c.flops_per_s,
        bytes: c.bytes_per_s,
        isMakers: false,
      }));
    const makers = ceilings
      .filter((c) => c.peak_flops_per_s || c.peak_bytes_per_s)
      .map((c) => ({
        text: `${c.numerics}, maker's`,
        flops: c.peak_flops_per_s,
        bytes: c.peak_bytes_per_s,
        isMakers: true,
      }));
    return [...measured, ...Array.from(d3.group(makers, (roof) => roof.text).values(), ([roof]) => roof)];
  }

  function roofMarks(roofs, x, y) {
    const labels = d3
      .sort(
        roofs.filter((roof) => roof.flops),
        (roof) => -roof.flops,
      )
      .map((roof) => ({ x: x.domain[1], y: roof.flops / 1e9, text: `${roof.text}, ${rate(roof.flops)}` }));
    const line = (roof) =>
      Plot.line(corners(roof, x), {
        x: "x",
        y: "y",
        stroke: "var(--ink)",
        strokeWidth: 1.2,
        strokeOpacity: 0.75,
        strokeDasharray: roof.isMakers ? "5 4" : null,
        clip: true,
      });
    return [
      ...roofs.map(line),
      ...spread(labels, y).map((label) =>
        Plot.text([label], {
          x: "x",
          y: "y",
          text: "text",
          textAnchor: "end",
          dx: -3,
          dy: label.dy,
          fill: "var(--soft)",
          stroke: "var(--paper)",
          strokeWidth: 4,
          fontSize: 10,
        }),
      ),
    ];
  }

  /** Returns the FLOP/byte from which on arithmetic is the lower roof; null where only one roof is known. */
  function knee({ flops, bytes }) {
    return flops && bytes ? flops / bytes : null;
  }

  function corners(roof, x) {
    const { flops, bytes } = roof;
    const height = (at) => Math.min(flops ?? Infinity, (bytes ?? Infinity) * at) / 1e9;
    const at = [x.domain[0], knee(roof) > x.domain[0] && knee(roof) < x.domain[1] ? knee(roof) : null, x.domain[1]].filter(
      (value) => value !== null,
    );
    return at.map((value) => ({ x: value, y: height(value) }));
  }

  /** Sets labels, given from the top, above their lines; below, where that would cover the line before or its label. */
  function spread(labels, y) {
    const scale = d3.scaleLog().domain(y.domain).range([320, 0]);
    let last = -Infinity;
    return labels.map((label) => {
      const line = scale(label.y);
      const above = line - 7;
      const at = above >= last + 12 ? above : Math.max(line + 8, last + 12);
      last = at;
      return { ...label, dy: at - line };
    });
  }

  function rooflineNote(roofs, numLost) {
    const [hasMeasured, hasMakers] = [false, true].map((is) => roofs.some((roof) => roof.isMakers === is));
    const measured = hasMeasured
      ? "Solid: what a large matmul and a copy reached here."
      : "No ceiling was measured here.";
    const makers = hasMakers ? " Dashed: the maker's figures." : hasMeasured ? "" : " No maker's peak is known either.";
    const lost = numLost ? ` ${vitcmp.plural(numLost, "point")} left out, whose bytes are unknown.` : "";
    return `${measured}${makers} FLOP/byte counts the bytes that a step must move at least.${lost}`;
  }

  function table(timed) {
    const figures = [STEP, METRICS.latency, REACHED, INTENSITY];
    const figure = (metric) => ({
      title: `${metric.title}, ${metric.unit}`,
      isNumber: true,
      text: ({ row }) => vitcmp.number(metric.of(row)[0]),
    });
    const columns = [
      { title: "Model", text: (point) => point.model },
      { title: "Image, px", text: ({ row }) => row.image_size, isNumber: true },
      { title: "Setting", text: ({ row }) => vitcmp.setting(row) },
      ...figures.map(figure),
      {
        title: "Share of the maker's peak",
        text: ({ row: { peak_share: share } }) =>
          share === null ? "–" : `${vitcmp.number(100 * share, { digits: 3 })} %`,
        isNumber: true,
      },
    ];
    return vitcmp.table(columns, timed, { caption: "FLOPs and what was reached" });
  }
});
