// The figures as tables on the page, and as CSV to take away.
"use strict";

(() => {
  const { element } = vitcmp;

  /** Makes a table; `columns` are {title, text: (row) => text, isNumber}. Long ones show first rows and a button. */
  function table(columns, list, { caption, limit = 200 } = {}) {
    const head = element(
      "tr",
      {},
      ...columns.map(({ title, isNumber }) =>
        element("th", { scope: "col", class: isNumber ? "number" : null }, title),
      ),
    );
    const body = element("tbody", {}, ...list.slice(0, limit).map((row) => tableRow(columns, row)));
    const node = element(
      "table",
      {},
      caption ? element("caption", {}, caption) : null,
      element("thead", {}, head),
      body,
    );
    const rest = list.slice(limit);
    const more = () => {
      body.append(...rest.map((row) => tableRow(columns, row)));
      button.remove();
    };
    const button = rest.length
      ? element("button", { type: "button", onclick: more }, `Show the other ${vitcmp.plural(rest.length, "row")}`)
      : null;
    return element(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": caption ?? "Table" },
      node,
      button,
    );
  }

  function tableRow(columns, row) {
    return element(
      "tr",
      {},
      ...columns.map(({ text, isNumber }) =>
        element("td", { class: isNumber ? "number" : null }, ...breakable(text(row) ?? "–")),
      ),
    );
  }

  /** Returns text that a narrow column may break after commas too, as in `vit_b16:pool=gap,gelu=tanh`, but not in 1,024. */
  function breakable(text) {
    const parts = typeof text === "string" ? text.split(/(?<=,)(?=[a-z])/) : [text];
    return parts.flatMap((part, i) => (i ? [element("wbr"), part] : [part]));
  }

  /** Returns CSV; a text that a spreadsheet would take for a formula gets an apostrophe before it. */
  function csv(head, list) {
    return [head, ...list].map((cells) => cells.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  function cell(value) {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = harmless(String(value));
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  /** Does what vitcmp/report/csv_table.py does: texts are other people's, and marks that are not seen do not count. */
  function harmless(value) {
    const text = value.replace(/[\p{Cc}\p{Zl}\p{Zp}]/gu, " ").replace(/([;,]\s*)(?=[=+\-@|%＝＋－＠])/gu, "$1'");
    return /^[\p{C}\p{Z}]*[=+\-@|%]/u.test(text.normalize("NFKC")) ? `'${text}` : text;
  }

  /** Hands a text to the reader as a file. */
  function download(name, text) {
    const address = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    element("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  Object.assign(vitcmp, { table, csv, download });
})();
