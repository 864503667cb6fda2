// Resolution or compute? The capacity experiment: what the arms reach, the split of the gain, and what it stands on.
"use strict";

vitcmp.section("capacity", (root, payload) => {
  const { element, select, check, state, capacity: parts } = vitcmp;
  const { capacity } = payload;
  const { groups } = capacity;
  const { tables, KEYS } = parts;

  const settings = parts.define(capacity);
  root.append(...introduction(), controls());
  part("All groups", () => tables.overview(capacity));
  part(
    "What each arm reaches",
    barsView,
    "Bars from 0: the mean over seeds with its 95 % interval over seeds and test examples. Points: the seeds. All of one model and framework, to one scale.",
  );
  part("Who gains what", splitView);
  part("Against compute", (width) =>
    withGroup((group) => (group.arms.length ? parts.flops(capacity, width) : nothingWell())),
  );
  part("Learning curves", (width) =>
    withGroup((group) => [...parts.curves(capacity, group, width), table(() => tables.curves(group))]),
  );
  part("Trained as one arm, tested as another", () => withGroup((group) => tables.cross(group)));
  part("The arms' cost", () =>
    withGroup((group) => [tables.arms(capacity, group), tables.failed(group), ...notes(group)]),
  );
  examplesPart();

  function introduction() {
    return [
      element(
        "p",
        {},
        "A model that is given larger images sees more, and computes more. Which of the two helps? PaliGemma's experiment (arXiv:2407.07726, section 5.7.1 and figure 9) tells them apart with one arm more: ",
        "low is trained on small images; down_up on the same small images enlarged, so it has low's information and high's compute; high on large images. ",
        "What down_up gains over low is capacity, what high gains over down_up is resolution. Here there is the fourth cell too: patch sees large images in larger patches, so it has high's information with low's number of tokens.",
      ),
      element(
        "p",
        {},
        "The paper says that where resolution matters at all, the gain is “split roughly equally” between the two. The article “On the speed of ViTs and CNNs” says that for ChartQA it is “almost entirely” capacity. ",
        "Below is what these runs say, with what they could have seen.",
      ),
    ];
  }

  function controls() {
    const distinct = (name) => vitcmp.distinct(groups, name);
    const choices = [
      select("capacity.dataset", "Data set", distinct("dataset")),
      select(
        "capacity.model",
        "Model",
        distinct("model").map((name) => [name, parts.modelLabel(capacity, name)]),
      ),
      select(
        "capacity.backend",
        "Framework",
        distinct("backend").map((name) => [name, parts.NAMES[name] ?? name]),
      ),
      settings.length > 1 ? select("capacity.setting", "Setting, where several differ", settings) : null,
      select(
        "capacity.metric",
        "Measure",
        Object.entries(parts.METRICS).map(([name, { title }]) => [name, title.toLowerCase()]),
      ),
      check("capacity.log", "logarithmic GFLOP and loss"),
      capacity.pairs.length ? check("capacity.both", "both frameworks' curves") : null,
      check("capacity.table", "numbers as tables"),
    ];
    return element("div", { class: "controls" }, ...choices.filter(Boolean));
  }

  /** Adds a heading, perhaps a note, and what is drawn anew with every choice. */
  function part(title, draw, note = null) {
    root.append(element("h3", {}, title));
    if (note) root.append(element("p", { class: "note" }, note));
    vitcmp.view(root, KEYS, (width) => [draw(width)].flat());
  }

  /** Draws of the chosen group, under its name; says what there is where the choice has none. */
  function withGroup(draw) {
    const group = parts.chosen(capacity);
    if (!group) return nothing();
    return [named(group), draw(group)].flat();
  }

  function named(group) {
    const list = parts.alike(capacity);
    const which = list.length > 1 ? `Setting ${list.indexOf(group) + 1} of ${list.length}: ` : "";
    return element("p", { class: "note capacity-group" }, `${which}${parts.title(capacity, group)}`);
  }

  function nothing() {
    const here = parts.matching(capacity, ["dataset"]);
    const has = here.map(
      (group) => `${parts.modelLabel(capacity, group.model)} in ${parts.NAMES[group.backend] ?? group.backend}`,
    );
    return element(
      "p",
      { class: "empty" },
      `Nothing was trained with these choices. On ${state.get("capacity.dataset")} there is: ${[...new Set(has)].join("; ")}.`,
    );
  }

  function nothingWell() {
    return element("p", { class: "empty" }, "No run of this group went well; what happened is listed below.");
  }

  function table(make) {
    return parts.isOn("table") ? make() : null;
  }

  function barsView(width) {
    if (!parts.matching(capacity, ["model", "backend"]).length) return nothing();
    const group = parts.chosen(capacity);
    return [parts.everyDataset(capacity, width), group?.arms.length ? table(() => tables.bars(group)) : null];
  }

  function splitView(width) {
    return withGroup((group) => {
      const split = parts.split(group);
      if (!split) return nothingWell();
      const drawn = split.gains.length
        ? [parts.gains(capacity, group, width)]
        : [element("p", { class: "empty" }, "No two arms have a seed in common, so nothing can be compared.")];
      return [...drawn, ...tables.words(capacity, group), table(() => tables.gains(capacity, group))];
    });
  }

  function notes(group) {
    const lines = [...group.notes, ...capacity.notes].map((note) => element("li", {}, note));
    const facts = group.facts.map(([name, text]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, text)),
    );
    return [
      lines.length ? element("ul", { class: "note capacity-notes" }, ...lines) : null,
      element(
        "details",
        {},
        element("summary", {}, "What all runs of this group share"),
        element(
          "div",
          { class: "scroll", tabindex: "0", role: "region", "aria-label": "What all runs share" },
          element("table", { class: "facts" }, element("tbody", {}, ...facts)),
        ),
      ),
    ];
  }

  function examplesPart() {
    root.append(
      element("h3", {}, "What the arms saw"),
      element(
        "p",
        { class: "note" },
        "Test examples with the very pixels that each arm was given, enlarged without smoothing. Chosen by who got them right, the most contrasting first. The records say who was right, not what was answered instead.",
      ),
      element(
        "div",
        { class: "controls" },
        select("capacity.kind", "Examples that", [
          ["only high", "only high gets right"],
          ["patch and high", "only patch and high get right"],
          ["all", "all get right"],
          ["none", "none gets right"],
        ]),
      ),
    );
    vitcmp.view(root, KEYS, () => withGroup((group) => parts.examples(capacity, group)));
  }
});
