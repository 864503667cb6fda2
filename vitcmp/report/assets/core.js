// The page's ground: sections, the state that lives in the address, and small helpers. Loaded first.
"use strict";

const vitcmp = (() => {
  const sections = [];
  const settings = new Map(); // name of a control -> {initial, allowed, listeners}
  let values = {};

  /** Registers a section: `draw(root, payload)` is called once, with the section's element, when the page is ready. */
  function section(id, draw) {
    sections.push({ id, draw });
  }

  const state = {
    /** Declares a control's value. `allowed`: null for any text, an array of texts, or a function text -> boolean. */
    define(name, initial, allowed = null) {
      settings.set(name, { initial: String(initial), allowed, listeners: settings.get(name)?.listeners ?? [] });
    },
    /** Returns the value, always a text; what the address asks for and is not allowed counts as not given. */
    get(name) {
      const { initial, allowed } = settings.get(name);
      const value = values[name];
      if (value === undefined) return initial;
      const fits = allowed === null || (Array.isArray(allowed) ? allowed.includes(value) : allowed(value));
      return fits ? value : initial;
    },
    /** Sets a value, writes the address, and tells those who listen. */
    set(name, value) {
      const before = state.get(name);
      values[name] = String(value);
      writeAddress();
      if (state.get(name) !== before) notify([name]);
    },
    /** Calls `listener()` after any of the names has changed. */
    onChange(names, listener) {
      for (const name of names) settings.get(name).listeners.push(listener);
    },
  };

  function readAddress() {
    return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  }

  function writeAddress() {
    const changed = [...settings].filter(
      ([name, { initial }]) => values[name] !== undefined && values[name] !== initial,
    );
    const unknown = Object.entries(values).filter(([name]) => !settings.has(name));
    const query = new URLSearchParams([...changed.map(([name]) => [name, values[name]]), ...unknown]);
    history.replaceState(null, "", query.size ? `#${query}` : location.pathname + location.search);
  }

  /** Says whether the address names a section (`#speed`), and not the values of controls (`#batch=8`). */
  function isAnchor() {
    return location.hash.length > 1 && !location.hash.includes("=");
  }

  function notify(names) {
    for (const listener of new Set(names.flatMap((name) => settings.get(name).listeners))) listener();
  }

  /** Makes an element: `element("p", {class: "note", onclick: f}, "text", child)`. Text is text, never markup. */
  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (typeof value === "boolean") node.toggleAttribute(name, value);
      else if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  /** Draws one section. One that fails says so in its place and leaves the others alone. */
  function open({ id, draw }, payload) {
    const root = document.getElementById(id);
    if (!root) return; // a page has only the sections of which it has data
    try {
      draw(root, payload);
    } catch (error) {
      root.append(element("p", { class: "warning", role: "alert" }, `This part could not be drawn: ${error.message}`));
      console.error(error);
    }
  }

  /** Takes what the address now says; a link to a section has scrolled there already, and leaves the values. */
  function followAddress() {
    if (isAnchor()) return writeAddress();
    const before = new Map([...settings.keys()].map((name) => [name, state.get(name)]));
    values = readAddress();
    notify([...settings.keys()].filter((name) => state.get(name) !== before.get(name)));
  }

  /** Undoes vitcmp/report/packing.py: gives tables as lists of objects, and the settings as plain columns. */
  function unpack(payload) {
    const columns = Object.entries(payload.settings).map(([name, column]) => [name, plain(column)]);
    const tables = Object.entries(payload).map(([name, value]) => [name, value?.columns ? objects(value) : value]);
    return { ...Object.fromEntries(tables), settings: Object.fromEntries(columns) };
  }

  function plain(column) {
    if (Array.isArray(column)) return column;
    if (column.runs) return column.runs.flatMap((value, i) => Array(column.lengths[i]).fill(value));
    if (column.index) return column.index.map((i) => column.values[i]);
    const known = objects(column).values();
    return plain(column.has).map((has) => (has ? known.next().value : null));
  }

  function objects({ count, columns }) {
    const named = Object.entries(columns).map(([name, column]) => [name, plain(column)]);
    return Array.from({ length: count }, (_, i) => Object.fromEntries(named.map(([name, list]) => [name, list[i]])));
  }

  /** Says where a section would be whose script did not run. */
  function missing() {
    const made = new Set(sections.map(({ id }) => id));
    const text = "This part could not be drawn: its script did not run.";
    for (const root of document.querySelectorAll("main > section")) {
      if (!made.has(root.id)) root.append(element("p", { class: "warning", role: "alert" }, text));
    }
  }

  /** Leads to the section that the address names: the browser did so while the page was empty. */
  function lead(part) {
    if (!part) return;
    vitcmp.drawAbove?.(part);
    part.scrollIntoView({ behavior: "instant" });
  }

  function start() {
    values = isAnchor() ? {} : readAddress();
    const payload = unpack(JSON.parse(document.getElementById("payload").textContent));
    document.title = payload.title;
    for (const part of sections) open(part, payload);
    missing();
    if (isAnchor()) lead(document.getElementById(location.hash.slice(1)));
    addEventListener("hashchange", followAddress);
    document.documentElement.dataset.ready = "true"; // what tests wait for
  }

  document.addEventListener("DOMContentLoaded", start);
  return { section, state, element };
})();
