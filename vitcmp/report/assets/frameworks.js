// JAX against torch: the ratio where the outputs are equal, the reason where they are not.
"use strict";

vitcmp.section("frameworks", (root, payload) => {
  const { state, element } = vitcmp;
  const NAMES = ["device", "mode", "batch", "numerics", "vitdet", "off", "frameworks.table"];

  vitcmp.share(payload);
  state.define("frameworks.table", "0", vitcmp.isFlag);
  root.append(
    element(
      "p",
      {},
      "A ratio is given only where the outputs of both frameworks, for one photograph and one set of weights, ",
      "differ by no more than rounding can do. ",
      "Above 1: JAX is faster. The grey band is 3 % to either side, which counts as the same.",
    ),
    vitcmp.controls(
      payload,
      ["device", "mode", "batch", "numerics"],
      vitcmp.check("frameworks.table", "numbers and parity as a table"),
    ),
    vitcmp.switches(payload),
  );
  vitcmp.view(root, NAMES, draw);

  function draw(width) {
    const list = chosen();
    if (!list.length)
      return element("p", { class: "empty" }, "No point was measured in both frameworks with these choices.");
    const points = list.filter((c) => c.ratio).map(place);
    const refused = list.filter((c) => !c.ratio).map(refusal);
    return [
      summary(list),
      vitcmp.stripLegend(refused, "Marks above the chart, no ratio is given:"),
      chart(points, refused, width),
      state.get("frameworks.table") === "1" ? table(list) : null,
    ];
  }

  function chosen() {
    const fits = (c) =>
      c.device === state.get("device") &&
      c.mode === state.get("mode") &&
      String(c.batch_size) === state.get("batch") &&
      vitcmp.isShown(payload, c.model);
    const here = payload.comparisons.filter(fits);
    return state.get("numerics") === "best" ? best(here) : here.filter((c) => c.numerics === state.get("numerics"));
  }

  /** Returns one comparison for each model, size and weights: best with best, of one numerics where they agree. */
  function best(list) {
    const groups = d3.groups(list, (c) => `${c.model}|${c.image_size}|${c.weights}`);
    return groups.map(
      ([, group]) => group.find((c) => c.numerics === "best of any") ?? d3.least(group, (c) => rowOf(c.jax).latency_s),
    );
  }

  function rowOf(index) {
    return vitcmp.rows(payload)[index];
  }

  function place(c) {
    const { colour, symbol, label } = vitcmp.models(payload).get(c.model);
    const { value, low, high } = c.ratio;
    return {
      key: `${c.model}|${c.weights}`,
      label,
      colour,
      symbol,
      x: rowOf(c.jax).px,
      y: value,
      low,
      high,
      isHollow: c.ratio.verdict === "ambiguous",
      text: describe(c),
    };
  }

  function refusal(c) {
    const { colour, label } = vitcmp.models(payload).get(c.model);
    return { key: c.model, label, colour, x: rowOf(c.jax).px, status: "refused", isPartly: false, text: describe(c) };
  }

  function describe(c) {
    const sides = [
      ["JAX", c.jax],
      ["torch", c.torch],
    ].map(
      ([name, index]) =>
        `${name}: ${vitcmp.figureText(vitcmp.METRICS.latency, rowOf(index))} (${vitcmp.setting(rowOf(index))})`,
    );
    const verdict = c.ratio
      ? [`torch / JAX: ${ratioText(c.ratio)}`, c.ratio.verdict]
      : [`Refused: ${c.refusal ?? "outputs are not proved equal"}`];
    return [
      `${c.model}, ${c.image_size} px, batch ${c.batch_size}, ${c.numerics}`,
      ...verdict,
      ...sides,
      parityText(c),
      gapText(c),
    ]
      .filter(Boolean)
      .join("\n");
  }

  function ratioText({ value, low, high }) {
    return `${vitcmp.number(value, { digits: 3 })} ${vitcmp.interval(low, high, value, 3)}`;
  }

  function parityText({ parity }) {
    if (!parity || parity.status === null) return "outputs: each proved at its own numerics";
    const words = { equal: "equal", differs: "differ", missing: "not proved" };
    return `outputs: ${words[parity.status] ?? parity.status}${errorText(parity)}`;
  }

  function errorText({ error, bound }) {
    return error === null || bound === null
      ? ""
      : `, error ${power(error)} ${error <= bound ? "<" : ">"} bound ${power(bound)}`;
  }

  function power(value) {
    return value === null ? "–" : value === 0 ? "0" : value.toExponential(1).replace("e+", "e");
  }

  function gapText(c) {
    const gap = `${vitcmp.number(c.gap_s / 60, { digits: 2 })} min`;
    return c.gap_s > 60 ? `not interleaved: the sides ran ${gap} apart, so the machine's drift is in the ratio` : "";
  }

  function summary(list) {
    const verdicts = d3.groups(list, (c) => c.ratio?.verdict ?? "refused");
    const counts = verdicts.map(([verdict, group]) => `${verdict} ${group.length}`).join(", ");
    const gaps = list.filter((c) => c.ratio && c.gap_s > 60).length;
    const drift = ` In ${gaps} the sides did not take turns: the machine's drift is in the ratio, which is indicative.`;
    return element("p", {}, `${vitcmp.plural(list.length, "point")} measured in both: ${counts}.${gaps ? drift : ""}`);
  }

  function chart(list, refused, width) {
    const sizes = [...list, ...refused].map((point) => point.x);
    const x = vitcmp.sizeAxis(sizes, width, "log");
    const ends = list.flatMap((point) => [point.y, point.low, point.high]);
    const y = vitcmp.valueAxis([...ends, 0.9, 1.1], "log", "latency, torch / JAX (above 1: JAX is faster)");
    const points = vitcmp.dodge(list, x, width);
    const svg = vitcmp.plot({ width, height: 340, x, y, marks: vitcmp.ratios(points, x) });
    const note =
      "Hollow: ambiguous, the interval crosses the edge of the band. Points of one size are set a little apart.";
    const title = "Latency, torch over JAX";
    return vitcmp.figure({ title, note, svg, points, failures: refused, width, x, className: "wide" });
  }

  function table(list) {
    const ms = (index) => vitcmp.number(1e3 * rowOf(index).latency_s);
    const columns = [
      { title: "Model", text: (c) => c.model },
      { title: "Image, px", text: (c) => c.image_size, isNumber: true },
      { title: "Numerics", text: (c) => c.numerics },
      { title: "Outputs", text: (c) => parityText(c).replace("outputs: ", "") },
      { title: "JAX, ms", text: (c) => ms(c.jax), isNumber: true },
      { title: "JAX setting", text: (c) => vitcmp.setting(rowOf(c.jax)) },
      { title: "torch, ms", text: (c) => ms(c.torch), isNumber: true },
      { title: "torch setting", text: (c) => vitcmp.setting(rowOf(c.torch)) },
      {
        title: "torch / JAX",
        text: (c) => (c.ratio ? ratioText(c.ratio) : `refused: ${c.refusal ?? "not proved"}`),
        isNumber: true,
      },
      { title: "Latency", text: (c) => c.ratio?.verdict ?? "–" },
      {
        title: "CPU time, torch / JAX",
        text: (c) => (c.cpu_ratio ? `${ratioText(c.cpu_ratio)}, ${c.cpu_ratio.verdict}` : "–"),
      },
      { title: "Apart, s", text: (c) => vitcmp.number(c.gap_s, { digits: 2 }), isNumber: true },
      { title: "Weights", text: (c) => c.weights },
    ];
    return vitcmp.table(columns, list, {
      caption: "JAX against torch: ratio [interval], and whether the outputs are equal",
    });
  }
});
