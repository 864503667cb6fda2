// What each knob buys: latency with it at one value over latency with it at the reference, everything else best.
"use strict";

vitcmp.section("knobs", (root, payload) => {
  const { state, element } = vitcmp;
  const TITLES = {
    numerics: "numerics",
    attention: "attention kernel",
    compile: "compiler",
    layout: "memory layout",
    batch_norm: "BatchNorm",
  };
  const known = vitcmp.distinct(payload.knobs, "knob");

  vitcmp.share(payload);
  if (!known.length)
    return root.append(element("p", { class: "empty" }, "No knob was measured at two values or more."));
  state.define("knobs.knob", known[0], known);
  state.define("knobs.table", "0", vitcmp.isFlag);
  root.append(
    element(
      "p",
      {},
      "Each chart sets one value of a knob against the reference value, ",
      "every other knob being at its best on either side. ",
      "Below 1: it is faster than the reference. The grey band is 3 % to either side, which counts as the same.",
    ),
    vitcmp.controls(
      payload,
      ["device", "mode", "batch"],
      vitcmp.select(
        "knobs.knob",
        "Knob",
        known.map((name) => [name, TITLES[name] ?? name]),
      ),
      vitcmp.check("knobs.table", "numbers as a table"),
    ),
    vitcmp.switches(payload),
  );
  vitcmp.view(root, ["device", "mode", "batch", "vitdet", "off", "knobs.knob", "knobs.table"], draw);

  function draw(width) {
    const list = chosen();
    if (!list.length)
      return element("p", { class: "empty" }, "This knob was measured at one value only with these choices.");
    const groups = d3.groups(list, (k) => `${k.backend}: ${k.value} over ${k.reference}`);
    const size = groups.length > 1 ? vitcmp.half(width) : width;
    const y = vitcmp.valueAxis(
      [...list.flatMap(({ ratio }) => [ratio.value, ratio.low, ratio.high]), 0.9, 1.1],
      "log",
      "ratio of latencies (below 1: faster)",
    );
    const charts = groups.map(([title, group]) => chart(title, group, y, size));
    return [
      element("p", { class: "note" }, summary(list)),
      element("div", { class: "grid" }, ...charts),
      state.get("knobs.table") === "1" ? table(list) : null,
    ];
  }

  function chosen() {
    const wanted = {
      device: state.get("device"),
      mode: state.get("mode"),
      batch_size: state.get("batch"),
      knob: state.get("knobs.knob"),
    };
    return payload.knobs.filter(
      (k) =>
        Object.entries(wanted).every(([name, value]) => String(k[name]) === value) && vitcmp.isShown(payload, k.model),
    );
  }

  function rowOf(index) {
    return vitcmp.rows(payload)[index];
  }

  function chart(title, group, y, width) {
    const list = group.map(place);
    const sizes = list.map((point) => point.x);
    const x = vitcmp.sizeAxis(sizes, width, "log");
    const points = vitcmp.dodge(list, x, width);
    const svg = vitcmp.plot({ width, height: 250, x, y, marks: vitcmp.ratios(points, x) });
    return vitcmp.figure({ title, note: "Hollow: ambiguous. Points of one size are set a little apart.", svg, points });
  }

  function place(k) {
    const { colour, symbol } = vitcmp.models(payload).get(k.model);
    const { value, low, high, verdict } = k.ratio;
    return {
      key: `${k.model}|${k.weights}`,
      colour,
      symbol,
      x: rowOf(k.row).px,
      y: value,
      low,
      high,
      isHollow: verdict === "ambiguous",
      text: describe(k),
    };
  }

  function describe(k) {
    const sides = [
      [k.value, k.row],
      [k.reference, k.reference_row],
    ].map(
      ([value, index]) =>
        `${value}: ${vitcmp.figureText(vitcmp.METRICS.latency, rowOf(index))} (${vitcmp.setting(rowOf(index))})`,
    );
    return [
      `${k.model}, ${k.image_size} px, batch ${k.batch_size}`,
      `${k.value} / ${k.reference}: ${ratioText(k.ratio)}`,
      k.ratio.verdict,
      ...sides,
    ].join("\n");
  }

  function ratioText({ value, low, high }) {
    return `${vitcmp.number(value, { digits: 3 })} ${vitcmp.interval(low, high, value, 3)}`;
  }

  function summary(list) {
    const groups = d3.groups(list, (k) => `${k.backend}: ${k.value}`);
    const texts = groups.map(([name, group]) => {
      const middle = d3.median(group, (k) => k.ratio.value);
      return `${name} ${vitcmp.number(middle, { digits: 3 })}`;
    });
    return `Median over the points shown of the latency over the reference's: ${texts.join("; ")}.`;
  }

  function table(list) {
    const ms = (index) => vitcmp.number(1e3 * rowOf(index).latency_s);
    const columns = [
      { title: "Model", text: (k) => k.model },
      { title: "Image, px", text: (k) => k.image_size, isNumber: true },
      { title: "Framework", text: (k) => k.backend },
      { title: "Value", text: (k) => k.value },
      { title: "Reference", text: (k) => k.reference },
      { title: "Ratio", text: (k) => ratioText(k.ratio), isNumber: true },
      { title: "Verdict", text: (k) => k.ratio.verdict },
      { title: "ms", text: (k) => ms(k.row), isNumber: true },
      { title: "Setting", text: (k) => vitcmp.setting(rowOf(k.row)) },
      { title: "Reference, ms", text: (k) => ms(k.reference_row), isNumber: true },
      { title: "Reference's setting", text: (k) => vitcmp.setting(rowOf(k.reference_row)) },
    ];
    return vitcmp.table(columns, list, {
      caption: "Latency with the value over latency with the reference [interval]",
    });
  }
});
