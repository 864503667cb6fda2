// Crossovers: the image size at which one model overtakes another, as an interval.
"use strict";

vitcmp.section("crossovers", (root, payload) => {
  const { state, element } = vitcmp;
  const ANY = "all";
  const MAX_BARS = 40;
  const NOWHERE = { "not separable": "not to be told", "too few sizes": "too few sizes" };

  vitcmp.share(payload);
  const models = [...vitcmp.models(payload).keys()];
  state.define("crossovers.backend", "best", ["best", "jax", "torch"]);
  state.define("crossovers.model", ANY, [ANY, ...models]);
  state.define("crossovers.table", "1", vitcmp.isFlag);
  root.append(
    element(
      "p",
      {},
      "Where two curves of latency cross. The interval comes from the intervals of the latencies; ",
      "between two measured sizes a ratio is taken for linear on logarithmic axes. ",
      "Nothing is said about sizes outside the measured range.",
    ),
    vitcmp.controls(
      payload,
      ["device", "mode", "batch"],
      vitcmp.select("crossovers.backend", "Framework", [
        ["best", "the faster of both"],
        ["jax", "JAX"],
        ["torch", "torch"],
      ]),
      vitcmp.select("crossovers.model", "Pairs with", [[ANY, "any model"], ...models]),
      vitcmp.check("crossovers.table", "pairs as a table"),
    ),
    vitcmp.switches(payload),
  );
  vitcmp.view(
    root,
    ["device", "mode", "batch", "vitdet", "off", "crossovers.backend", "crossovers.model", "crossovers.table"],
    draw,
  );

  function draw(width) {
    const list = chosen();
    if (!list.length)
      return element("p", { class: "empty" }, "No two of the models shown were measured with these choices.");
    const crossing = list.filter((c) => c.status === "crosses");
    return [
      element("p", {}, summary(list, crossing)),
      crossing.length ? chart(crossing, width) : null,
      state.get("crossovers.table") === "1" ? table(list) : null,
    ];
  }

  function chosen() {
    const wanted = {
      device: state.get("device"),
      mode: state.get("mode"),
      batch_size: state.get("batch"),
      backend: state.get("crossovers.backend"),
    };
    const model = state.get("crossovers.model");
    const fits = (c) => Object.entries(wanted).every(([name, value]) => String(c[name]) === value);
    return payload.crossovers.filter(
      (c) => fits(c) && [ANY, c.a, c.b].includes(model) && vitcmp.isShown(payload, c.a) && vitcmp.isShown(payload, c.b),
    );
  }

  function label(name) {
    return vitcmp.models(payload).get(name)?.label ?? name;
  }

  function ends(c) {
    return [c.low_px, c.high_px].map(vitcmp.px);
  }

  /** Says a pair in words. Where they cross, `a` is the faster one above and `b` the one below. */
  function words(c) {
    switch (c.status) {
      case "crosses":
        return `${label(c.a)} overtakes ${label(c.b)} between ${ends(c).join(" and ")} px`;
      case "a faster throughout":
        return `no crossing in the measured range: ${label(c.a)} is faster at every measured size`;
      case "b faster throughout":
        return `no crossing in the measured range: ${label(c.b)} is faster at every measured size`;
      case "not separable":
        return "not to be told in the measured range: their intervals overlap, or differ by less than 3 %";
      default:
        return "too few sizes were measured of both";
    }
  }

  function summary(list, crossing) {
    const pairs = new Set(list.map((c) => [c.a, c.b].sort().join(" ")));
    const says = { crosses: "cross", "not separable": "not to be told apart", "too few sizes": "with too few sizes" };
    const say = (c) => says[c.status] ?? "with one faster throughout the measured range";
    const counts = d3.groups(list, say).map(([words, group]) => `${group.length} ${words}`);
    const none = crossing.length ? "" : " None crosses in the measured range.";
    return `Of ${vitcmp.plural(pairs.size, "pair")}: ${counts.join(", ")}.${none}`;
  }

  function chart(crossing, width) {
    const points = d3
      .sort(crossing, (c) => c.low_px)
      .slice(0, MAX_BARS)
      .map((c, i) => ({
        ...c,
        key: `${i}`,
        x: Math.sqrt(c.low_px * c.high_px),
        y: `${i}`,
        pair: `${label(c.a)} over ${label(c.b)}`,
        text: words(c),
        colour: vitcmp.models(payload).get(c.a).colour,
        symbol: vitcmp.models(payload).get(c.a).symbol,
      }));
    const sizes = vitcmp
      .rows(payload)
      .filter((row) => row.device === state.get("device"))
      .map((row) => row.px);
    const x = vitcmp.sizeAxis(sizes, width, "log");
    const y = { type: "band", domain: points.map((point) => point.y), axis: null };
    const left = { x: x.domain[0], textAnchor: "start", fontSize: 11, fill: "var(--ink)" };
    const marks = [
      Plot.gridX(x.ticks, { stroke: "var(--line)", strokeOpacity: 1 }),
      Plot.ruleY(points, {
        y: "y",
        x1: "low_px",
        x2: "high_px",
        stroke: "colour",
        strokeWidth: 5,
        strokeOpacity: 0.6,
        strokeLinecap: "round",
      }),
      vitcmp.dots(points, 4),
      Plot.text(points, { ...left, y: "y", text: "pair", dy: -9 }),
      vitcmp.tip(points),
    ];
    const svg = vitcmp.plot({ width, height: points.length * 34 + 50, marginTop: 8, marginLeft: 14, x, y, marks });
    const rest = `The first ${MAX_BARS} of ${crossing.length} pairs: the table has all, and “Pairs with” chooses.`;
    const note =
      "The bar is the interval of the size; the symbol is that of the model which is the faster one above it." +
      (crossing.length > MAX_BARS ? ` ${rest}` : "");
    return vitcmp.figure({ title: "Where one model overtakes another", note, svg, points, className: "wide" });
  }

  function table(list) {
    const columns = [
      { title: "Pair", text: (c) => `${c.a} and ${c.b}` },
      {
        title: "Faster below",
        text: (c) => ({ crosses: c.b, "a faster throughout": c.a, "b faster throughout": c.b })[c.status] ?? "–",
      },
      {
        title: "Faster above",
        text: (c) => ({ crosses: c.a, "a faster throughout": c.a, "b faster throughout": c.b })[c.status] ?? "–",
      },
      {
        title: "Overtakes at, px",
        text: (c) =>
          c.status === "crosses" ? ends(c).join(" to ") : (NOWHERE[c.status] ?? "not in the measured range"),
        isNumber: true,
      },
      { title: "In words", text: words },
    ];
    return vitcmp.table(columns, list, { caption: "Every pair of the models shown" });
  }
});
