// The controls that all sections obey, the rows that they choose, and the points that charts draw of those.
"use strict";

(() => {
  const { state, element, rows, best, distinct, models, isOfArticle } = vitcmp;

  // Each control is bound to one value of the address, and several may be bound to the same.

  function bound(name, node, show) {
    node.dataset.state = name;
    state.onChange([name], show);
    show();
    return node;
  }

  /** Makes a labelled `<select>`; `options` are values, or pairs of a value and its text. */
  function select(name, label, options) {
    const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
    const node = element("select", { onchange: () => state.set(name, node.value) });
    node.append(...pairs.map(([value, text]) => element("option", { value }, text)));
    const show = () => {
      node.value = state.get(name);
    };
    return element("label", {}, label, bound(name, node, show));
  }

  /** Makes a labelled checkbox, whose value in the address is 0 or 1. */
  function check(name, label) {
    const node = element("input", { type: "checkbox", onchange: () => state.set(name, node.checked ? "1" : "0") });
    bound(name, node, () => {
      node.checked = state.get(name) === "1";
    });
    return element("label", { class: "check" }, node, label);
  }

  /** Makes a labelled field for a number greater than 0; what is no such number counts as not given. */
  function field(name, label) {
    const node = element("input", { type: "number", min: "0", step: "any", size: "8", placeholder: "any" });
    node.addEventListener("input", () => state.set(name, node.value));
    const show = () => {
      if (node.value !== state.get(name)) node.value = state.get(name);
    };
    return element("label", {}, label, bound(name, node, show));
  }

  const isFlag = ["0", "1"];

  /** Declares what all sections obey: device, mode, batch, backend, numerics, and which models are shown. */
  function share(payload) {
    vitcmp.cached(payload, "shared", () => {
      const all = rows(payload);
      const known = {
        device: distinct(all, "device"),
        mode: distinct(all, "mode"),
        numerics: ["best", ...distinct(all, "numerics")],
      };
      const batches = distinct(all, "batch_size").sort(d3.ascending).map(String);
      const main = commonest(
        all.filter((row) => row.origin !== "article" && row.status === "ok"),
        "device",
      );
      state.define("device", main ?? known.device[0] ?? "", known.device);
      state.define("mode", known.mode.includes("forward") ? "forward" : (known.mode[0] ?? ""), known.mode);
      state.define("batch", batches.includes("1") ? "1" : (batches[0] ?? ""), batches);
      state.define("backend", "best", ["best", "jax", "torch", "both"]);
      state.define("numerics", "best", known.numerics);
      const hasOthers = [...models(payload).values()].some((model) => model.family !== "vitdet");
      state.define("vitdet", hasOthers ? "0" : "1", isFlag);
      state.define("off", "");
      return { ...known, batches };
    });
    return vitcmp.cached(payload, "shared");
  }

  function commonest(list, name) {
    return d3.greatest(
      d3.rollup(
        list,
        (group) => group.length,
        (row) => row[name],
      ),
      ([, count]) => count,
    )?.[0];
  }

  const MAKERS = {
    device: (known) => select("device", "Device", known.device),
    mode: (known) =>
      select(
        "mode",
        "Step",
        known.mode.map((mode) => [mode, mode === "train" ? "train step" : mode]),
      ),
    batch: (known) => select("batch", "Batch size, images", known.batches),
    backend: () =>
      select("backend", "Framework", [
        ["best", "the faster of both"],
        ["jax", "JAX"],
        ["torch", "torch"],
        ["both", "both, apart"],
      ]),
    numerics: (known) => select("numerics", "Numerics", [["best", "best of all"], ...known.numerics.slice(1)]),
  };
  const SHOWN = ["vitdet", "off"];

  /** Makes a row of the shared controls that are named, and of others. */
  function controls(payload, names, ...others) {
    const known = share(payload);
    return element("div", { class: "controls" }, ...names.map((name) => MAKERS[name](known)), ...others);
  }

  /** Makes the switches of the models, which serve as the charts' legend, and the one that adds ViTDet. */
  function switches(payload) {
    share(payload);
    const all = [...models(payload).values()];
    const hasViTDet = all.some((model) => model.family === "vitdet");
    const boxes = all.map((model) => modelSwitch(model));
    return element(
      "fieldset",
      { class: "models" },
      element("legend", {}, "Models"),
      hasViTDet ? check("vitdet", "add ViTDet") : null,
      ...boxes,
    );
  }

  function modelSwitch(model) {
    const node = element("input", { type: "checkbox", onchange: () => turn(model.name, node.checked) });
    node.dataset.model = model.name;
    const label = element("label", { class: "check", title: model.name }, node, swatch(model), model.label);
    const show = () => {
      node.checked = !hidden().has(word(model.name));
      label.hidden = model.family === "vitdet" && state.get("vitdet") === "0";
    };
    state.onChange(SHOWN, show);
    show();
    return label;
  }

  function hidden() {
    return new Set(state.get("off").split(" ").filter(Boolean));
  }

  /** Returns a model's name as one word, which is what stands between the blanks of `off`. */
  function word(name) {
    return name.replace(/[\s%]/g, encodeURIComponent);
  }

  function turn(name, isShown) {
    const names = hidden();
    if (isShown) names.delete(word(name));
    else names.add(word(name));
    state.set("off", [...names].sort().join(" "));
  }

  /** Says whether a model is switched on. */
  function isShown(payload, name) {
    const isLeftOut = models(payload).get(name)?.family === "vitdet" && state.get("vitdet") === "0";
    return !isLeftOut && !hidden().has(word(name));
  }

  /** Draws a model's symbol in its colour, as in the charts. */
  function swatch(model) {
    const kind = d3[`symbol${model.symbol[0].toUpperCase()}${model.symbol.slice(1)}`];
    const svg = d3.create("svg").attr("class", "swatch").attr("viewBox", "-8 -8 16 16").attr("aria-hidden", "true");
    svg.append("path").attr("d", d3.symbol(kind, 70)()).attr("fill", model.colour);
    return svg.node();
  }

  /** Returns the rows that the shared controls choose; `names` are the controls that count. */
  function chosen(payload, names = ["device", "mode", "batch", "backend", "numerics"]) {
    share(payload);
    const tests = names
      .filter((name) => !["best", "both"].includes(state.get(name)))
      .map((name) => [COLUMN[name] ?? name, state.get(name)]);
    const on = new Set([...models(payload).keys()].filter((name) => isShown(payload, name)));
    return rows(payload).filter(
      (row) => tests.every(([name, value]) => String(row[name]) === value) && on.has(row.model),
    );
  }

  const COLUMN = { batch: "batch_size" };

  // Points: what a chart draws.

  /** Returns one point for each line (model, origin, framework where they are apart) and size, with its best row. */
  function points(payload, names) {
    const groups = best(chosen(payload, names), (row) => `${line(row)}|${row.image_size}`);
    return [...groups.values()].map(({ row, rows: tried, failed }) => {
      const one = row ?? tried[0];
      return {
        key: line(one),
        x: one.px,
        image_size: one.image_size,
        model: one.model,
        row,
        failed,
        ...style(payload, one),
      };
    });
  }

  function line(row) {
    return [row.model, isApart() ? row.backend : "", isOfArticle(row) ? "article" : ""].join("|");
  }

  function isApart() {
    return state.get("backend") === "both";
  }

  /** Returns how a row's line looks: dashed is the article's, dotted is torch's where JAX's stands beside it. */
  function style(payload, row) {
    const { colour, symbol, label } = models(payload).get(row.model);
    const isTorch = isApart() && row.backend === "torch";
    const suffix = `${isApart() ? ` ${row.backend}` : ""}${isOfArticle(row) ? " (article)" : ""}`;
    const dash = isOfArticle(row) ? "7 4" : isTorch ? "1.5 3" : null;
    return { colour, symbol, label: label + suffix, dash, isHollow: isTorch || isOfArticle(row) };
  }

  /** Returns what did not run among the points, as `vitcmp.strip` takes it. */
  function failed(list) {
    return list
      .filter((point) => point.failed.length)
      .map((point) => {
        const message = point.failed.find((row) => row.message)?.message;
        const text = [
          point.label,
          `${vitcmp.px(point.x)} px`,
          vitcmp.failures(point.failed),
          message && vitcmp.cut(message),
          point.row && "another setting did run",
        ];
        return {
          ...point,
          status: vitcmp.worst(point.failed),
          isPartly: Boolean(point.row),
          text: text.filter(Boolean).join("\n"),
        };
      });
  }

  /** Says what was measured on the device that is chosen, for a reader whose choices leave nothing. */
  function nothing(payload) {
    const there = rows(payload).filter((row) => row.device === state.get("device") && row.status === "ok");
    const has = ["mode", "batch_size", "backend", "numerics"].map(
      (name) => `${name.replace("_", " ")} ${distinct(there, name).sort(d3.ascending).join(", ")}`,
    );
    return element(
      "p",
      { class: "empty" },
      there.length
        ? `Nothing was measured with these choices of the models shown. On this device there is: ${has.join("; ")}.`
        : "Nothing was measured on this device.",
    );
  }

  Object.assign(vitcmp, {
    isFlag,
    select,
    check,
    field,
    share,
    controls,
    switches,
    isShown,
    swatch,
    chosen,
    points,
    failed,
    isApart,
    nothing,
  });
})();
