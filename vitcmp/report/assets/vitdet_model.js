// ViTDet in numbers: what its controls describe, and the counts of vitcmp/products.py. Nothing is drawn here.
"use strict";

vitcmp.vitdetModel = (() => {
  // Width, depth and heads by name, as in vitcmp/sizes.py; the MLP is four times as wide.
  const SIZES = { Ti: [192, 12, 3], S: [384, 12, 6], B: [768, 12, 12], L: [1024, 24, 16], H: [1280, 32, 16] };
  // Of what is read: within them every count is a whole number below 2^53.
  const MOST = { side: 256, patch: 256, window: 256, width: 2048, depth: 48, heads: 64 };

  const product = (numbers) => numbers.reduce((a, b) => a * b, 1);

  /** Returns the model that `get(name)` describes; where it describes none, `faults` says why. */
  function readSpec(get) {
    const faults = [];
    const read = (name, label) => readWhole(get(name), label, MOST[name], faults);
    const image = readImage(get("image"), faults);
    const [patch, window] = [read("patch", "Patch"), read("window", "Window")];
    const [width, depth, heads] = SIZES[get("model")] ?? ["Width", "Depth", "Heads"].map((label) => read(label.toLowerCase(), label));
    if (width % heads) faults.push(`Width: ${width} cannot be shared by ${heads} heads.`);
    const spec = { image, patch, window, width, depth, heads, mlp: 4 * width, faults };
    spec.relPos = get("relpos") === "1";
    spec.valueBytes = Number(get("bits")) / 8;
    if (!faults.length) spec.grid = readGrid(image, patch, faults);
    if (!faults.length) spec.global = readGlobal(get("global"), depth, faults);
    return spec;
  }

  function readWhole(text, label, most, faults) {
    const value = /^\s*\d{1,9}\s*$/.test(text) ? Number(text) : 0;
    if (value < 1 || value > most) faults.push(`${label}: a whole number from 1 to ${most}.`);
    return value;
  }

  function readImage(text, faults) {
    const match = /^\s*(\d{1,6})\s*(?:[x×]\s*(\d{1,6})\s*)?$/i.exec(text);
    if (!match) faults.push("Image: a side in pixels, as 1024, or height x width, as 800x1333.");
    return match && [Number(match[1]), Number(match[2] ?? match[1])];
  }

  function readGrid(image, patch, faults) {
    const grid = image.map((side) => Math.floor(side / patch));
    const size = image.join(" x ");
    if (Math.min(...grid) < 1) faults.push(`Image: ${size} pixels are smaller than one patch of ${patch} pixels.`);
    if (Math.max(...grid) > MOST.side) faults.push(`Image: ${grid.join(" x ")} tokens, of which ${MOST.side} a side can be drawn.`);
    return grid;
  }

  /** Reads a count of blocks, spaced evenly as in section 3 of the paper, or their indices: `2+5+8+11`, `2+` for one. */
  function readGlobal(text, depth, faults) {
    const parts = text.replaceAll(/\s|\+\s*$/g, "").split("+").map((part) => (/^\d{1,9}$/.test(part) ? Number(part) : -1));
    const isCount = !text.includes("+");
    const isFit = isCount ? parts[0] >= 0 && parts[0] <= depth : isDistinct(parts) && parts.every((part) => part >= 0 && part < depth);
    if (!isFit) faults.push(`Global blocks: a count from 0 to ${depth}, or different blocks from 0 to ${depth - 1}, as 2+5+8+11.`);
    if (!isFit) return [];
    return isCount ? spacedEvenly(parts[0], depth) : parts.sort((a, b) => a - b);
  }

  const isDistinct = (values) => new Set(values).size === values.length;
  const spacedEvenly = (count, depth) => Array.from({ length: count }, (_, i) => Math.floor(((i + 1) * depth) / count) - 1);

  /** Writes global blocks as `readGlobal` reads them. */
  function writeGlobal(blocks) {
    return blocks.length ? blocks.join("+") + (blocks.length === 1 ? "+" : "") : "0";
  }

  /** Returns the grid in whole windows, padded at its bottom and right. */
  function padGrid(grid, window) {
    return grid.map((side, axis) => Math.ceil(side / window[axis]) * window[axis]);
  }

  /** Counts one block's forward pass of one image; FLOPs are 2 per multiply-add, as executed. */
  function countBlock(spec, { isGlobal, relPos = spec.relPos }) {
    const { width, heads, mlp, grid, valueBytes } = spec;
    const window = isGlobal ? grid : [spec.window, spec.window];
    const numTokens = product(grid), padded = product(padGrid(grid, window)), inWindow = product(window);
    const numWindows = padded / inWindow, distances = relPos ? window[0] + window[1] : 0;
    const linear = 2 * numTokens * width * (4 * width + 2 * mlp);
    const attention = 4 * numWindows * inWindow ** 2 * width;
    const bias = 2 * padded * distances * width;
    return {
      window, numWindows, inWindow, padded, linear, attention, bias,
      total: linear + attention + bias,
      onPadding: attention + bias - countCut(spec, window, relPos),
      projectedPadding: 2 * (padded - numTokens) * 4 * width ** 2,
      logitsBytes: heads * numWindows * inWindow ** 2 * valueBytes,
      flashBytes: heads * padded * 4,
      biasBytes: heads * padded * distances * valueBytes,
    };
  }

  /** Counts what attention and positions would need in windows that end where the grid ends. */
  function countCut(spec, window, relPos) {
    const [rows, columns] = spec.grid.map((side, axis) => Math.floor(side / window[axis]) * window[axis] ** 2 + (side % window[axis]) ** 2);
    const attention = 4 * rows * columns * spec.width;
    const bias = 2 * (rows * spec.grid[1] + spec.grid[0] * columns) * spec.width;
    return relPos ? attention + bias : attention;
  }

  /** Counts the whole model without a head, and the plain ViT: every block global, no relative positions. */
  function countModel(spec) {
    const windowed = countBlock(spec, { isGlobal: false }), global = countBlock(spec, { isGlobal: true });
    const plain = countBlock(spec, { isGlobal: true, relPos: false });
    const patches = 2 * product(spec.grid) * spec.patch ** 2 * 3 * spec.width;
    const numGlobal = spec.global.length, numWindowed = spec.depth - numGlobal;
    const sum = (name) => numWindowed * windowed[name] + numGlobal * global[name];
    return {
      windowed, global, plain, numWindowed,
      total: patches + sum("total"), attention: sum("attention") + sum("bias"),
      plainTotal: patches + spec.depth * plain.total, plainAttention: spec.depth * plain.attention,
      onPadding: sum("onPadding"), projectedPadding: sum("projectedPadding"),
      logitsBytes: Math.max(numWindowed ? windowed.logitsBytes : 0, numGlobal ? global.logitsBytes : 0),
    };
  }

  /** Returns the windows from half to twice the model's that divide its grid. */
  function fittingWindows({ grid, window }) {
    const sides = Array.from({ length: 2 * window }, (_, i) => i + 1);
    return sides.filter((side) => 2 * side >= window && grid.every((length) => length % side === 0));
  }

  return { SIZES, MOST, product, readSpec, writeGlobal, padGrid, countModel, fittingWindows };
})();
