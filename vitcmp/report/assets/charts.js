// What a chart of any section is made of: drawing when seen, axes, lines with intervals, failures, tips, keys.
"use strict";

(() => {
  const { state, element } = vitcmp;
  const MARGIN = { left: 62, right: 14 };
  const views = [];

  // Drawing. What is far from the screen waits until it comes near, or until the page is printed.

  /** Keeps a place in which `draw(width)` gives the nodes; draws anew when a value of `names` or the width changes. */
  function view(root, names, draw) {
    const body = element("div", { class: "view" });
    root.append(body);
    const place = { body, draw, isStale: true, isNear: false, width: 0 };
    views.push(place);
    state.onChange(names, () => stale(place));
    new IntersectionObserver((entries) => near(place, entries.at(-1).isIntersecting), { rootMargin: "400px" }).observe(
      body,
    );
    new ResizeObserver(() => requestAnimationFrame(() => resized(place))).observe(body);
    return body;
  }

  function near(place, isNear) {
    place.isNear = isNear;
    if (isNear && place.isStale) redraw(place);
  }

  function stale(place) {
    place.isStale = true;
    if (place.isNear) redraw(place);
  }

  function resized(place) {
    if (place.width && place.body.clientWidth && place.body.clientWidth !== place.width) stale(place);
  }

  function redraw(place) {
    place.isStale = false;
    place.width = place.body.clientWidth;
    place.body.replaceChildren(...[place.draw(place.width || 600)].flat().filter(Boolean));
  }

  /** Draws all that waits inside an element: before printing, and for tests. */
  function drawAll(root = document) {
    for (const place of views) if (place.isStale && root.contains(place.body)) redraw(place);
  }

  /** Draws what waits above a section, which would else push it away from a reader who was led to it. */
  function drawAbove(part) {
    const isAbove = ({ body }) => part.compareDocumentPosition(body) & Node.DOCUMENT_POSITION_PRECEDING;
    for (const place of views) if (place.isStale && isAbove(place)) redraw(place);
  }

  addEventListener("beforeprint", () => drawAll());

  // Axes.

  /** Returns the axis of image sizes: ticks at the sizes that were measured, as many as fit. */
  function sizeAxis(sizes, width, type) {
    const [low, high] = d3.extent(sizes);
    const isSquare = sizes.every(Number.isInteger);
    const domain = type === "log" ? [low / 1.07, high * 1.07] : [Math.max(0, low - 0.04 * high), high * 1.04];
    const scale = (type === "log" ? d3.scaleLog() : d3.scaleLinear())
      .domain(domain)
      .range([0, width - MARGIN.left - MARGIN.right]);
    return {
      type,
      domain,
      ticks: apart(sizes, scale, 30),
      tickFormat: vitcmp.px,
      label: isSquare ? "image side, px" : "image side, px (of a square of equal area)",
    };
  }

  /** Keeps ticks that stand `gap` pixels apart: the ends first, then the sizes that all quote, then the others. */
  function apart(sizes, scale, gap) {
    const all = d3.sort(new Set(sizes));
    const quoted = [224, 512, 384].filter((size) => all.includes(size));
    const kept = [];
    for (const size of [all.at(-1), all[0], ...quoted, ...all]) {
      if (kept.every((other) => Math.abs(scale(other) - scale(size)) >= gap)) kept.push(size);
    }
    return d3.sort(kept);
  }

  /** Returns an axis of values: from 0 where it is linear, with ticks at 1, 2, 5 where it is logarithmic. */
  function valueAxis(values, type, label) {
    const found = values.filter((value) => Number.isFinite(value) && (type !== "log" || value > 0));
    const [low, high] = found.length ? d3.extent(found) : [1, 10];
    const plain = (value) => vitcmp.number(value, { digits: Math.max(1, significant(value)) });
    if (type !== "log") return { type, domain: [0, high * 1.05 || 1], label, tickFormat: plain, ticks: 6, grid: true };
    const domain = [low / 1.2, high * 1.2];
    return { type, domain, label, ticks: logTicks(domain), tickFormat: plain, grid: true };
  }

  function significant(value) {
    return Number(value.toPrecision(3)).toExponential().split("e")[0].replace(/[-.]/g, "").length;
  }

  function logTicks([low, high]) {
    const decades = Math.log10(high / low);
    if (decades < 0.7) return d3.ticks(low, high, 6);
    const factors = decades > 4 ? [1] : decades > 2.2 ? [1, 3] : [1, 2, 5];
    const powers = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1);
    return powers
      .flatMap((power) => factors.map((f) => Number(`${f}e${power}`)))
      .filter((tick) => tick >= low && tick <= high);
  }

  // Marks. A point has x, y, low, high, key (its line), colour, symbol, dash, isHollow, and text for the tip.

  /** Draws all lines of one dash as one mark: with a mark for each line, fifty models take a second. */
  function lines(points) {
    const dashes = d3.groups(
      d3.sort(points, (point) => point.x),
      (point) => point.dash ?? null,
    );
    const look = { x: "x", y: "y", z: "key", stroke: "colour", strokeWidth: 1.6 };
    return dashes.map(([dash, group]) => Plot.line(group, { ...look, strokeDasharray: dash }));
  }

  function intervals(points) {
    const known = points.filter((point) => point.low > 0 && point.high > 0);
    return Plot.ruleX(known, {
      x: "x",
      y1: "low",
      y2: "high",
      stroke: "colour",
      strokeWidth: 2.5,
      strokeOpacity: 0.55,
    });
  }

  function dots(points, r = 3.6) {
    const fill = (point) => (point.isHollow ? "var(--paper)" : point.colour);
    return Plot.dot(points, { x: "x", y: "y", fill, stroke: "colour", strokeWidth: 1.4, symbol: "symbol", r });
  }

  function tip(points) {
    const options = {
      x: "x",
      y: "y",
      title: "text",
      fill: "var(--paper)",
      stroke: "var(--soft)",
      fontSize: 12,
      lineWidth: 26,
      lineHeight: 1.25,
    };
    return Plot.tip(points, Plot.pointer({ ...options, maxRadius: 30 }));
  }

  /** Draws the lines of points with their intervals, symbols and tips. */
  function series(points) {
    return [...lines(points), intervals(points), dots(points), tip(points)];
  }

  /** Sets the points of one size a few pixels apart, so that their intervals can be told; `x` is logarithmic. */
  function dodge(points, { domain: [low, high] }, width) {
    const keys = vitcmp.distinct(points, "key");
    const pixel = (high / low) ** (1 / (width - MARGIN.left - MARGIN.right));
    const step = Math.min(6, 30 / keys.length);
    const shift = (point) => step * (keys.indexOf(point.key) - (keys.length - 1) / 2);
    return points.map((point) => ({ ...point, x: point.x * pixel ** shift(point) }));
  }

  /** Draws ratios: the line of 1, and the band of 3 % to either side that counts as the same. */
  function ratios(points, { domain: [x1, x2] }) {
    const band = Plot.rect([0], { x1, x2, y1: 1 / 1.03, y2: 1.03, fill: "var(--soft)", fillOpacity: 0.2 });
    return [band, Plot.ruleY([1], { stroke: "var(--soft)" }), ...series(points)];
  }

  /** Makes the drawing: what all of the page's charts have in common. */
  function plot({ marks, ...options }) {
    const common = { marginLeft: MARGIN.left, marginRight: MARGIN.right, marginBottom: 38, marginTop: 22 };
    const style = { background: "none", color: "var(--ink)", fontSize: "11px", fontFamily: "inherit" };
    return Plot.plot({ ...common, ...options, style, marks: [...axes(options), ...marks] });
  }

  /** Labels every tick: left to itself, a logarithmic axis of Plot drops those that D3 thinks too many. */
  function axes({ x, y }) {
    const isGiven = (scale) => scale.axis !== null && Array.isArray(scale.ticks);
    const made = [
      isGiven(x) && Plot.axisX(x.ticks, { text: x.tickFormat }),
      isGiven(y) && Plot.axisY(y.ticks, { text: y.tickFormat }),
    ];
    return made.filter(Boolean);
  }

  /** Draws what did not run: one row for each line of `failures` ({key, label, colour, x, status, isPartly, text}). */
  function strip(failures, { width, x }) {
    if (!failures.length) return null;
    const keys = vitcmp.distinct(failures, "key");
    const row = Math.max(7, Math.min(15, 240 / keys.length)); // of many, the tips tell the names
    const names = row < 10 ? [] : keys.map((key) => failures.find((failure) => failure.key === key));
    const marks = [
      Plot.ruleY(keys, { stroke: "var(--line)" }),
      Plot.text(names, {
        y: "key",
        text: "label",
        frameAnchor: "left",
        textAnchor: "end",
        dx: -5,
        fontSize: 8.5,
        fill: "var(--soft)",
        textOverflow: "ellipsis-middle", // at the end stands the framework
        lineWidth: 5.8, // some fonts are a sixth wider than Plot takes them for
      }),
      Plot.dot(failures, {
        x: "x",
        y: "key",
        r: Math.min(4, row / 2.2),
        stroke: (f) => (f.status === "unsupported" ? "var(--soft)" : "var(--warn)"),
        symbol: (f) => vitcmp.STATUSES[f.status].symbol,
        strokeWidth: (f) => (f.isPartly ? 0.9 : 2),
        strokeOpacity: (f) => (f.isPartly ? 0.55 : 1),
      }),
      Plot.tip(
        failures,
        Plot.pointer({
          x: "x",
          y: "key",
          title: "text",
          fill: "var(--paper)",
          stroke: "var(--soft)",
          fontSize: 12,
          lineWidth: 26,
          lineHeight: 1.25,
        }),
      ),
    ];
    const y = { type: "band", domain: keys, axis: null };
    return plot({
      width,
      height: keys.length * row + 6,
      marginTop: 3,
      marginBottom: 3,
      x: { ...x, axis: null },
      y,
      marks,
      ariaLabel: "What did not run",
    });
  }

  /** Explains the marks of a strip. */
  function stripLegend(failures, lead = "Marks above a chart, what did not run:") {
    const found = Object.keys(vitcmp.STATUSES).filter((status) =>
      failures.some((failure) => failure.status === status),
    );
    if (!found.length) return null;
    const entries = found.map((status) =>
      element("span", { class: "key" }, glyph(status), vitcmp.STATUSES[status].text),
    );
    const faint = failures.some((failure) => failure.isPartly)
      ? " Faint: another setting of that model did run there."
      : "";
    return element("p", { class: "note keys" }, `${lead} `, ...entries, faint);
  }

  function glyph(status) {
    const { symbol } = vitcmp.STATUSES[status];
    const kind =
      d3[
        {
          times: "symbolTimes",
          plus: "symbolPlus",
          asterisk: "symbolAsterisk",
          triangle2: "symbolTriangle2",
          square2: "symbolSquare2",
          circle: "symbolCircle",
          diamond2: "symbolDiamond2",
        }[symbol]
      ];
    const svg = d3.create("svg").attr("class", "swatch").attr("viewBox", "-8 -8 16 16").attr("aria-hidden", "true");
    const colour = status === "unsupported" ? "var(--soft)" : "var(--warn)";
    svg
      .append("path")
      .attr("d", d3.symbol(kind, 60)())
      .attr("fill", "none")
      .attr("stroke", colour)
      .attr("stroke-width", 2);
    return svg.node();
  }

  // Figures.

  const GAP = 24;

  /** Returns the width of a chart of which two stand side by side where there is room for them. */
  function half(width) {
    return width >= 2 * 440 + GAP ? (width - GAP) / 2 : width;
  }

  /** Makes a figure: title, the strip of failures, the drawing; arrow keys go from point to point. */
  function figure({ title, note, svg, points, width, x, failures = [], className = "" }) {
    const said = element("p", { class: "said", "aria-live": "polite" });
    const about = `${title}. ${vitcmp.plural(points.length, "point")}. The arrow keys go from one to the next.`;
    const above = strip(failures, { width, x });
    const frame = element("div", { class: "frame", tabindex: "0", role: "group", "aria-label": about }, above, svg);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", title);
    const sides = [[svg, points], ...(above ? [[above, failures]] : [])];
    for (const [drawing] of sides) {
      drawing.addEventListener("input", () => (said.textContent = drawing.value?.text ?? "")); // what Plot points at
    }
    walk(frame, sides, said);
    const hint = note ? element("span", { class: "note" }, ` ${note}`) : null;
    const caption = element("figcaption", {}, element("strong", {}, title), hint);
    return element("figure", { class: `chart ${className}`.trim() }, caption, frame, said);
  }

  /** Makes a figure in which there is nothing to draw. */
  function unknown(title, text) {
    const caption = element("figcaption", {}, element("strong", {}, title));
    return element("figure", { class: "chart" }, caption, element("p", { class: "empty" }, text));
  }

  /** Lets the arrow keys move the chart's own pointer: left and right along a line, up and down to the next line. */
  function walk(frame, sides, said) {
    const lines = sides.flatMap(([svg, points]) => linesOf(points).map((list) => ({ svg, list })));
    const far = Math.max(0, ...lines.map(({ list }) => list.length));
    const steps = {
      ArrowRight: [0, 1],
      ArrowLeft: [0, -1],
      ArrowDown: [1, 0],
      ArrowUp: [-1, 0],
      Home: [0, -far],
      End: [0, far],
    };
    let [line, index] = [0, -1];
    const leaveAll = () => sides.forEach(([svg]) => leave(svg));
    frame.addEventListener("blur", leaveAll);
    frame.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (step || event.key === "Escape") leaveAll();
      if (!step || !lines.length) return;
      event.preventDefault();
      line = (line + step[0] + lines.length) % lines.length;
      const { svg, list } = lines[line];
      index = Math.max(0, Math.min(list.length - 1, index + step[1]));
      point(svg, list[index]);
      said.textContent = list[index].text; // of points that cover each other, Plot may have shown another
    });
  }

  function linesOf(points) {
    return d3.groups(points, (point) => point.key).map(([, group]) => d3.sort(group, (point) => point.x));
  }

  /** Moves Plot's pointer to a point of the drawing; a band scale gives the point's edge. */
  function point(svg, at) {
    const box = svg.getBoundingClientRect();
    const zoom = box.width / svg.viewBox.baseVal.width;
    const place = (name, value) => svg.scale(name).apply(value) + (svg.scale(name).bandwidth ?? 0) / 2;
    const [left, top] = [place("x", at.x), place("y", svg.scale("y").type === "band" ? at.key : at.y)];
    const where = { clientX: box.left + zoom * left, clientY: box.top + zoom * top };
    svg.dispatchEvent(new PointerEvent("pointermove", { ...where, pointerType: "mouse", bubbles: true }));
  }

  function leave(svg) {
    svg.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
  }

  Object.assign(vitcmp, {
    MARGIN,
    half,
    unknown,
    view,
    drawAll,
    drawAbove,
    sizeAxis,
    valueAxis,
    series,
    dodge,
    ratios,
    dots,
    tip,
    plot,
    stripLegend,
    figure,
  });
})();
