// The head of the page: what was measured, what was left out, what follows from it in one sentence each, the contents.
"use strict";

vitcmp.section("top", (root, payload) => {
  const { element, METRICS } = vitcmp;
  const rows = vitcmp.rows(payload);
  const ours = rows.filter((row) => !vitcmp.isOfArticle(row));
  const QUESTION =
    "Which vision backbone is fastest, and which needs least memory, at which image size, batch and device? " +
    "Is JAX or PyTorch faster, and is it the same model? ";

  vitcmp.share(payload);
  document.title = payload.title;
  root.append(
    ...[element("h1", {}, payload.title), measured(), answers(), contents(), sources()].filter(Boolean),
  );

  function measured() {
    if (!rows.length && payload.capacity) return element("p", { class: "lead" }, payload.capacity.lead);
    const timed = vitcmp.plural(ours.filter(vitcmp.isTimed).length, "setting");
    const models = vitcmp.plural(vitcmp.distinct(ours, "model").length, "model");
    const devices = vitcmp.list(vitcmp.distinct(ours, "device"));
    const where = [devices && `on ${devices}`, versions().length && `with ${vitcmp.list(versions())}`].filter(Boolean);
    const text = ours.length ? `${timed} of ${models} measured ${where.join(", ")}.` : nothing();
    const failed = ours.filter((row) => row.status !== "ok");
    const lost = `${vitcmp.plural(failed.length, "setting")} did not run, but are shown: ${vitcmp.failures(failed)}.`;
    return element("p", { class: "lead" }, QUESTION, text, failed.length ? ` ${lost}` : "");
  }

  function nothing() {
    return rows.length ? "There are rows of the article's only, and none of vitcmp's." : "No record is shown.";
  }

  function versions() {
    const groups = d3.groups(ours, (row) => row.backend).filter(([name]) => name);
    return groups.map(
      ([name, group]) => `${name} ${vitcmp.list(vitcmp.distinct(group, "framework_version").map(short))}`,
    );
  }

  function short(version) {
    return version.split(" ")[0];
  }

  // Answers. Each says on what it stands, and nothing is said that the intervals do not carry.

  function answers() {
    const devices = vitcmp.distinct(ours.filter(vitcmp.isTimed), "device");
    return devices.length ? element("div", { class: "answers" }, ...devices.map(answersOf)) : null;
  }

  function answersOf(device) {
    const found = common(device);
    const texts = [fastest(found), leanest(found), ...crossings(device), frameworks(device)].filter(Boolean);
    const items = texts.map((text) => element("li", {}, text));
    return element("div", {}, element("h2", {}, device), element("ul", {}, ...items));
  }

  /** Returns the best row of each model at the smallest batch, and at 224 px or else the size that most models have. */
  function common(device) {
    const here = ours.filter((row) => row.device === device && row.mode === "forward" && vitcmp.isTimed(row));
    const batch = d3.min(here, (row) => row.batch_size);
    const small = here.filter((row) => row.batch_size === batch);
    const groups = d3.groups(small, (row) => row.image_size);
    const counts = new Map(groups.map(([size, group]) => [size, vitcmp.distinct(group, "model").length]));
    const size = counts.get("224") === d3.max(counts.values()) ? "224" : d3.greatest(counts, ([, count]) => count)?.[0];
    const rowsOf = small.filter((row) => row.image_size === size);
    const bests = [...vitcmp.best(rowsOf, (row) => row.model).values()].map(({ row }) => row);
    return { size, batch, bests: d3.sort(bests, (row) => row.latency_s) };
  }

  function fastest({ size, batch, bests }) {
    const [first, second] = bests;
    if (!second) return null;
    const say = (row) => vitcmp.figureText(METRICS.latency, row);
    const isSure = second.latency_low_s > 1.03 * first.latency_high_s;
    const rest = isSure
      ? `${second.model} comes next with ${say(second)}`
      : `${second.model} is not told apart from it`;
    const who = `${first.model} has the lowest latency, ${say(first)} (${vitcmp.setting(first)})`;
    return `Forward, ${size} px, batch ${batch}: of ${vitcmp.plural(bests.length, "model")}, ${who}; ${rest}.`;
  }

  function leanest({ bests }) {
    const known = bests.filter((row) => row.activation_peak_bytes !== null);
    const ordered = d3.sort(known, (row) => row.activation_peak_bytes);
    if (ordered.length < 2) return null;
    const say = (row) => `${row.model}, ${vitcmp.figureText(METRICS.activations, row)}`;
    const [least, most] = [ordered[0], ordered.at(-1)].map(say);
    return `At those fastest settings the activation peak is least for ${least}, and most for ${most}.`;
  }

  /** Says where a plain ViT and a network without attention cross, each at its fastest: what the article asks. */
  function crossings(device) {
    const here = payload.crossovers.filter((c) => c.device === device && c.backend === "best" && c.mode === "forward");
    const batch = d3.min(here, (c) => c.batch_size);
    const isPlain = (name) => vitcmp.models(payload).get(name)?.family === "vit";
    const asked = here.filter((c) => c.batch_size === batch && isPlain(c.a) !== isPlain(c.b));
    const crossing = asked.filter((c) => c.status === "crosses").slice(0, 3);
    const say = (c) => `${c.a} overtakes ${c.b} between ${vitcmp.px(c.low_px)} and ${vitcmp.px(c.high_px)} px`;
    if (crossing.length) return [`Forward, batch ${batch}: ${crossing.map(say).join("; ")}.`];
    return asked.length
      ? [`Forward, batch ${batch}: no ViT is seen to cross a model of another family in the measured range.`]
      : [];
  }

  function frameworks(device) {
    const here = payload.comparisons.filter((c) => c.device === device);
    const refused = here.filter((c) => !c.ratio).length;
    if (!here.length) return null;
    const verdicts = d3.groups(
      here.filter((c) => c.ratio),
      (c) => c.ratio.verdict,
    );
    const words = verdicts.map(([verdict, group]) => `${verdict} in ${group.length}`).join(", ");
    const rest = refused ? `Refused, because the outputs are not proved equal: ${refused}.` : "None was refused.";
    const count = vitcmp.plural(here.length - refused, "comparison");
    return `JAX against torch, of ${count} whose outputs are equal: ${words || "none"}. ${rest}`;
  }

  // Contents and sources.

  function contents() {
    const links = [...document.querySelectorAll("main > section")].map((part) => {
      const title = part.querySelector("h2");
      title.setAttribute("tabindex", "-1");
      return element(
        "li",
        {},
        element("a", { href: `#${part.id}`, onclick: (event) => go(event, part, title) }, title.textContent),
      );
    });
    return element("nav", { "aria-label": "Contents" }, element("ol", {}, ...links));
  }

  /** Scrolls without a word to the address, which holds the values of the controls. */
  function go(event, part, title) {
    event.preventDefault();
    vitcmp.drawAbove(part);
    part.scrollIntoView();
    title.focus({ preventScroll: true });
  }

  function sources() {
    const numLost = d3.sum(payload.sources, (source) => source.left_out);
    const lost = numLost ? `, ${vitcmp.plural(numLost, "record")} left out` : "";
    const title = `${vitcmp.plural(payload.sources.length, "source")}, ${vitcmp.plural(
      d3.sum(payload.sources, (source) => source.num_records),
      "record",
    )}${lost}`;
    return element(
      "details",
      { class: "sources", open: numLost > 0 },
      element("summary", {}, title),
      element("ul", {}, ...payload.sources.map(source)),
    );
  }

  function source({ name, num_records: count, left_out: lost, faults }) {
    const left = lost ? `; ${vitcmp.plural(lost, "record")} left out:` : "";
    const text = `${name}: ${vitcmp.plural(count, "record")}${left}`;
    const list = faults.map((fault) => element("li", {}, fault));
    return element("li", {}, text, list.length ? element("ul", { class: "note" }, ...list) : null);
  }
});
