// The lab's pictures: decoded to canvases, the page's own and what a reader opens, which never leaves this page.
"use strict";

vitcmp.labPictures = (() => {
  const { element } = vitcmp;
  const MAX_SIDE = 2048; // of a reader's own picture, in pixels; larger ones are shrunk when they are opened
  const MAX_BYTES = 100e6; // of its file

  async function decode(src) {
    const image = new Image();
    image.src = src;
    await image.decode();
    return toCanvas(image, image.naturalWidth, image.naturalHeight);
  }

  /** Returns a canvas of the picture; what is transparent is laid over white. */
  function toCanvas(source, width, height) {
    const canvas = element("canvas", { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(source, 0, 0, width, height);
    return canvas;
  }

  async function readFile(file) {
    if (file.size > MAX_BYTES) {
      throw new Error(`${file.name} has ${Math.round(file.size / 1e6)} MB; ${MAX_BYTES / 1e6} MB is the most.`);
    }
    const bitmap = await createImageBitmap(file).catch(() => {
      throw new Error(`${file.name} is no picture that this browser can read; PNG, JPEG, WebP and GIF are.`);
    });
    const shrink = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    if (shrink === 1) return { canvas: toCanvas(bitmap, bitmap.width, bitmap.height), note: null };
    const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * shrink)));
    const size = { resizeWidth: width, resizeHeight: height, resizeQuality: "high" };
    const note = `It has ${bitmap.width} × ${bitmap.height} px; the browser shrank it to ${width} × ${height} px, ` +
      "which is the original here.";
    return { canvas: toCanvas(await createImageBitmap(bitmap, size), width, height), note };
  }

  function readPixels(canvas) {
    return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  }

  function toImageCanvas(image) {
    const canvas = element("canvas", { width: image.width, height: image.height });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  return { decode, readFile, readPixels, toImageCanvas, MAX_SIDE };
})();
