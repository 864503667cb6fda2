// ViTDet, drawn: a row of its blocks, the grid of the one that is chosen, and what windows save and padding costs.
"use strict";

(() => {
  const { element, state, number } = vitcmp;
  const { SIZES, MOST, product, readSpec, writeGlobal, padGrid, countModel, fittingWindows } = vitcmp.vitdetModel;
  // Box AP on COCO, and what it costs, of ViT-L: arXiv:2203.16527, tables 2 and 3.
  const PAPER = [
    ["Global blocks", "Box AP", "Training memory", "Test time"],
    ["none", "52.9", "1x", "1x"],
    ["4, evenly spaced", "54.6", "1.39x", "1.16x"],
    ["all 24", "55.1", "3.34x", "1.86x"],
  ];
  const CONTROLS = {
    image: ["1024"], patch: ["16"], window: ["14"], global: ["4"], model: ["B", [...Object.keys(SIZES), "free"]],
    width: ["768"], depth: ["12"], heads: ["12"], relpos: ["1", vitcmp.isFlag], bits: ["16", ["16", "32"]], block: ["0"],
  };
  const KEYS = Object.keys(CONTROLS).map((name) => `vitdet.${name}`);
  const get = (name) => state.get(`vitdet.${name}`);
  const set = (name, value) => state.set(`vitdet.${name}`, value);

  vitcmp.section("vitdet", (root) => {
    for (const [name, [initial, allowed = null]] of Object.entries(CONTROLS)) state.define(`vitdet.${name}`, initial, allowed);
    const view = makeView();
    root.append(...introduce(), makeControls(view), view.fault, view.body);
    state.onChange(KEYS, () => render(view));
    render(view);
  });

  function introduce() {
    return [
      element("p", {}, "ViTDet (arXiv:2203.16527) is a plain ViT made fit for large images. In most of its blocks a token attends only to the " +
        "tokens of its window, so that attention grows with the image's area and no longer with its square; in a few blocks, evenly spaced, it " +
        "attends to all. The paper on what those few buy, of ViT-L on COCO:"),
      element("div", { class: "scroll" }, makeTable(PAPER[0], PAPER.slice(1))),
      element("p", { class: "note" }, "Tables 2 and 3 there. Of ViT-B, all blocks global (50.4 AP) are worse than four (51.2)."),
    ];
  }

  function makeView() {
    const view = { ...vitcmp.vitdetGrid.makeFigure(), spec: null };
    view.fault = element("p", { class: "vitdet-fault", role: "alert" });
    view.blocks = element("div", { class: "vitdet-blocks", role: "radiogroup", "aria-label": "Block to look at" });
    view.toggle = element("input", { type: "checkbox", onchange: () => toggleBlock(view) });
    view.toggleText = element("span");
    view.summary = element("p", { class: "vitdet-summary" });
    view.numbers = element("div", { class: "vitdet-numbers" });
    view.body = element("div", { class: "vitdet-body" }, view.blocks,
      element("p", { class: "note" }, "Each bar is a block's FLOPs: below those of its projections and MLP, above those of its attention. G: global."),
      element("label", { class: "vitdet-toggle" }, view.toggle, view.toggleText), view.summary,
      element("div", { class: "vitdet-two" }, view.figure, view.numbers), explain());
    return view;
  }

  function explain() {
    return element("p", { class: "note" }, "One image, forward, without a head; 2 FLOPs per multiply-add, matmuls only, padding as executed: " +
      "vitcmp's own count, to the FLOP. A padded key is the bias of qkv: it is attended to, and what a padded query computes is thrown away. " +
      "FLOPs on padding are those that windows which end where the grid ends would not need. " +
      "The plain ViT has every block global and no relative positions. Logits written out are heads x windows x n x n values, of one block at a time; " +
      "flash attention keeps none of them, only a float32 log-sum-exp for each query and head, for the backward pass.");
  }

  // ---- controls

  function makeControls(view) {
    const whole = (name, label) => field(name, label, { type: "number", min: 1, max: MOST[name], step: 1 });
    const models = Object.entries(SIZES).map(([name, [width, depth]]) => [name, `${name}: ${width} wide, ${depth} deep`]);
    const model = vitcmp.select("vitdet.model", "Model", [...models, ["free", "free"]]);
    model.addEventListener("change", () => set("global", "4")); // at another depth, indices are other blocks
    view.free = element("div", { class: "vitdet-free" }, whole("width", "Width"), whole("depth", "Depth"), whole("heads", "Heads"));
    return element("div", { class: "controls" },
      field("image", "Image, px (height x width)", { size: 11 }), whole("patch", "Patch, px"), whole("window", "Window, tokens"), model, view.free,
      field("global", "Global blocks (count, or 2+5+8+11)", { size: 16 }), makePresets(),
      vitcmp.check("vitdet.relpos", "relative positions"),
      vitcmp.select("vitdet.bits", "Logits and biases", [["16", "16-bit"], ["32", "32-bit"]]));
  }

  function field(name, label, attributes) {
    const node = element("input", { autocomplete: "off", spellcheck: "false", ...attributes, oninput: () => set(name, node.value) });
    const show = () => { if (node.value !== get(name)) node.value = get(name); };
    state.onChange([`vitdet.${name}`], show);
    show();
    return element("label", {}, label, node);
  }

  function makePresets() {
    const press = (text, count) => element("button", { type: "button", onclick: () => set("global", count()) }, text);
    const depth = () => SIZES[get("model")]?.[1] ?? get("depth");
    return element("div", { class: "vitdet-presets", role: "group", "aria-label": "Global blocks" },
      press("none", () => "0"), press("four", () => "4"), press("all", depth));
  }

  function toggleBlock({ spec, block }) {
    const others = spec.global.filter((other) => other !== block);
    const blocks = others.length < spec.global.length ? others : [...others, block];
    set("global", writeGlobal(blocks.sort((a, b) => a - b)));
  }

  // ---- what the state says, on the page

  function render(view) {
    view.free.hidden = get("model") !== "free";
    view.spec = readSpec(get);
    view.fault.textContent = view.spec.faults.join(" ");
    view.body.hidden = view.spec.faults.length > 0;
    if (view.body.hidden) return;
    view.counts = countModel(view.spec);
    view.block = Math.min(/^\d{1,2}$/.test(get("block")) ? Number(get("block")) : 0, view.spec.depth - 1);
    view.isGlobal = view.spec.global.includes(view.block);
    view.count = view.isGlobal ? view.counts.global : view.counts.windowed;
    drawBlocks(view);
    view.summary.textContent = [describeGrid(view.spec), describeWindows(view)].join(" ");
    view.show({ grid: view.spec.grid, window: view.count.window, block: view.block, isGlobal: view.isGlobal });
    view.numbers.replaceChildren(...tabulateBlock(view), ...tabulateModel(view));
  }

  function drawBlocks(view) {
    const { spec, counts, blocks } = view;
    if (blocks.children.length !== spec.depth) blocks.replaceChildren(...Array.from({ length: spec.depth }, (_, i) => makeBlock(i)));
    const most = Math.max(counts.windowed.total, counts.global.total);
    [...blocks.children].forEach((node, i) => {
      const isGlobal = spec.global.includes(i);
      drawBlock(node, { i, isGlobal, count: isGlobal ? counts.global : counts.windowed, most, isChosen: i === view.block });
    });
    view.toggle.checked = view.isGlobal;
    view.toggleText.textContent = `block ${view.block} is global`;
  }

  function makeBlock(i) {
    const input = element("input", { type: "radio", name: "vitdet-block", value: i, onchange: () => set("block", i) });
    const parts = ["attention", "linear"].map((name) => element("span", { class: `vitdet-${name}` }));
    const bar = element("span", { class: "vitdet-bar", "aria-hidden": "true" }, ...parts);
    return element("label", { class: "vitdet-block" }, input, bar, element("span", { "aria-hidden": "true" }));
  }

  function drawBlock(node, { i, isGlobal, count, most, isChosen }) {
    const [input, bar, text] = node.children;
    const [attention, linear] = bar.children;
    node.classList.toggle("vitdet-global", isGlobal);
    node.title = `Block ${i}, ${isGlobal ? "global" : "windowed"}: ${gflop(count.total)}`;
    input.setAttribute("aria-label", node.title);
    input.checked = isChosen;
    attention.style.height = `${(100 * (count.total - count.linear)) / most}%`;
    linear.style.height = `${(100 * count.linear) / most}%`;
    text.textContent = isGlobal ? `${i} G` : i;
  }

  function describeGrid({ image, patch, grid }) {
    const dropped = image.map((side, axis) => side - grid[axis] * patch);
    const left = [[dropped[0], "at the bottom"], [dropped[1], "at the right"]].filter(([pixels]) => pixels).map(([pixels, where]) => `${pixels} px ${where}`);
    return `${grid.join(" x ")} tokens.` + (left.length ? ` Dropped, because they fill no patch: ${left.join(", ")}.` : "");
  }

  function describeWindows({ spec, counts: { windowed, numWindowed } }) {
    if (!numWindowed) return "No block has windows: this is a plain ViT.";
    const padding = windowed.padded - product(spec.grid);
    const windows = `${vitcmp.plural(windowed.numWindows, "window")} of ${spec.window} x ${spec.window}`;
    const start = `${vitcmp.plural(numWindowed, "block")} of ${spec.depth} ${numWindowed === 1 ? "has" : "have"} ${windows}`;
    if (!padding) return `${start}, without padding.`;
    const fits = fittingWindows(spec);
    return `${start}, padded to ${padGrid(spec.grid, windowed.window).join(" x ")}: ${percent(padding, windowed.padded)} of those tokens are padding. ` +
      (fits.length ? `Windows of ${vitcmp.list(fits.map(String))} would need none.` : "No window from half to twice this one would do without.");
  }

  // ---- tables

  function tabulateBlock({ spec, counts: { plain }, count, block, isGlobal }) {
    const flops = (label, name) => [label, flopsCell(count[name]), flopsCell(plain[name])];
    const bytes = (label, name) => [label, bytesCell(count[name]), bytesCell(plain[name])];
    const windows = ({ numWindows, inWindow }) => `${numWindows.toLocaleString("en")} x ${inWindow.toLocaleString("en")}`;
    return [
      element("h3", {}, `Block ${block}, ${isGlobal ? "global" : "windowed"}`),
      element("div", { class: "scroll vitdet-of-block" }, makeTable(["", "this block", "plain ViT's"], [
        ["windows x tokens n", windows(count), windows(plain)],
        flops("attention: scores and values", "attention"),
        flops("relative positions", "bias"),
        flops("projections and MLP", "linear"),
        flops("the block", "total"),
        bytes("logits, n x n, written out", "logitsBytes"),
        bytes("flash attention: log-sum-exps", "flashBytes"),
        ...(spec.relPos ? [bytes("relative positions' biases", "biasBytes")] : []),
      ])),
    ];
  }

  function tabulateModel({ spec, counts }) {
    const { total, plainTotal, onPadding, projectedPadding } = counts;
    return [
      element("h3", {}, `All ${spec.depth} blocks`),
      element("div", { class: "scroll vitdet-of-model" }, makeTable(["", "this ViTDet", "plain ViT"], [
        ["the model", flopsCell(total), flopsCell(plainTotal)],
        ["of which attention and positions", flopsCell(counts.attention, total), flopsCell(counts.plainAttention, plainTotal)],
        ["of which on padding", flopsCell(onPadding, total), flopsCell(0)],
        ["more, where padding is projected too, as in the released code", flopsCell(projectedPadding, total), flopsCell(0)],
        ["logits of the largest block, written out", bytesCell(counts.logitsBytes), bytesCell(counts.plain.logitsBytes)],
      ])),
    ];
  }

  function makeTable(head, rows) {
    const attributes = (tag, i) => ({ class: i ? "number" : null, scope: tag === "th" ? "col" : null });
    const cell = (tag, i, content) => (content instanceof Node ? content : element(tag, attributes(tag, i), content));
    const row = (tag, cells) => element("tr", {}, ...cells.map((content, i) => cell(tag, i, content)));
    return element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, ...rows.map((cells) => row("td", cells))));
  }

  function flopsCell(flops, whole = null) {
    const share = whole ? ` (${percent(flops, whole)})` : "";
    return element("td", { class: "number", "data-flops": flops }, flops ? gflop(flops) + share : "none");
  }

  function bytesCell(bytes) {
    const text = bytes >= 1e9 ? `${number(bytes / 1e9)} GB` : bytes >= 1e6 ? `${number(bytes / 1e6)} MB` : `${number(bytes / 1e3)} kB`;
    return element("td", { class: "number", "data-bytes": bytes }, bytes ? text : "none");
  }

  const gflop = (flops) => `${number(flops / 1e9, { digits: 5 })} GFLOP`;
  const percent = (part, whole) => `${number((100 * part) / whole, { digits: 3 })}\u00a0%`;
})();
