// The capacity experiment: its arms, which group is chosen, and how its numbers are said.
"use strict";

(() => {
  const { state, number } = vitcmp;
  const LOOKS = {
    low: { colour: "var(--blue)", symbol: "circle" },
    down_up: { colour: "var(--orange)", symbol: "square" },
    high: { colour: "var(--vermilion)", symbol: "triangle" },
    patch: { colour: "var(--green)", symbol: "diamond" },
  };
  const METRICS = {
    accuracy: { title: "Accuracy", axis: "test accuracy, %", scale: 100, unit: " %", gained: "points" },
    loss: { title: "Loss", axis: "test loss", scale: 1, unit: "", gained: "of loss" },
  };
  const NAMES = { jax: "JAX", torch: "torch" };
  const KEYS = ["dataset", "model", "backend", "setting", "metric", "log", "both", "table", "kind"].map(
    (name) => `capacity.${name}`,
  );
  const isOn = (name) => state.get(`capacity.${name}`) === "1";

  /** Declares the controls' values, and returns the settings: a group with most runs is shown until another is asked for. */
  function define({ groups }) {
    const first = d3.greatest(groups, (group) => d3.sum(group.arms, (arm) => arm.seeds.length));
    for (const name of ["dataset", "model", "backend"]) {
      state.define(`capacity.${name}`, first[name], vitcmp.distinct(groups, name));
    }
    const counts = d3.rollup(
      groups,
      (list) => list.length,
      (group) => JSON.stringify([group.dataset, group.model, group.backend]),
    );
    const settings = d3.range(1, d3.max(counts.values()) + 1).map(String);
    state.define("capacity.setting", "1", settings);
    state.define("capacity.metric", "accuracy", Object.keys(METRICS));
    for (const name of ["log", "table"]) state.define(`capacity.${name}`, "0", vitcmp.isFlag);
    state.define("capacity.both", "1", vitcmp.isFlag);
    state.define("capacity.kind", "only high", ["only high", "patch and high", "all", "none"]);
    return settings;
  }

  /** Returns the groups that agree with the controls that are named. */
  function matching(capacity, names) {
    return capacity.groups.filter((group) => names.every((name) => group[name] === state.get(`capacity.${name}`)));
  }

  /** Returns the groups of the chosen data set, model and framework: several where other things differ as well. */
  function alike(capacity) {
    return matching(capacity, ["dataset", "model", "backend"]);
  }

  function chosen(capacity) {
    const list = alike(capacity);
    return list[Math.min(Number(state.get("capacity.setting")), list.length) - 1] ?? null;
  }

  function metric() {
    return METRICS[state.get("capacity.metric")];
  }

  /** Returns {value, low, high} of an arm in the metric's unit. */
  function result(arm) {
    const { scale } = metric();
    const of = arm[state.get("capacity.metric")];
    return { value: scale * of.value, low: scale * of.low, high: scale * of.high };
  }

  function split(group) {
    return group.splits[state.get("capacity.metric")] ?? null;
  }

  /** Says a value with its interval: `61.3 % [58.2, 64.1]`. */
  function say({ value, low, high }, { unit = metric().unit, digits = 3 } = {}) {
    return `${number(value, { digits })}${unit} ${vitcmp.interval(low, high, value, digits)}`;
  }

  /** Returns how models are called here: without their overrides where that tells them apart. */
  function modelLabel(capacity, name) {
    const bases = vitcmp.distinct(capacity.groups, "model").map((model) => model.split(":")[0]);
    const [base, ...overrides] = name.split(":");
    const isPlain = !overrides.length || ["timm", "big_vision"].includes(base);
    return isPlain || bases.filter((other) => other === base).length > 1 ? name : `${base}:…`;
  }

  /** Says which group it is, in few words: `glyphs/fine, vit_ti16:…, JAX`. */
  function title(capacity, group) {
    const parts = [group.dataset, modelLabel(capacity, group.model), NAMES[group.backend] ?? group.backend];
    return [...parts, `${group.low} and ${group.high} px`, ...group.differs].join(", ");
  }

  vitcmp.capacity = {
    LOOKS,
    METRICS,
    NAMES,
    KEYS,
    isOn,
    define,
    matching,
    alike,
    chosen,
    metric,
    result,
    split,
    say,
    modelLabel,
    title,
  };
})();
