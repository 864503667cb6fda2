// The capacity experiment as tables: all groups at once, the arms, the split, who was tested as what, what went wrong.
"use strict";

(() => {
  const { state, element, number } = vitcmp;
  const { NAMES, metric, result, split, say, modelLabel } = vitcmp.capacity;
  const count = (arm) => `${arm.seeds.length} x ${arm.num_examples.toLocaleString("en")}`;
  const MAIN = ["capacity", "resolution", "total"];
  const VERDICTS = { effect: "", "no effect at this power": " ○", "not judged": " ?" };

  /** Makes a row for each group: what each part of the gain is, and what share is capacity. */
  function overview(capacity) {
    const gainOf = (name) => (group) => {
      const gain = split(group)?.gains.find((one) => one.name === name);
      return gain ? `${gain.amount}${VERDICTS[gain.verdict]}` : "–";
    };
    const columns = [
      { title: "Data set", text: (g) => [g.dataset, `${g.low} and ${g.high} px`, ...g.differs].join(", ") },
      { title: "Model", text: (g) => modelLabel(capacity, g.model) },
      { title: "Framework", text: (g) => NAMES[g.backend] ?? g.backend },
      ...capacity.gains
        .filter(({ name }) => MAIN.includes(name))
        .map(({ name, title }) => ({
          title: `${title[0].toUpperCase()}${title.slice(1)}`,
          text: gainOf(name),
          isNumber: true,
        })),
      { title: "Capacity's share", text: (g) => split(g)?.share_amount, isNumber: true },
    ];
    const caption =
      `Gains, ${state.get("capacity.metric") === "accuracy" ? "points of accuracy" : "fall of the test loss"} ` +
      "[95 % interval]. ○: no effect at this power. ?: one seed, not judged.";
    return vitcmp.table(columns, capacity.groups, { caption });
  }

  /** Makes a row for each arm, those that there are not among them. */
  function arms(capacity, group) {
    const cell = new Map(capacity.arms.map((arm) => [arm.name, arm]));
    const px = (arm, side) => `${group[cell.get(arm)[side]]} px`;
    const list = [...group.arms, ...group.absent];
    const known = (text) => (arm) => (arm.reason ? "–" : text(arm));
    const columns = [
      { title: "Arm", text: (arm) => arm.arm },
      { title: "Information", text: (arm) => (arm.reason ? arm.reason : px(arm.arm, "information")) },
      { title: "Compute of", text: known((arm) => px(arm.arm, "compute")) },
      { title: "GFLOP/image", text: known((arm) => number(vitcmp.scaled(arm.flops, 1e-9))), isNumber: true },
      { title: "Parameters, M", text: known((arm) => number(arm.num_params * 1e-6)), isNumber: true },
      { title: "Accuracy, %", text: known((arm) => say(scaled(arm.accuracy, 100), { unit: "" })), isNumber: true },
      { title: "Loss", text: known((arm) => say(arm.loss, { unit: "" })), isNumber: true },
      {
        title: "Step, ms",
        text: known((arm) => (arm.step_s ? say(scaled(arm.step_s, 1e3), { unit: "" }) : "–")),
        isNumber: true,
      },
      {
        title: "Process peak, MB",
        text: known((arm) => number(vitcmp.scaled(arm.memory_bytes, 1e-6), { digits: 3 })),
        isNumber: true,
      },
      {
        title: "Input-bound, %",
        text: known((arm) => number(vitcmp.scaled(arm.input_bound_share, 100), { digits: 2 })),
        isNumber: true,
      },
      { title: "Seeds x examples", text: known(count), isNumber: true },
    ];
    const caption =
      "Brackets: 95 % over seeds and test examples. Step: median of a training step, without its wait for images.";
    return vitcmp.table(columns, list, { caption });
  }

  function scaled({ value, low, high }, scale) {
    return { value: scale * value, low: scale * low, high: scale * high };
  }

  /** Says the split in words, a line for each comparison. */
  function words(capacity, group) {
    const one = split(group);
    const titles = new Map(capacity.gains.map(({ name, title }) => [name, title]));
    const items = one.gains.map((gain) =>
      element("li", {}, element("strong", {}, `${titles.get(gain.name)}: `), `${gain.words}.`, needed(gain)),
    );
    return [element("ul", { class: "capacity-words" }, ...items), element("p", { class: "answer" }, one.share_words)];
  }

  function needed(gain) {
    if (!gain.needs) return gain.verdict === "not judged" ? " One seed says nothing of another: train more." : "";
    return ` To see an effect of 1 point 4 times in 5: ${gain.needs}.`;
  }

  function gains(capacity, group) {
    const titles = new Map(capacity.gains.map(({ name, title }) => [name, title]));
    const { scale } = metric();
    const columns = [
      { title: "Of the gain", text: (gain) => titles.get(gain.name) },
      { title: `Gain, ${metric().gained}`, text: (gain) => gain.amount, isNumber: true },
      { title: "Verdict", text: (gain) => gain.verdict },
      {
        title: "Would see",
        text: (gain) => number(vitcmp.scaled(gain.detectable, scale), { digits: 2 }),
        isNumber: true,
      },
      { title: "For 1 point", text: (gain) => gain.needs ?? "–" },
      {
        title: "Seeds x examples",
        text: (gain) => `${gain.seeds.length} x ${gain.num_examples.toLocaleString("en")}`,
        isNumber: true,
      },
    ];
    const caption =
      "Would see: the true effect that comes out as one 4 times in 5. For 1 point: what would see 1 point of accuracy so often, " +
      "by the spread of these seeds, of which few know little.";
    return vitcmp.table(columns, split(group).gains, { caption });
  }

  function bars(group) {
    const columns = [
      { title: "Arm", text: (row) => row.arm },
      { title: "Seed", text: (row) => row.seed },
      { title: metric().title, text: (row) => row.text, isNumber: true },
    ];
    const value = (of) => `${number(metric().scale * of, { digits: 3 })}${metric().unit}`;
    const list = group.arms.flatMap((arm) => [
      { arm: arm.arm, seed: "mean", text: say(result(arm)) },
      ...arm.seeds.map((one) => ({
        arm: arm.arm,
        seed: String(one.seed),
        text: value(one[state.get("capacity.metric")]),
      })),
    ]);
    return vitcmp.table(columns, list, { caption: `${metric().title} on the test set, by arm and seed` });
  }

  function curves(group) {
    const columns = [
      { title: "Arm", text: (row) => row.curve.arm },
      { title: "Seed", text: (row) => String(row.curve.seed), isNumber: true },
      { title: "Epoch", text: (row) => number(row.at[0], { digits: 2 }), isNumber: true },
      { title: "Step", text: (row) => String(row.at[1]), isNumber: true },
      { title: "Accuracy, %", text: (row) => number(vitcmp.scaled(row.at[2], 100), { digits: 3 }), isNumber: true },
      { title: "Test loss", text: (row) => number(row.at[3]), isNumber: true },
    ];
    const list = group.curves.flatMap((curve) => curve.evaluations.map((at) => ({ curve, at })));
    return vitcmp.table(columns, list, { caption: "The test set after each epoch", limit: 60 });
  }

  /** Makes the matrix of arms trained and tested; a cell's shade follows its value. */
  function cross(group) {
    const name = state.get("capacity.metric");
    const of = new Map(group.cross.map((cell) => [`${cell.trained}|${cell.tested}`, cell]));
    const [trained, tested] = ["trained", "tested"].map((side) => vitcmp.distinct(group.cross, side));
    if (tested.length < 2) return element("p", { class: "empty" }, "No model was tested as another arm.");
    const most = d3.max(group.cross, (cell) => cell[name].mean);
    const head = element(
      "tr",
      {},
      element("th", { scope: "col" }, "Trained as"),
      ...tested.map((arm) => element("th", { scope: "col", class: "number" }, `tested as ${arm}`)),
    );
    const rows = trained.map((arm) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, arm),
        ...tested.map((other) => crossCell(of.get(`${arm}|${other}`), name, most, arm === other)),
      ),
    );
    const caption = `${metric().title}${metric().unit && ","}${metric().unit} on the test set: mean ± standard deviation over seeds. The weights are carried to the tested arm's sizes.`;
    const table = element(
      "table",
      { class: "capacity-cross" },
      element("caption", {}, caption),
      element("thead", {}, head),
      element("tbody", {}, ...rows),
    );
    return element(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Trained as one arm, tested as another" },
      table,
    );
  }

  function crossCell(cell, name, most, isOwn) {
    if (!cell) return element("td", { class: "number" }, "–");
    const { mean, sd } = cell[name];
    const show = (value, like) => (name === "accuracy" ? (100 * value).toFixed(1) : number(value, { digits: 3, like }));
    const text = sd === null ? show(mean, mean) : `${show(mean, mean)} ± ${show(sd, mean)}`;
    const shade = most > 0 ? Math.round((40 * mean) / most) : 0;
    return element("td", { class: isOwn ? "number capacity-own" : "number", style: `--shade: ${shade}%` }, text);
  }

  /** Lists what did not go well, a row each. */
  function failed(group) {
    if (!group.failed.length) return null;
    const columns = [
      { title: "Arm", text: (run) => run.arm },
      { title: "Seed", text: (run) => String(run.seed), isNumber: true },
      { title: "Status", text: (run) => vitcmp.STATUSES[run.status]?.text ?? run.status },
      { title: "Why", text: (run) => vitcmp.cut(run.message) || "–" },
    ];
    return vitcmp.table(columns, group.failed, { caption: "Runs that did not go well" });
  }

  vitcmp.capacity.tables = { overview, arms, words, gains, bars, curves, cross, failed };
})();
