// Image resizing, the same as vitcmp/resample.py: separable kernels, half-pixel centres, the kernel widened when
// shrinking (antialias). Weights and sums are float64. A sum is rounded to float32, clipped to 0..255 and cut off to
// uint8, as big_vision's resize does and experiments/capacity/data/pipeline.py; `rounding: "nearest"` rounds instead.
"use strict";

vitcmp.resample = (() => {
  const CHANNELS = 4; // canvas pixels are RGBA; all four are resized alike

  const triangle = (x) => Math.max(0, 1 - x);

  /** Mitchell and Netravali, 1988, equation 8; b = 0 gives Keys' kernel with a = -c. */
  const cubic = (b, c) => (x) => {
    if (x < 1) return ((12 - 9 * b - 6 * c) * x ** 3 + (-18 + 12 * b + 6 * c) * x ** 2 + (6 - 2 * b)) / 6;
    if (x < 2) return ((-b - 6 * c) * x ** 3 + (6 * b + 30 * c) * x ** 2 + (-12 * b - 48 * c) * x + (8 * b + 24 * c)) / 6;
    return 0;
  };

  const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
  const lanczos = (radius) => (x) => (x < radius ? sinc(x) * sinc(x / radius) : 0);

  /** Standard deviation 0.5 pixels, cut off at 1.5, as in TensorFlow. */
  const gaussian = (x) => (x < 1.5 ? Math.exp(-2 * x ** 2) : 0);

  // Each takes the distance from its centre, in pixels of the coarser side; `radius` is where it ends.
  const KERNELS = {
    bilinear: { weigh: triangle, radius: 1 },
    bicubic: { weigh: cubic(0, 0.5), radius: 2 },
    lanczos3: { weigh: lanczos(3), radius: 3 },
    lanczos5: { weigh: lanczos(5), radius: 5 },
    gaussian: { weigh: gaussian, radius: 1.5 },
    mitchell: { weigh: cubic(1 / 3, 1 / 3), radius: 2 },
  };
  const METHODS = ["nearest", "area", ...Object.keys(KERNELS)];

  /** Returns, for each output pixel of one axis, {first, weights}: weights[k] is for input pixel first + k; sum 1. */
  function axisWeights(inSize, outSize, method, antialias) {
    const weigh = { nearest: nearestPixel, area: coveredPixels }[method] ?? kernelPixels(KERNELS[method], antialias);
    return Array.from({ length: outSize }, (_, i) => {
      const { first, weights } = weigh(i, inSize / outSize, inSize);
      const sum = weights.reduce((total, weight) => total + weight, 0);
      return { first, weights: Float64Array.from(weights, (weight) => weight / sum) };
    });
  }

  function nearestPixel(i, scale) {
    return { first: Math.floor((i + 0.5) * scale), weights: [1] };
  }

  function coveredPixels(i, scale, inSize) {
    const [start, end] = [i * scale, (i + 1) * scale];
    const first = Math.floor(start);
    const covered = (pixel) => Math.max(0, Math.min(end, pixel + 1) - Math.max(start, pixel));
    return { first, weights: range(first, Math.min(inSize, Math.ceil(end))).map(covered) };
  }

  function kernelPixels({ weigh, radius }, antialias) {
    return (i, scale, inSize) => {
      const widening = antialias ? Math.max(scale, 1) : 1;
      const centre = (i + 0.5) * scale - 0.5;
      const first = Math.max(0, Math.ceil(centre - radius * widening));
      const end = Math.min(inSize, Math.floor(centre + radius * widening) + 1);
      return { first, weights: range(first, end).map((pixel) => weigh(Math.abs(pixel - centre) / widening)) };
    };
  }

  function range(start, end) {
    return Array.from({ length: end - start }, (_, i) => start + i);
  }

  /**
   * Resizes an ImageData to width x height; one that has the size already is returned as it is, whatever the method.
   * One output row at a time, so that nothing larger than a row is held: first down the columns, then along the row.
   */
  function resize(image, width, height, { method = "bilinear", antialias = true, rounding = "truncate" } = {}) {
    if (!METHODS.includes(method)) throw new Error(`unknown method ${method}; allowed: ${METHODS.join(", ")}`);
    if (image.width === width && image.height === height) return image;
    const rows = axisWeights(image.height, height, method, antialias);
    const columns = axisWeights(image.width, width, method, antialias);
    const offset = rounding === "nearest" ? 0.5 : 0;
    const resized = new ImageData(width, height);
    const row = new Float64Array(image.width * CHANNELS);
    rows.forEach((weights, y) => {
      sumRows(image.data, weights, row);
      sumColumns(row, columns, resized.data.subarray(y * width * CHANNELS, (y + 1) * width * CHANNELS), offset);
    });
    return resized;
  }

  function sumRows(pixels, { first, weights }, row) {
    row.fill(0);
    for (let k = 0; k < weights.length; k++) {
      const weight = weights[k];
      const start = (first + k) * row.length;
      for (let i = 0; i < row.length; i++) row[i] += weight * pixels[start + i];
    }
  }

  function sumColumns(row, columns, out, offset) {
    for (let x = 0; x < columns.length; x++) {
      const { first, weights } = columns[x];
      let red = 0, green = 0, blue = 0, alpha = 0; // no array: it would be made for each pixel
      for (let k = 0, i = first * CHANNELS; k < weights.length; k++, i += CHANNELS) {
        const weight = weights[k];
        red += weight * row[i];
        green += weight * row[i + 1];
        blue += weight * row[i + 2];
        alpha += weight * row[i + 3];
      }
      const at = x * CHANNELS;
      out[at] = toUint8(red, offset);
      out[at + 1] = toUint8(green, offset);
      out[at + 2] = toUint8(blue, offset);
      out[at + 3] = toUint8(alpha, offset);
    }
  }

  /** `out` is a Uint8ClampedArray, which would round: an integer is given to it. 127.9999999 is 128 in float32. */
  function toUint8(value, offset) {
    return Math.floor(Math.min(255, Math.max(0, Math.fround(value))) + offset);
  }

  return { METHODS, resize };
})();
