// The capacity experiment's learning curves: the loss of every step, the test set after every epoch, both frameworks.
"use strict";

(() => {
  const { state, element } = vitcmp;
  const { LOOKS, NAMES, isOn, metric } = vitcmp.capacity;

  /** Returns the pairs of runs, one of each framework, that the group has a side of. */
  function pairsOf(capacity, group) {
    const index = capacity.groups.indexOf(group);
    return capacity.pairs.filter((pair) => pair.jax === index || pair.torch === index);
  }

  /** Returns the groups that the other framework trained with the same settings. */
  function partners(capacity, group) {
    const index = capacity.groups.indexOf(group);
    const others = pairsOf(capacity, group).map((pair) => (pair.jax === index ? pair.torch : pair.jax));
    return [...new Set(others)].map((other) => capacity.groups[other]);
  }

  /** Draws two charts for each arm: training loss by step, and the test set by epoch. */
  function curves(capacity, group, width) {
    const others = isOn("both") ? partners(capacity, group) : [];
    const shown = [group, ...others].flatMap((one) =>
      one.curves.map((curve) => ({ ...curve, backend: one.backend, isOther: one !== group })),
    );
    if (!shown.length) return [element("p", { class: "empty" }, "No run got as far as a step.")];
    const arms = Object.keys(LOOKS).filter((arm) => shown.some((curve) => curve.arm === arm));
    const columns = Math.max(1, Math.min(arms.length, Math.floor(width / 280)));
    const size = (width - 24 * (columns - 1)) / columns;
    const grid = (title, kind) => [
      element("h4", {}, title),
      element(
        "div",
        { class: "capacity-curves", style: `--columns: ${columns}` },
        ...arms.map((arm) => chart(kind, arm, shown, size)),
      ),
    ];
    const width0 = d3.max(shown, (curve) => curve.width);
    const smooth = width0 > 1 ? `, each point the mean of ${width0} steps` : ", step by step";
    return [
      ...grid(`Training loss${smooth}`, STEPS),
      ...grid(`${metric().title} on the test set after each epoch`, EPOCHS),
      ...difference(capacity, group),
    ];
  }

  const STEPS = {
    x: "step",
    y: () => "training loss",
    points: (curve) =>
      curve.loss.map((loss, i) => {
        const first = i * curve.width;
        const last = Math.min(first + curve.width, curve.num_steps) - 1;
        const where = first === last ? `step ${first}` : `steps ${first} to ${last}`;
        return { x: (first + last) / 2, y: loss, where, said: `loss ${vitcmp.number(loss)}` };
      }),
  };
  const EPOCHS = {
    x: "epoch",
    y: () => metric().axis,
    points: (curve) =>
      curve.evaluations.map(([epoch, , accuracy, loss]) => {
        const y = metric().scale * { accuracy, loss }[state.get("capacity.metric")];
        const said = `${metric().title.toLowerCase()} ${vitcmp.number(y, { digits: 3 })}${metric().unit}`;
        return { x: epoch, y, where: `epoch ${vitcmp.number(epoch, { digits: 2 })}`, said };
      }),
  };

  function chart(kind, arm, shown, width) {
    const points = shown.filter((curve) => curve.arm === arm).flatMap((curve) => pointsOf(kind, curve));
    const all = shown.flatMap((curve) => kind.points(curve));
    const ofLoss = kind === STEPS || state.get("capacity.metric") === "loss";
    const y = vitcmp.valueAxis(
      all.map((point) => point.y),
      isOn("log") && ofLoss ? "log" : "linear",
      kind.y(),
    );
    const x = { type: "linear", domain: domain(all.map((point) => point.x)), label: kind.x, ticks: 4 };
    const look = { x: "x", y: "y", z: "key", stroke: "colour", strokeWidth: 1.5 };
    const [own, others] = [false, true].map((isOther) => points.filter((point) => point.isOther === isOther));
    const isFew = kind === EPOCHS || points.every((point) => point.count <= 12);
    const marks = [
      Plot.line(own, look),
      Plot.line(others, { ...look, strokeDasharray: "2 4" }),
      ...(isFew ? [vitcmp.dots(points, 2.6)] : []),
      vitcmp.tip(points),
    ];
    const svg = vitcmp.plot({ width, height: 200, x, y, marks });
    return vitcmp.figure({ title: arm, note: note(points), svg, points });
  }

  /** Says what a line is; where the other framework's lie over these, they are dotted. */
  function note(points) {
    const names = (isOther) =>
      vitcmp.distinct(
        points.filter((point) => point.isOther === isOther),
        "backend",
      );
    const [own, others] = [names(false), names(true)].map((list) => list.map((name) => NAMES[name] ?? name).join());
    return `${own}: lines${others ? `; ${others}: dotted` : ""}, one a seed.`;
  }

  function pointsOf(kind, curve) {
    const { colour, symbol } = LOOKS[curve.arm];
    const name = NAMES[curve.backend] ?? curve.backend;
    const isWhole = curve.status === "ok" ? "" : `\n${curve.status}`;
    const list = kind.points(curve).filter((point) => Number.isFinite(point.y));
    return list.map((point) => ({
      ...point,
      key: `${curve.backend} ${curve.seed}`,
      backend: curve.backend,
      isOther: curve.isOther,
      isHollow: curve.isOther,
      colour: curve.isOther ? "var(--ink)" : colour,
      symbol,
      count: list.length,
      text: `${curve.arm}, ${name}, seed ${curve.seed}, ${point.where}\n${point.said}${isWhole}`,
    }));
  }

  function domain(values) {
    const [low, high] = d3.extent(values);
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  /** Says how far apart the frameworks' losses are, where both have the same settings. */
  function difference(capacity, group) {
    const list = pairsOf(capacity, group);
    if (!list.length) return [];
    const worst = d3.greatest(list, (pair) => pair.difference);
    const power = (value) => (value === 0 ? "0" : value.toExponential(1));
    const numerics = group.facts.find(([name]) => name === "recipe")?.[1].match(/numerics (\S+?)(,|$)/)?.[1];
    const text =
      `JAX and torch with the same settings, weights and batches, ${vitcmp.plural(list.length, "pair")} of runs` +
      `${numerics ? ` in ${numerics}` : ""}: the largest difference of their losses at any step is ` +
      `${power(worst.difference)} (${worst.arm}, seed ${worst.seed}, step ${worst.step} of ${worst.num_steps}), ` +
      `at step 0 it is ${power(d3.max(list, (pair) => pair.first))}. In float64 they agree to rounding; in float32 ` +
      "rounding grows from step to step, as between two machines.";
    return [element("p", { class: "note" }, text)];
  }

  Object.assign(vitcmp.capacity, { curves, pairsOf });
})();
