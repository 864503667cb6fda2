// The capacity experiment's test examples: as each arm saw them, and who got them right.
"use strict";

(() => {
  const { state, element } = vitcmp;
  const SAID = {
    "only high": "high alone gets right",
    "patch and high": "patch and high get right, low and down_up do not",
    all: "every arm gets right",
    none: "no arm gets right",
  };

  /** Makes a card for each stored example of the chosen kind. */
  function examples(capacity, group) {
    const name = state.get("capacity.kind");
    const kind = group.kinds.find((one) => one.kind === name);
    if (!kind) return [element("p", { class: "empty" }, "No run went well, so nobody got anything right.")];
    const most = d3.max(group.arms, (arm) => arm.num_examples);
    const head = element(
      "p",
      { class: "note" },
      `${vitcmp.plural(kind.count, "test example")} of ${most.toLocaleString("en")} that ${SAID[name]}, by the majority of the seeds.${luck(name, group)}`,
    );
    const cards = kind.examples.map((example) => card(capacity, group, example));
    return [head, cards.length ? element("div", { class: "capacity-cards" }, ...cards) : nothing(kind, group)];
  }

  /** Says how many examples each other arm alone gets right: low sees least, so what it alone gets right is luck. */
  function luck(name, { alone }) {
    const others = Object.entries(alone).filter(([arm]) => arm !== "high");
    if (name !== "only high" || !others.length) return "";
    return ` For scale, examples that another arm alone gets right: ${others.map(([arm, count]) => `${arm} ${count}`).join(", ")}.`;
  }

  function nothing(kind, group) {
    const text = !kind.count
      ? "There is none."
      : group.has_pixels
        ? "The pixels of none of them are stored."
        : "Their pixels are not stored: there is no examples.json beside the records, or not of this group. python -m experiments.capacity writes it at its end.";
    return element("p", { class: "empty" }, text);
  }

  function card(capacity, group, example) {
    const seeds = new Map(group.arms.map((arm) => [arm.arm, arm.seeds.length]));
    const pictures = Object.entries(example.pictures).map(([arm, name]) => {
      const side = capacity.arms.find((one) => one.name === arm);
      const num = seeds.get(arm);
      const right = num === undefined ? "not trained" : rightText(Math.round(example.right[arm] * num), num);
      const px = arm === "down_up" ? `${group.low} → ${group.high} px` : `${group[side.information]} px`;
      const src = `data:image/png;base64,${capacity.pictures[name]}`;
      const alt = `Test example ${example.index} as ${arm} sees it, ${px}: ${right}`;
      const said = element("figcaption", {}, element("strong", {}, arm), ` ${px}`, element("br"), right);
      return element("figure", { "data-arm": arm }, element("img", { src, alt, width: "128", height: "128" }), said);
    });
    const title = element(
      "h4",
      {},
      `Answer: ${example.answer}`,
      element("span", { class: "note" }, ` test example ${example.index}`),
    );
    return element(
      "article",
      { class: "capacity-card" },
      title,
      element("div", { class: "capacity-pictures" }, ...pictures),
    );
  }

  function rightText(right, num) {
    if (num === 1) return right ? "✓ right" : "✗ wrong";
    return `${2 * right > num ? "✓" : "✗"} right in ${right} of ${num} seeds`;
  }

  Object.assign(vitcmp.capacity, { examples });
})();
