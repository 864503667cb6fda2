"""The settings of a report as CSV: one row each, the unit in the header's name, an empty cell for the unknown."""

import csv
import io
import re
import unicodedata

from vitcmp.report.payload import Payload, rows_of
from vitcmp.report.rows import NUMBERS, TEXTS

# What a column is called where its name in the payload does not say what it counts.
NAMES = {
    "image_size": "image_size_px",
    "height": "height_px",
    "width": "width_px",
    "batch_size": "batch_size_images",
    "params": "num_params",
    "image_flops": "forward_flops_per_image",
    "step_flops": "flops_per_step",
    "call_s": "queued_call_s",
    "call_low_s": "queued_call_low_s",
    "call_high_s": "queued_call_high_s",
    "peak_share": "share_of_peak_flops",
    "others_cpu_share": "share_of_cpu_used_by_others",
}
FORMULA_STARTS = "=+-@|%"
INNER_FORMULA = re.compile(r"([;,]\s*)(?=[=+\-@|%＝＋－＠])")


def csv_table(payload: Payload) -> str:
    """Returns the settings of a payload; `images_per_s` is what queued calls make."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(NAMES.get(name, name) for name in (*TEXTS, *NUMBERS)), "images_per_s"])
    for row in rows_of(payload):
        images_per_s = row["batch_size"] / row["call_s"] if row["call_s"] else None
        writer.writerow([_cell(value) for value in (*row.values(), images_per_s)])
    return text.getvalue()


def _cell(value: str | float | None) -> str | float | None:
    """Returns the cell as a spreadsheet may have it: a text that it would take for a formula gets an apostrophe.

    Texts are other people's: a model's name or an error may begin as `=HYPERLINK(`, or do so after what another country
    separates cells with. Blanks and marks that are not seen do not count, and a full-width `＝` is a `=`.
    """
    if not isinstance(value, str):
        return float(f"{value:.5g}") if isinstance(value, float) else value
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in value)
    seen = (c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] not in "CZ")
    text = INNER_FORMULA.sub(r"\1'", text)
    return f"'{text}" if next(seen, "x") in FORMULA_STARTS else text
