// The grid of tokens: windows, padding, and whom one token attends to. All of it is rectangles, so 256 x 256 are as fast.
"use strict";

vitcmp.vitdetGrid = (() => {
  const { element } = vitcmp;
  const { product, padGrid } = vitcmp.vitdetModel;
  const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  function svg(tag, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  /** Makes the figure; its `show({grid, window, block, isGlobal})` draws a block. */
  function makeFigure() {
    const help = "Arrow keys move the token that attends; Home and End go to the ends of its row.";
    const view = { token: [0, 0], hovered: null };
    view.svg = svg("svg", { class: "vitdet-grid", tabindex: 0, role: "application", "aria-label": `Grid of tokens. ${help}` });
    view.says = element("p", { class: "vitdet-says", id: "vitdet-says", "aria-live": "polite" });
    view.svg.setAttribute("aria-describedby", view.says.id);
    view.svg.addEventListener("pointermove", (event) => hover(view, tokenAt(view, event)));
    view.svg.addEventListener("pointerleave", () => hover(view, null));
    view.svg.addEventListener("click", (event) => moveTo(view, tokenAt(view, event)));
    view.svg.addEventListener("keydown", (event) => press(view, event));
    const note = element("p", { class: "note" }, `Point at a token, or press one to keep it. ${help}`);
    const figure = element("figure", { class: "vitdet-figure" }, view.svg, makeKey(), view.says, note);
    return { figure, show: (block) => show(view, block) };
  }

  function makeKey() {
    const item = (kind, text) => element("li", {}, element("span", { class: `vitdet-key vitdet-key-${kind}`, "aria-hidden": "true" }), text);
    return element("ul", { class: "vitdet-keys" }, item("query", "the token that attends"), item("lit", "tokens it attends to"), item("padding", "padding"));
  }

  function show(view, block) {
    const padded = padGrid(block.grid, block.window);
    Object.assign(view, { ...block, padded, hovered: null });
    view.token = view.token.map((at, axis) => Math.min(at, padded[axis] - 1));
    const [rows, columns] = padded;
    view.svg.setAttribute("viewBox", `-0.25 -0.25 ${columns + 0.5} ${rows + 0.5}`);
    view.svg.style.maxWidth = `${(32 * Math.min(1, columns / rows)).toFixed(2)}rem`;
    view.lit = svg("g");
    view.svg.replaceChildren(patterns(), ...tokens(view), view.lit, ...lines(view));
    light(view);
  }

  function patterns() {
    const cell = svg("path", { d: "M0 1V0H1", class: "vitdet-cell" });
    const stripe = svg("path", { d: "M0 1L1 0", class: "vitdet-stripe" });
    const pattern = (id, mark) => svg("pattern", { id, width: 1, height: 1, patternUnits: "userSpaceOnUse" }, mark);
    return svg("defs", {}, pattern("vitdet-cells", cell), pattern("vitdet-stripes", stripe));
  }

  function rectangle(name, [y, x], [height, width]) {
    return svg("rect", { class: `vitdet-${name}`, x, y, width, height });
  }

  function tokens({ grid: [rows, columns], padded: [height, width] }) {
    return [
      rectangle("tokens", [0, 0], [rows, columns]),
      rectangle("padding", [0, columns], [rows, width - columns]),
      rectangle("padding", [rows, 0], [height - rows, width]),
    ];
  }

  function lines({ grid, padded: [rows, columns], window: [height, width] }) {
    const across = Array.from({ length: rows / height + 1 }, (_, i) => `M0 ${i * height}H${columns}`);
    const down = Array.from({ length: columns / width + 1 }, (_, i) => `M${i * width} 0V${rows}`);
    const cells = rectangle("cells", [0, 0], [rows, columns]);
    return [cells, svg("path", { class: "vitdet-windows", d: [...across, ...down].join("") }), rectangle("edge", [0, 0], grid)];
  }

  /** Lights what the token attends to: all tokens of its window, padding too. */
  function light(view) {
    const token = view.hovered ?? view.token;
    const corner = token.map((at, axis) => Math.floor(at / view.window[axis]) * view.window[axis]);
    const real = corner.map((at, axis) => Math.max(0, Math.min(view.window[axis], view.grid[axis] - at)));
    view.lit.replaceChildren(rectangle("lit", corner, view.window), mark(view, token));
    const attended = product(view.window);
    Object.assign(view.svg.dataset, { token: token.join(","), attended, padding: attended - product(real) });
    view.says.textContent = say(view, token, corner, attended - product(real));
  }

  /** Draws the token that attends, larger than a token where those are only some pixels wide. */
  function mark({ padded }, [row, column]) {
    return svg("circle", { class: "vitdet-query", cx: column + 0.5, cy: row + 0.5, r: Math.max(0.4, 0.012 * Math.max(...padded)) });
  }

  function say(view, token, corner, padding) {
    const isPadding = token.some((at, axis) => at >= view.grid[axis]);
    const name = `${isPadding ? "Padding" : "Token"} at row ${token[0]}, column ${token[1]}`;
    const count = product(view.window).toLocaleString("en");
    if (view.isGlobal) return `Block ${view.block} is global. ${name}: attends to all ${count} tokens.`;
    const perRow = view.padded[1] / view.window[1];
    const index = (corner[0] / view.window[0]) * perRow + corner[1] / view.window[1] + 1;
    const windows = ((view.padded[0] / view.window[0]) * perRow).toLocaleString("en");
    return `Block ${view.block} has windows. ${name}: attends to the ${count} tokens of window ${index.toLocaleString("en")} of ${windows}, ` +
      `${padding ? padding.toLocaleString("en") : "none"} of them padding${isPadding ? "; what it computes is thrown away" : ""}.`;
  }

  function tokenAt({ svg: node, padded: [rows, columns] }, event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(node.getScreenCTM().inverse());
    const clamp = (value, most) => Math.max(0, Math.min(most - 1, Math.floor(value)));
    return [clamp(point.y, rows), clamp(point.x, columns)];
  }

  function hover(view, token) {
    if (String(view.hovered) === String(token)) return;
    view.hovered = token;
    light(view);
  }

  function moveTo(view, token) {
    Object.assign(view, { token, hovered: null });
    light(view);
  }

  function press(view, event) {
    const [row, column] = view.token, last = view.padded.map((side) => side - 1);
    const ends = { Home: [row, 0], End: [row, last[1]] };
    const move = MOVES[event.key];
    const target = ends[event.key] ?? (move && [row + move[0], column + move[1]]);
    if (!target || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    moveTo(view, target.map((at, axis) => Math.max(0, Math.min(last[axis], at))));
  }

  return { makeFigure };
})();
