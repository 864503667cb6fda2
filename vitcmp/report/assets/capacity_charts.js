// The capacity experiment's charts of the ends: bars as in PaliGemma's figure 9, the split, accuracy against FLOPs.
"use strict";

(() => {
  const { state, element } = vitcmp;
  const { LOOKS, isOn, metric, result, split, say } = vitcmp.capacity;
  const ARMS = Object.keys(LOOKS);
  const HALF_BAR = 0.36;
  // Of two arms with the same FLOPs, one is named on the left.
  const LEFT = { arms: ["low", "down_up"], dx: -10, textAnchor: "end" };
  const RIGHT = { arms: ["high", "patch"], dx: 10, textAnchor: "start" };

  /** Draws the arms of a group as bars from 0, with intervals, and each seed as a point. */
  function bars(capacity, group, { width, most, isChosen }) {
    const list = group.arms.map((arm) => ({ ...barOf(arm, ARMS.indexOf(arm.arm)), ...LOOKS[arm.arm] }));
    const seeds = group.arms.flatMap((arm) => seedsOf(arm, ARMS.indexOf(arm.arm)));
    const name = (i) => (group.arms.some((arm) => arm.arm === ARMS[i]) ? ARMS[i] : `no ${ARMS[i]}`);
    const box = { x1: (bar) => bar.x - HALF_BAR, x2: (bar) => bar.x + HALF_BAR, y1: 0, y2: "y" };
    const chance = state.get("capacity.metric") === "accuracy" && group.chance ? [100 * group.chance] : [];
    const x = { type: "linear", domain: [-0.6, 3.6], ticks: [0, 1, 2, 3], tickFormat: name, label: null };
    const y = { type: "linear", domain: [0, most * 1.08 || 1], label: metric().axis, ticks: 5, grid: true };
    const marks = [
      Plot.rect(list, { ...box, fill: "colour", fillOpacity: 0.55, stroke: "colour", strokeWidth: 1.5 }),
      Plot.ruleY(chance, { stroke: "var(--soft)", strokeDasharray: "5 4" }),
      Plot.text(chance, { frameAnchor: "right", y: (at) => at, text: () => "chance", dy: -6, fill: "var(--soft)" }),
      Plot.ruleX(list, { x: "x", y1: "low", y2: "high", stroke: "var(--ink)", strokeWidth: 2 }),
      Plot.dot(seeds, { x: "x", y: "y", r: 2.6, fill: "var(--paper)", stroke: "var(--ink)", strokeWidth: 1.2 }),
      vitcmp.tip([...list, ...seeds]),
    ];
    const svg = vitcmp.plot({ width, height: 230, x, y, marks });
    const points = [...list, ...seeds];
    const className = isChosen ? "capacity-chosen" : "";
    return vitcmp.figure({ title: shortTitle(capacity, group), note: numbers(group), svg, points, className });
  }

  function barOf(arm, x) {
    const { value, low, high } = result(arm);
    const text = `${arm.arm}: ${say({ value, low, high })}\n${counts(arm)}`;
    return { key: "arms", x, y: value, low, high, text };
  }

  function seedsOf(arm, x) {
    const { scale, unit } = metric();
    const step = Math.min(0.12, 0.5 / arm.seeds.length);
    return arm.seeds.map((one, i) => {
      const y = scale * one[state.get("capacity.metric")];
      const text = `${arm.arm}, seed ${one.seed}: ${vitcmp.number(y, { digits: 3 })}${unit}`;
      return { key: `seed ${one.seed}`, x: x + step * (i - (arm.seeds.length - 1) / 2), y, text };
    });
  }

  function counts(arm) {
    return `n: ${vitcmp.plural(arm.seeds.length, "seed")} x ${vitcmp.plural(arm.num_examples, "test example")}`;
  }

  function shortTitle(capacity, group) {
    return [group.dataset, `${group.low} and ${group.high} px`, ...group.differs].join(", ");
  }

  function numbers(group) {
    return group.arms.length ? counts(d3.greatest(group.arms, (arm) => arm.seeds.length)) : "no run went well";
  }

  /** Draws the bars of every data set with the chosen model and framework, all to one scale. */
  function everyDataset(capacity, width) {
    const list = vitcmp.capacity.matching(capacity, ["model", "backend"]);
    const most = d3.max(list, (group) => d3.max(group.arms, (arm) => highest(arm))) ?? 1;
    const size =
      list.length > 1 && width >= 640 ? (width - 24) / Math.min(3, list.length, Math.floor(width / 300)) - 12 : width;
    const isChosen = (group) => list.length > 1 && group === vitcmp.capacity.chosen(capacity);
    const charts = list.map((group) =>
      group.arms.length
        ? bars(capacity, group, { width: size, most, isChosen: isChosen(group) })
        : vitcmp.unknown(shortTitle(capacity, group), "No run went well; what happened is listed below."),
    );
    return element("div", { class: "grid capacity-bars" }, ...charts);
  }

  function highest(arm) {
    const name = state.get("capacity.metric");
    return metric().scale * Math.max(arm[name].high, ...arm.seeds.map((one) => one[name]));
  }

  /** Draws each comparison of the split with its interval; filled where the interval excludes 0. */
  function gains(capacity, group, width) {
    const list = split(group).gains;
    const titles = new Map(capacity.gains.map(({ name, title }) => [name, title]));
    const { scale, gained } = metric();
    const points = list.map((gain) => {
      const [x, low, high] = [gain.value, gain.low, gain.high].map((end) => scale * end);
      const key = titles.get(gain.name) ?? gain.name;
      return {
        key,
        y: key,
        x,
        low,
        high,
        isSeen: gain.verdict === "effect",
        text: `${key}: ${gain.amount} ${gained}\n${gain.words}`,
      };
    });
    const [low, high] = d3.extent([0, ...points.flatMap((point) => [point.low, point.high])]);
    const pad = 0.06 * (high - low || 1);
    const x = {
      type: "linear",
      domain: [low - pad, high + pad],
      label: axisOfGain(),
      grid: true,
      ticks: width < 500 ? 4 : 8,
    };
    const y = { type: "band", domain: points.map(({ key }) => key), label: null, padding: 0.3 };
    const marks = [
      Plot.ruleX([0], { stroke: "var(--ink)" }),
      Plot.ruleY(points, { y: "key", x1: "low", x2: "high", stroke: "var(--accent)", strokeWidth: 3 }),
      Plot.dot(points, {
        x: "x",
        y: "key",
        r: 5,
        fill: (point) => (point.isSeen ? "var(--accent)" : "var(--paper)"),
        stroke: "var(--accent)",
        strokeWidth: 2,
      }),
      vitcmp.tip(points),
    ];
    const svg = vitcmp.plot({
      width: Math.min(width, 820),
      height: 60 + 34 * points.length,
      marginLeft: 168,
      x,
      y,
      marks,
    });
    const note = "Filled: an effect, its 95 % interval excludes 0. Hollow: none at this power, or not judged.";
    return vitcmp.figure({ title: "The split", note, svg, points });
  }

  function axisOfGain() {
    return state.get("capacity.metric") === "accuracy" ? "gain, points of accuracy" : "gain, fall of the test loss";
  }

  /** Draws accuracy against FLOPs of the chosen data set and framework; filled: the chosen model. */
  function flops(capacity, width) {
    const own = vitcmp.capacity.chosen(capacity);
    const groups = vitcmp.capacity.matching(capacity, ["dataset", "backend"]);
    const points = groups.flatMap((group, i) =>
      group.arms.map((arm) => flopsPoint(capacity, group, arm, i, group === own)),
    );
    const known = points.filter(({ x }) => x !== null);
    if (!known.length) return vitcmp.unknown("Against GFLOP per image", "The FLOPs of this model are not known.");
    const type = isOn("log") ? "log" : "linear";
    const x = {
      ...vitcmp.valueAxis(
        known.map((point) => point.x),
        type,
        "GFLOP per image (forward)",
      ),
    };
    const y = vitcmp.valueAxis(
      known.flatMap((point) => [point.y, point.high]),
      "linear",
      metric().axis,
    );
    const marks = [
      Plot.ruleX(known, { x: "x", y1: "low", y2: "high", stroke: "colour", strokeWidth: 2, strokeOpacity: 0.6 }),
      vitcmp.dots(known, 6),
      ...[LEFT, RIGHT].map(({ arms, ...side }) => {
        const named = known.filter((point) => !point.isHollow && arms.includes(point.arm));
        return Plot.text(named, { x: "x", y: "y", text: "arm", fill: "var(--ink)", ...side });
      }),
      vitcmp.tip(known),
    ];
    const svg = vitcmp.plot({ width: Math.min(width, 820), height: 320, marginRight: 56, x, y, marks });
    const note =
      groups.length > 1 ? "Filled: the chosen setting. Hollow: the others on this data set in this framework." : "";
    return vitcmp.figure({ title: `${metric().title} against GFLOP per image`, note, svg, points: known });
  }

  function flopsPoint(capacity, group, arm, i, isOwn) {
    const { value, low, high } = result(arm);
    const x = vitcmp.scaled(arm.flops, 1e-9);
    const head = `${arm.arm}: ${vitcmp.capacity.modelLabel(capacity, group.model)}, ${group.low} and ${group.high} px`;
    const text = [head, `${vitcmp.number(x)} GFLOP per image`, say({ value, low, high }), counts(arm)].join("\n");
    return { key: `${i}`, x, y: value, low, high, arm: arm.arm, isHollow: !isOwn, text, ...LOOKS[arm.arm] };
  }

  Object.assign(vitcmp.capacity, { everyDataset, gains, flops });
})();
