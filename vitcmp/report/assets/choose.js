// What should I use? The reader's size, batch and budgets; the Pareto front of what was measured.
"use strict";

vitcmp.section("choose", (root, payload) => {
  const { state, element, METRICS } = vitcmp;
  const COSTS = {
    flops: METRICS.flops,
    params: { title: "Parameters", unit: "M", of: (row) => [vitcmp.scaled(row.params, 1e-6)] },
    activations: METRICS.activations,
    process: METRICS.process,
  };
  const ALL = [METRICS.latency, METRICS.throughput, ...Object.values(COSTS), METRICS.parameters];
  const MEMORIES = ["activations", "process"];
  const NOTE =
    "Large and joined: the Pareto front, which nothing measured beats in both. Small: beaten; faint: over budget. " +
    "A model is named at its fastest setting, where there is room.";
  const isBudget = (text) => Number(text) > 0;

  vitcmp.share(payload);
  const sizes = d3
    .sort(
      new Map(
        vitcmp
          .rows(payload)
          .filter(vitcmp.isTimed)
          .map((row) => [row.image_size, row.px]),
      ),
      ([, px]) => px,
    )
    .map(([size]) => size);
  state.define("choose.size", sizes.includes("224") ? "224" : (sizes[0] ?? ""), sizes);
  state.define("choose.latency", "", isBudget);
  state.define("choose.memory", "", isBudget);
  state.define("choose.kind", "activations", MEMORIES);
  state.define("choose.cost", "flops", Object.keys(COSTS));
  root.append(
    element(
      "p",
      {},
      element("strong", {}, "No accuracy was measured. "),
      "What is fast is not therefore good: choose among models that are good enough for your task. ",
      "No single cost indicator ranks models rightly (",
      element("cite", {}, "The Efficiency Misnomer"),
      ", arXiv:2110.12894), so all that were measured are shown.",
    ),
    vitcmp.controls(
      payload,
      ["device", "mode", "batch", "backend", "numerics"],
      vitcmp.select("choose.size", "Image size, px", sizes),
      vitcmp.field("choose.latency", "Latency budget, ms a batch"),
      vitcmp.field("choose.memory", "Memory budget, MB"),
      vitcmp.select(
        "choose.kind",
        "Memory is",
        MEMORIES.map((name) => [name, METRICS[name].title.replace("Memory: ", "")]),
      ),
      vitcmp.select(
        "choose.cost",
        "Latency against",
        Object.entries(COSTS).map(([name, { title }]) => [name, title]),
      ),
    ),
    vitcmp.switches(payload),
  );
  const own = ["size", "latency", "memory", "kind", "cost"].map((name) => `choose.${name}`);
  vitcmp.view(root, ["device", "mode", "batch", "backend", "numerics", "vitdet", "off", ...own], draw);

  function draw(width) {
    const all = vitcmp.chosen(payload).filter((row) => row.image_size === state.get("choose.size"));
    const here = all.filter(vitcmp.isTimed);
    if (!here.length) return [vitcmp.nothing(payload), lost(all)];
    const fitting = here.filter(fits);
    const cost = COSTS[state.get("choose.cost")];
    const front = pareto(fitting, cost);
    return [
      element("p", { class: "answer", "aria-live": "polite" }, sentence(here, fitting)),
      lost(all),
      chart(here, new Set(fitting), front, cost, width),
      table(front),
    ];
  }

  /** Names the models of which nothing ran at this size, and why not. */
  function lost(all) {
    const groups = [...vitcmp.best(all, (row) => row.model).values()].filter(({ row }) => !row);
    const texts = groups.map(({ failed }) => `${name(failed[0])} (${vitcmp.failures(failed)})`);
    return texts.length ? element("p", { class: "note" }, `Did not run at this size: ${texts.join("; ")}.`) : null;
  }

  /** Says whether a row keeps to the budgets; a memory that is unknown keeps to none. */
  function fits(row) {
    const [latency, memory] = ["latency", "memory"].map((name) => state.get(`choose.${name}`));
    const used = METRICS[state.get("choose.kind")].of(row)[0];
    return !(latency && 1e3 * row.latency_s > Number(latency)) && !(memory && (used === null || used > Number(memory)));
  }

  /** Returns the rows that no other beats in latency without costing more; where the cost is unknown, none. */
  function pareto(list, cost) {
    const known = list.filter((row) => cost.of(row)[0] !== null);
    let least = Infinity;
    return d3
      .sort(
        known,
        (row) => row.latency_s,
        (row) => cost.of(row)[0],
      )
      .filter((row) => {
        const isBetter = cost.of(row)[0] < least;
        if (isBetter) least = cost.of(row)[0];
        return isBetter;
      });
  }

  function name(row) {
    return vitcmp.models(payload).get(row.model).label;
  }

  function sentence(here, fitting) {
    const [size, batch, mode, device] = ["choose.size", "batch", "mode", "device"].map(state.get);
    const where = `At ${size} px, batch ${batch}, ${mode}, on ${device}`;
    const count = (list) => vitcmp.plural(vitcmp.distinct(list, "model").length, "model");
    const budget =
      state.get("choose.latency") || state.get("choose.memory")
        ? ` of ${count(here)} measured, those that keep to the budget: ${vitcmp.distinct(fitting, "model").length}`
        : ` ${count(here)} were measured`;
    if (!fitting.length) return `${where},${budget}.`;
    return `${where},${budget}. ${fastest(fitting)} ${leanest(fitting)}`;
  }

  function fastest(fitting) {
    const bests = d3.sort(
      [...vitcmp.best(fitting, (row) => row.model).values()].map(({ row }) => row),
      (row) => row.latency_s,
    );
    const [first] = bests;
    const level = bests
      .slice(1)
      .filter((row) => (row.latency_low_s ?? row.latency_s) <= 1.03 * (first.latency_high_s ?? first.latency_s))
      .map(name);
    const same = level.length ? `; within 3 % or inside its interval: ${vitcmp.list(level)}` : "";
    return `Lowest latency: ${say(METRICS.latency, first)}${same}.`;
  }

  function say(metric, row) {
    return `${name(row)}, ${vitcmp.figureText(metric, row)} (${vitcmp.setting(row)})`;
  }

  function leanest(fitting) {
    const metric = METRICS[state.get("choose.kind")];
    const least = d3.least(
      fitting.filter((row) => metric.of(row)[0] !== null),
      (row) => metric.of(row)[0],
    );
    return least ? `Least ${metric.title.replace("Memory: ", "")}: ${say(metric, least)}.` : "";
  }

  function chart(here, fitting, front, cost, width) {
    const best = new Set(front);
    const points = here.map((row) => place(row, cost)).filter((point) => point.x > 0);
    const title = `Latency against ${cost.title.replace("Memory: ", "")}`;
    if (!points.length) return vitcmp.unknown(title, "Unknown for all of these.");
    const [xs, ys] = [points.map((point) => point.x), points.map((point) => point.y)];
    const axes = { x: vitcmp.valueAxis(xs, "log", cost.unit), y: vitcmp.valueAxis(ys, "log", "ms") };
    const others = points.filter((point) => !best.has(point.row));
    const [beyond, within] = [false, true].map((is) => others.filter((point) => fitting.has(point.row) === is));
    const joined = frontMarks(points.filter((point) => best.has(point.row)));
    const marks = [
      ...budgets(axes),
      faint(beyond, 0.18),
      faint(within, 0.55),
      ...joined,
      ...labels(points, axes, width),
    ];
    const svg = vitcmp.plot({ width, height: 340, ...axes, marks: [...marks, vitcmp.tip(points)] });
    return vitcmp.figure({ title, note: NOTE, svg, points, className: "wide" });
  }

  function place(row, cost) {
    const { colour, symbol } = vitcmp.models(payload).get(row.model);
    const text = vitcmp.describe({ row }, ...ALL);
    return { key: row.model, row, colour, symbol, x: cost.of(row)[0], y: 1e3 * row.latency_s, isHollow: false, text };
  }

  function faint(points, opacity) {
    return Plot.dot(points, { x: "x", y: "y", fill: "colour", symbol: "symbol", r: 3, fillOpacity: opacity });
  }

  function frontMarks(points) {
    const look = { stroke: "var(--soft)", curve: "step-after", strokeDasharray: "2 3" };
    const ordered = d3.sort(points, (point) => point.x);
    return [Plot.line(ordered, { x: "x", y: "y", ...look }), vitcmp.dots(points, 6)];
  }

  // Where a name may stand beside its point: [right of it or left of it, pixels below it].
  const PLACES = [0, -13, 13, -26, 26, -39, 39].flatMap((dy) => [1, -1].map((side) => [side, dy]));

  /** Names each model at its fastest point, where there is room for the name, and covers no other name with it. */
  function labels(points, { x, y }, width) {
    const across = d3.scaleLog(x.domain, [vitcmp.MARGIN.left, width - vitcmp.MARGIN.right]);
    const down = d3.scaleLog(y.domain, [302, 22]);
    const spot = (point) => ({ left: across(point.x) - 4, right: across(point.x) + 4, at: down(point.y), half: 4 });
    const [taken, kept] = [points.map(spot), []];
    for (const [, group] of d3.groups(points, (point) => point.key)) {
      const point = d3.least(group, ({ y: ms }) => ms);
      const text = shortened(name(point.row));
      const boxes = PLACES.map((place) => boxOf(spot(point), text, place));
      const isInside = (box) => box.left > vitcmp.MARGIN.left && box.right < width && box.at > 10 && box.at < 296;
      const box = boxes.find((one) => isInside(one) && taken.every((other) => !covers(one, other)));
      if (box) kept.push({ ...point, text, place: box.place });
      if (box) taken.push(box);
    }
    return d3.groups(kept, ({ place }) => place).map(([place, group]) => named(group, place));
  }

  function shortened(text) {
    return text.length > 28 ? `${text.slice(0, 27)}…` : text;
  }

  function boxOf({ left, right, at }, text, place) {
    const [side, dy] = place;
    const size = 6.6 * text.length + 6; // of letters 11 px high
    const [from, to] = side > 0 ? [right, right + size] : [left - size, left];
    return { left: from, right: to, at: at + dy, half: 7, place };
  }

  function covers(a, b) {
    return a.left < b.right && b.left < a.right && Math.abs(a.at - b.at) < a.half + b.half;
  }

  function named(group, [side, dy]) {
    const look = { text: "text", fontSize: 11, fill: "var(--ink)", stroke: "var(--paper)" };
    return Plot.text(group, { x: "x", y: "y", ...look, dx: 9 * side, dy, textAnchor: side > 0 ? "start" : "end" });
  }

  function budgets({ x, y }) {
    const latency = Number(state.get("choose.latency"));
    const memory = state.get("choose.cost") === state.get("choose.kind") ? Number(state.get("choose.memory")) : 0;
    const inside = (value, { domain }) => value > domain[0] && value < domain[1];
    const look = { stroke: "var(--warn)", strokeDasharray: "6 4" };
    return [
      inside(latency, y) ? Plot.ruleY([latency], look) : null,
      inside(memory, x) ? Plot.ruleX([memory], look) : null,
    ].filter(Boolean);
  }

  function table(front) {
    const columns = [
      { title: "Model", text: (row) => row.model },
      { title: "Setting", text: vitcmp.setting },
      ...ALL.map((metric) => ({
        title: `${metric.title}, ${metric.unit}`,
        isNumber: true,
        text: (row) => vitcmp.number(metric.of(row)[0]),
      })),
      { title: "Marks", text: (row) => vitcmp.marks(row).join("; ") },
    ];
    return vitcmp.table(columns, front, { caption: "The front, with every cost that was measured" });
  }
});
