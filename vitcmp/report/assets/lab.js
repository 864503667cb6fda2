// The lab: a picture, resized as a model's input pipeline does it, beside itself. The numbers are resample.js's.
"use strict";

(() => {
  const { element, state, labText } = vitcmp;
  const { decode, readFile, readPixels, toImageCanvas } = vitcmp.labPictures;
  const SIZES = ["128", "224", "256", "384", "448", "512", "768", "896", "1024"];
  const WITHOUT = "-noaa"; // ends the name of a method that is asked for without antialias
  const DOWN = [
    "nearest", "area", "bilinear", `bilinear${WITHOUT}`, "bicubic", "gaussian", "lanczos3", "lanczos5", "mitchell",
  ];
  const UP = ["nearest", "bilinear", `bilinear${WITHOUT}`, "bicubic"];
  const PATCHES = [14, 16, 32];
  const OWN = "own";
  // PaliGemma's arms (arXiv:2407.07726, section 5.7.1): all bilinear, stretched to a square, cut off after each resize.
  const ARMS = [
    { label: "224 px", size: "224", input: "same" },
    { label: "448 px, resized to 224 px first", size: "224", input: "448" },
    { label: "448 px", size: "448", input: "same" },
  ];
  const ARM = { "lab.down": "bilinear", "lab.up": "bilinear", "lab.shape": "square", "lab.rounding": "truncate" };

  const pixels = (size) => (SIZES.includes(size) ? `${size} px` : size);
  const methodName = (method) => method.replace(WITHOUT, ", no antialias");
  // name: [label, initial, allowed, how a value is written]
  const CONTROLS = {
    "lab.size": ["Intrinsic resolution", "224", [...SIZES, "original"], pixels],
    "lab.down": ["Down by", "bilinear", DOWN, methodName],
    "lab.input": ["Size the model is given", "original", ["same", ...SIZES, "original"],
      (size) => ({ same: "the intrinsic one", original: "the original's" })[size] ?? pixels(size)],
    "lab.up": ["Up by", "bilinear", UP, methodName],
    "lab.shape": ["Shape", "square", ["square", "keep"],
      (shape) => ({ square: "stretched to a square", keep: "proportions kept" })[shape]],
    "lab.rounding": ["To whole grey levels by", "truncate", ["truncate", "nearest"],
      (rounding) => ({ truncate: "cutting off", nearest: "rounding" })[rounding]],
    "lab.grid": ["Grid of patches", "none", ["none", ...PATCHES.map(String)],
      (patch) => (patch === "none" ? patch : `${patch} px`)],
    "lab.view": ["View", "side", ["side", "wipe"], (view) => ({ side: "side by side", wipe: "divider" })[view]],
  };

  vitcmp.section("lab", (root) => {
    const images = JSON.parse(document.getElementById("lab-images").textContent);
    const lab = makeLab(root, images);
    state.define("lab.image", images[0]?.file ?? OWN, (name) => lab.pictures.has(name));
    for (const [name, [, initial, allowed]] of Object.entries(CONTROLS)) state.define(name, initial, allowed);
    // "fit", or the zoom in per cent and the middle as parts of the width and height
    state.define("lab.at", "fit", (text) => text === "fit" || /^\d{1,4}(\.\d+)?,[01](\.\d+)?,[01](\.\d+)?$/.test(text));
    state.define("lab.wipe", "50", (text) => /^\d{1,3}$/.test(text) && Number(text) <= 100);
    build(lab);
    state.onChange(["lab.image", ...Object.keys(CONTROLS)], () => refresh(lab));
    state.onChange(["lab.at"], () => restorePlace(lab));
    state.onChange(["lab.wipe"], () => lab.view.setMode(state.get("lab.view"), state.get("lab.wipe")));
    restorePlace(lab);
    refresh(lab);
  });

  function makeLab(root, images) {
    // file -> {name, kind, note, load}: load() gives a promise of the picture's canvas
    const pictures = new Map(images.map((image) => [image.file, { ...image, load: once(() => decode(image.src)) }]));
    const lab = { root, pictures, turn: 0, timers: {} };
    lab.view = vitcmp.labView({
      onPlace: (place) => keepPlace(lab, place),
      onWipe: (percent) => keepWipe(lab, percent),
    });
    return lab;
  }

  function once(make) {
    let made = null;
    return () => (made ??= make());
  }

  // ---- the elements

  function build(lab) {
    lab.controls = Object.entries(CONTROLS).map(([name, parts]) => makeSelect(name, ...parts));
    lab.chooser = element("select", { "data-state": "lab.image" });
    lab.chooser.addEventListener("change", () => state.set("lab.image", lab.chooser.value));
    lab.file = element("input", { type: "file", accept: "image/*", onchange: () => open(lab, lab.file.files) });
    lab.arms = ARMS.map((arm) => element("button", { type: "button", onclick: () => chooseArm(arm) }, arm.label));
    lab.fault = element("p", { role: "alert", class: "lab-fault", hidden: true });
    lab.chain = element("p", { class: "lab-chain", role: "status" });
    lab.tokens = element("p", { class: "lab-tokens note" });
    lab.credit = element("p", { class: "note" });
    const arms = { class: "lab-row", role: "group", "aria-label": "PaliGemma's three arms" };
    const own = labelled("Or your own: open, drop or paste", lab.file);
    lab.root.append(
      labText.introduction(),
      element("div", { class: "controls" }, labelled("Picture", lab.chooser), own),
      element("div", { class: "controls" }, ...lab.controls.map(({ label }) => label)),
      element("div", arms, "PaliGemma's three arms:", ...lab.arms),
      lab.fault,
      lab.chain,
      lab.tokens,
      lab.view.element,
      zoomButtons(lab),
      lab.credit,
      labText.advice(),
      labText.exactly(),
    );
    listen(lab);
  }

  function labelled(text, control) {
    return element("label", {}, text, control);
  }

  function makeSelect(name, label, _, allowed, write) {
    const options = allowed.map((value) => element("option", { value }, write(value)));
    const select = element("select", { "data-state": name, onchange: () => state.set(name, select.value) }, ...options);
    return { name, select, label: labelled(label, select) };
  }

  function zoomButtons(lab) {
    const buttons = [
      ["Zoom in", () => lab.view.zoomBy(1.25)],
      ["Zoom out", () => lab.view.zoomBy(0.8)],
      ["Fit", () => lab.view.setPlace({ zoom: "fit" })],
      ["Pixel for pixel", () => lab.view.setPlace({ zoom: 1 })],
      ["Save what the model sees", () => save(lab)],
    ].map(([text, onclick]) => element("button", { type: "button", onclick }, text));
    lab.scale = element("span", { class: "note" });
    return element("div", { class: "lab-row" }, ...buttons, lab.scale);
  }

  function listen(lab) {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    const over = (isOver) => lab.root.classList.toggle("lab-over", isOver);
    lab.root.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      over(true);
    });
    lab.root.addEventListener("dragleave", () => over(false));
    lab.root.addEventListener("drop", (event) => {
      over(false);
      if (!hasFiles(event)) return;
      event.preventDefault();
      open(lab, event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => {
      if (!event.clipboardData?.files.length) return;
      event.preventDefault();
      lab.root.scrollIntoView({ block: "nearest" });
      open(lab, event.clipboardData.files);
    });
  }

  /** Shows the reader's own picture, or says why not. It stays in this page's memory. */
  async function open(lab, files) {
    const file = files[0];
    if (!file) return;
    const opening = (lab.opening = file);
    try {
      const { canvas, note } = await readFile(file);
      if (lab.opening !== opening) return; // another was opened meanwhile
      lab.pictures.set(OWN, { name: file.name, kind: "your own", note, load: async () => canvas });
      showFault(lab, null);
      if (state.get("lab.image") === OWN) refresh(lab);
      else state.set("lab.image", OWN);
    } catch (error) {
      showFault(lab, error.message);
    } finally {
      lab.file.value = ""; // the same file may be opened again
    }
  }

  function showFault(lab, text) {
    lab.fault.textContent = text ?? "";
    lab.fault.hidden = text === null;
  }

  // ---- what the model sees

  async function refresh(lab) {
    const turn = ++lab.turn; // several settings may change at once, and a picture takes time to decode
    const picture = lab.pictures.get(state.get("lab.image"));
    showControls(lab);
    if (picture === undefined) return;
    lab.view.element.setAttribute("aria-busy", true);
    const original = await picture.load();
    if (turn !== lab.turn) return;
    const steps = planSteps(original);
    lab.model = toImageCanvas(steps.reduce(applyStep, readPixels(original)));
    lab.view.setMode(state.get("lab.view"), state.get("lab.wipe"));
    lab.view.show({ original, model: lab.model, patch: Number(state.get("lab.grid")) || 0 });
    showScale(lab);
    describe(lab, picture, original, steps);
    lab.view.element.setAttribute("aria-busy", false);
  }

  /** Returns the resizes, at most two, as [{width, height, method, antialias, rounding}]. */
  function planSteps(original) {
    const shape = (size) => targetShape(size, original);
    const [size, input] = [state.get("lab.size"), state.get("lab.input")];
    const steps = [{ ...shape(size), ...methodOf("lab.down") }];
    if (input !== "same") steps.push({ ...shape(input), ...methodOf("lab.up") });
    return steps.filter((step, i) => {
      const before = steps[i - 1] ?? original;
      return step.width !== before.width || step.height !== before.height;
    });
  }

  function targetShape(size, { width, height }) {
    if (size === "original") return { width, height };
    const side = Number(size);
    if (state.get("lab.shape") === "square") return { width: side, height: side };
    const scale = side / Math.max(width, height);
    return { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
  }

  function methodOf(name) {
    const method = state.get(name);
    const antialias = !method.endsWith(WITHOUT);
    const options = { method: method.replace(WITHOUT, ""), antialias, rounding: state.get("lab.rounding") };
    return { ...options, label: methodName(method) };
  }

  function applyStep(image, { width, height, ...options }) {
    return vitcmp.resample.resize(image, width, height, options);
  }

  function chooseArm({ size, input }) {
    const settings = Object.entries({ ...ARM, "lab.size": size, "lab.input": input });
    for (const [name, value] of settings) state.set(name, value);
  }

  function save(lab) {
    lab.model?.toBlob((blob) => {
      const href = URL.createObjectURL(blob);
      element("a", { href, download: `model-sees-${lab.model.width}x${lab.model.height}.png` }).click();
      setTimeout(() => URL.revokeObjectURL(href), 10000);
    });
  }

  // ---- what is said about it

  function showControls(lab) {
    for (const { name, select } of lab.controls) select.value = state.get(name);
    const option = ([value, { name, kind }]) => element("option", { value }, `${capital(kind)}: ${name}`);
    lab.chooser.replaceChildren(...[...lab.pictures].map(option));
    lab.chooser.value = state.get("lab.image");
    lab.controls.find(({ name }) => name === "lab.up").select.disabled = state.get("lab.input") === "same";
    lab.controls.find(({ name }) => name === "lab.down").select.disabled = state.get("lab.size") === "original";
    lab.arms.forEach((button, i) => button.setAttribute("aria-pressed", isArm(ARMS[i])));
  }

  function isArm({ size, input }) {
    const settings = Object.entries({ ...ARM, "lab.size": size, "lab.input": input });
    return settings.every(([name, value]) => state.get(name) === value);
  }

  function capital(text) {
    return text[0].toUpperCase() + text.slice(1);
  }

  function describe(lab, picture, original, steps) {
    const shape = ({ width, height }) => `${width} × ${height} px`;
    const chain = steps.map((step) => ` → ${shape(step)} by ${step.label}`).join("");
    lab.chain.textContent = `${shape(original)}${chain || " (not resized)"}.`;
    lab.tokens.textContent = `Tokens: ${PATCHES.map((patch) => countTokens(lab.model, patch)).join("; ")}.`;
    lab.credit.textContent = [picture.note, picture.credit, picture.license].filter(Boolean).join(" ");
  }

  function countTokens({ width, height }, patch) {
    const [columns, rows] = [Math.floor(width / patch), Math.floor(height / patch)];
    const isCut = columns * patch < width || rows * patch < height;
    const count = (columns * rows).toLocaleString("en");
    return `${count} with patches of ${patch} px (${columns} × ${rows}${isCut ? ", edge cut off" : ""})`;
  }

  // ---- where the reader looks

  function keepPlace(lab, { zoom, x, y }) {
    showScale(lab);
    const [percent, ...middle] = [zoom === "fit" ? 0 : zoom * 100, x, y].map((value) => Number(value.toFixed(4)));
    const at = zoom === "fit" ? zoom : [percent, ...middle].join(",");
    keepSoon(lab, "lab.at", at);
  }

  function keepWipe(lab, percent) {
    lab.view.setMode("wipe", percent);
    keepSoon(lab, "lab.wipe", percent);
  }

  /** Writes a value into the address once it has come to rest: a browser refuses an address that changes all the time. */
  function keepSoon(lab, name, value) {
    clearTimeout(lab.timers[name]);
    lab.timers[name] = setTimeout(() => state.set(name, value), 200);
  }

  function restorePlace(lab) {
    const [percent, x, y] = state.get("lab.at").split(",").map(Number);
    const place = state.get("lab.at") === "fit" ? { zoom: "fit" } : { zoom: percent / 100, x, y };
    lab.view.setPlace(place, { isReaders: false });
    showScale(lab);
  }

  function showScale(lab) {
    lab.scale.textContent = `The original is shown at ${Math.round(lab.view.zoom * 100)} %.`;
  }
})();
