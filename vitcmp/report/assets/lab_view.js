// The lab's two panes: a picture and what the model sees of it, moved together, side by side or under one divider.
"use strict";

vitcmp.labView = (() => {
  const { element } = vitcmp;
  const MAX_ZOOM = 32; // screen pixels to a pixel of the original
  const STEP = 1.25; // of one press of + or one notch of the wheel
  const KEYS = {
    ArrowLeft: (view) => view.moveBy(-40, 0),
    ArrowRight: (view) => view.moveBy(40, 0),
    ArrowUp: (view) => view.moveBy(0, -40),
    ArrowDown: (view) => view.moveBy(0, 40),
    "+": (view) => view.zoomBy(STEP),
    "=": (view) => view.zoomBy(STEP),
    "-": (view) => view.zoomBy(1 / STEP),
    0: (view) => view.setPlace({ zoom: "fit" }),
    1: (view) => view.setPlace({ zoom: 1 }),
  };

  class View {
    /** `onPlace({zoom, x, y})`: the reader has moved. zoom: "fit" or screen pixels a pixel; x, y in 0..1. */
    constructor({ onPlace, onWipe }) {
      this.place = { zoom: "fit", x: 0.5, y: 0.5 };
      this.pictures = null; // {original, model: canvases; patch: pixels of the model's input, or 0}
      this.mode = "side";
      this.wipe = 50;
      this.onPlace = onPlace;
      this.panes = ["Original", "What the model sees"].map((name) => makePane(this, name));
      this.slider = element("input", { type: "range", min: 0, max: 100, "aria-label": "Divider: original to the left" });
      this.slider.addEventListener("input", () => onWipe(this.slider.value));
      this.element = element("div", { class: "lab-view" }, ...this.panes.map((pane) => pane.figure), this.slider);
      new ResizeObserver(() => this.draw()).observe(this.element);
    }

    show(pictures) {
      this.pictures = pictures;
      this.place = this.limit(this.place);
      this.draw();
    }

    setMode(mode, wipe) {
      this.mode = mode;
      this.wipe = Number(wipe);
      this.slider.value = wipe;
      this.slider.hidden = mode !== "wipe";
      this.panes[1].figure.hidden = mode === "wipe";
      this.panes[0].caption.textContent = mode === "wipe" ? "Original | what the model sees" : "Original";
      this.element.dataset.mode = mode;
      this.draw();
    }

    /** Returns screen pixels a pixel of the original. */
    get zoom() {
      return this.place.zoom === "fit" ? this.fitZoom : this.place.zoom;
    }

    get fitZoom() {
      const { clientWidth, clientHeight } = this.panes[0].canvas;
      const { width, height } = this.pictures?.original ?? { width: 1, height: 1 };
      return Math.min(clientWidth / width, clientHeight / height) || 1;
    }

    setPlace(place, { isReaders = true } = {}) {
      this.place = this.limit({ ...this.place, ...place });
      this.draw();
      if (isReaders) this.onPlace(this.place);
    }

    /** Keeps the zoom between "fit" and the largest, and the middle of the pane within the picture. */
    limit({ zoom, x, y }) {
      if (this.pictures === null) return { zoom, x, y };
      const clamp = (value) => Math.min(1, Math.max(0, value));
      const isFit = zoom === "fit" || zoom <= this.fitZoom;
      return isFit ? { zoom: "fit", x: 0.5, y: 0.5 } : { zoom: Math.min(MAX_ZOOM, zoom), x: clamp(x), y: clamp(y) };
    }

    /** Zooms about a point that stays where it is: (dx, dy) screen pixels from the middle of the pane. */
    zoomBy(factor, dx = 0, dy = 0) {
      const { width, height } = this.pictures.original;
      const before = this.zoom;
      const after = Math.min(MAX_ZOOM, Math.max(this.fitZoom, before * factor));
      const shift = 1 / before - 1 / after;
      this.setPlace({ zoom: after, x: this.place.x + (dx * shift) / width, y: this.place.y + (dy * shift) / height });
    }

    moveBy(dx, dy) {
      if (this.place.zoom === "fit") return;
      const { width, height } = this.pictures.original;
      this.setPlace({ x: this.place.x + dx / this.zoom / width, y: this.place.y + dy / this.zoom / height });
    }

    draw() {
      if (this.pictures === null) return;
      const [first, second] = this.panes.map((pane) => prepare(pane.canvas));
      const frame = this.frame(first.canvas);
      drawPicture(first, this.pictures.original, frame);
      if (this.mode === "wipe") this.drawWipe(first, frame);
      else this.drawModel(second, frame);
      for (const { canvas } of this.panes) canvas.dataset.zoomed = this.place.zoom !== "fit";
    }

    drawModel(context, frame) {
      drawPicture(context, this.pictures.model, frame);
      if (this.pictures.patch) drawGrid(context, this.pictures.model, frame, this.pictures.patch);
    }

    drawWipe(context, frame) {
      const edge = Math.round((context.canvas.width * this.wipe) / 100);
      context.save();
      context.beginPath();
      context.rect(edge, 0, context.canvas.width, context.canvas.height);
      context.clip();
      context.clearRect(edge, 0, context.canvas.width, context.canvas.height);
      this.drawModel(context, frame);
      context.restore();
      context.fillStyle = colour("--accent");
      context.fillRect(edge - devicePixelRatio, 0, 2 * devicePixelRatio, context.canvas.height);
    }

    /** Returns where the whole picture lies, in pixels of the canvas. */
    frame(canvas) {
      const scale = this.zoom * devicePixelRatio;
      const [width, height] = [this.pictures.original.width * scale, this.pictures.original.height * scale];
      const left = Math.round(canvas.width / 2 - this.place.x * width);
      return { left, top: Math.round(canvas.height / 2 - this.place.y * height), width, height };
    }
  }

  function makePane(view, name) {
    const label = `${name}. Arrow keys move, plus and minus zoom, 0 fits, 1 shows pixel for pixel.`;
    const canvas = element("canvas", { tabindex: 0, role: "img", "aria-label": label });
    const caption = element("figcaption", {}, name);
    listen(view, canvas);
    return { canvas, caption, figure: element("figure", {}, caption, canvas) };
  }

  function listen(view, canvas) {
    const pointers = new Map();
    canvas.addEventListener("keydown", (event) => {
      if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      KEYS[event.key](view);
    });
    canvas.addEventListener("wheel", (event) => {
      // Without Ctrl and without focus the wheel scrolls the page, as the reader expects who only passes by.
      if (!event.ctrlKey && document.activeElement !== canvas) return;
      event.preventDefault();
      view.zoomBy(STEP ** -Math.sign(event.deltaY), ...fromMiddle(canvas, event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!pointers.has(event.pointerId)) return;
      const before = [...pointers.values()];
      pointers.set(event.pointerId, event);
      follow(view, canvas, before, [...pointers.values()]);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => pointers.delete(event.pointerId));
    }
  }

  /** Moves the picture with one pointer; zooms it with two, about their middle. */
  function follow(view, canvas, before, after) {
    const [from, to] = [middle(before), middle(after)];
    view.moveBy(from.clientX - to.clientX, from.clientY - to.clientY);
    if (after.length === 2) view.zoomBy(distance(after) / distance(before), ...fromMiddle(canvas, to));
  }

  function middle(points) {
    const mean = (name) => points.reduce((sum, point) => sum + point[name], 0) / points.length;
    return { clientX: mean("clientX"), clientY: mean("clientY") };
  }

  function distance([a, b]) {
    return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) || 1;
  }

  function fromMiddle(canvas, { clientX, clientY }) {
    const box = canvas.getBoundingClientRect();
    return [clientX - box.left - box.width / 2, clientY - box.top - box.height / 2];
  }

  function prepare(canvas) {
    canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
    canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
    return canvas.getContext("2d");
  }

  /** Smooths only where the screen has fewer pixels than the picture: an enlarged pixel is shown as a square. */
  function drawPicture(context, picture, { left, top, width, height }) {
    context.imageSmoothingEnabled = width < picture.width || height < picture.height;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, left, top, width, height);
  }

  /** Draws the patches; what is left over beside whole patches, and no token sees, is hatched out. */
  function drawGrid(context, picture, frame, patch) {
    const [stepX, stepY] = [(patch * frame.width) / picture.width, (patch * frame.height) / picture.height];
    const [columns, rows] = [Math.floor(picture.width / patch), Math.floor(picture.height / patch)];
    const { left, top } = frame;
    const [right, bottom] = [left + columns * stepX, top + rows * stepY];
    context.fillStyle = "rgb(128 128 128 / 75%)";
    context.fillRect(right, top, left + frame.width - right, frame.height);
    context.fillRect(left, bottom, right - left, top + frame.height - bottom);
    const lines = new Path2D();
    for (let i = 0; i <= columns; i++) line(lines, left + i * stepX, top, left + i * stepX, bottom);
    for (let i = 0; i <= rows; i++) line(lines, left, top + i * stepY, right, top + i * stepY);
    // Dark and light, so that it is seen on any picture.
    for (const [style, width] of [["rgb(0 0 0 / 45%)", 2], ["rgb(255 255 255 / 80%)", 1]]) {
      Object.assign(context, { strokeStyle: style, lineWidth: width * Math.min(devicePixelRatio, stepX / 6) });
      context.stroke(lines);
    }
  }

  function line(path, x0, y0, x1, y1) {
    path.moveTo(x0, y0);
    path.lineTo(x1, y1);
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name);
  }

  return (options) => new View(options);
})();
