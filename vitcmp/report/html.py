"""The interactive report: one HTML file that holds everything, from records alone; equal records give equal bytes."""

import base64
import html
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

from vitcmp.report.packing import packed

# In the order in which they run: the ground, the libraries, what the sections share, the sections.
SCRIPTS = (
    "core.js",
    "vendor/d3.min.js",
    "vendor/plot.umd.min.js",
    "common.js",
    "controls.js",
    "charts.js",
    "tables.js",
    "header.js",
    "speed.js",
    "flops.js",
    "frameworks.js",
    "knobs.js",
    "crossovers.js",
    "choose.js",
    "vitdet_model.js",
    "vitdet_grid.js",
    "vitdet.js",
    "resample.js",
    "lab_text.js",
    "lab_pictures.js",
    "lab_view.js",
    "lab.js",
    "capacity_common.js",
    "capacity_charts.js",
    "capacity_curves.js",
    "capacity_tables.js",
    "capacity_examples.js",
    "capacity.js",
    "method.js",
)
STYLES = ("page.css", "charts.css", "vitdet.css", "lab.css", "capacity.css")
# What shows records of a sweep, and nothing else: on a page of the capacity experiment alone they would be empty.
OF_A_SWEEP = ("speed", "flops", "frameworks", "knobs", "crossovers", "choose", "method")
# What ends a script or a line in HTML or JavaScript, and halves of surrogate pairs, which UTF-8 cannot hold.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
ASSETS = importlib.resources.files("vitcmp.report") / "assets"


def render_html(payload: Mapping[str, Any]) -> str:
    """Returns the page. `payload` is what `vitcmp.report.payload.make_payload` returns."""
    parts = {
        "styles": "\n".join(_read(name) for name in STYLES),
        "payload": _json(packed(payload)),
        "lab-images": _json(_lab_images()),
        "scripts": "\n".join(_script(name) for name in SCRIPTS),
    }
    page = _without(_read("page.html"), _absent(payload))
    for name, text in parts.items():
        before, after = page.split(f"<!-- vitcmp:{name} -->")
        page = before + text + after
    return page


def _absent(payload: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the sections that the page does not have."""
    if not payload.get("capacity"):
        return ("capacity",)
    return () if payload["settings"]["model"]["index"] else OF_A_SWEEP


def _without(page: str, sections: tuple[str, ...]) -> str:
    """Returns page.html without these sections, each of which is one line of it."""
    for name in sections:
        page = re.sub(f'<section id="{name}".*</section>\n', "", page)
    return page


def _read(name: str) -> str:
    path = ASSETS / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _script(name: str) -> str:
    text = _read(name)
    if re.search("</script|<!--", text, re.IGNORECASE):
        raise ValueError(f"{name} has what ends the script that it is put into, or hides its end")
    return f"<script>\n// {html.escape(name)}\n{text}</script>"  # its own, so that one that is broken stops no other


def _json(value: Any) -> str:
    """Returns JSON that no parser of HTML can leave: `<` is `\\u003c`, and so on."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _lab_images() -> list[dict[str, str]]:
    """Returns what images/index.json lists, each with its file as a data: address."""
    index = ASSETS / "images" / "index.json"
    images = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else []
    for image in images:
        data = base64.b64encode((ASSETS / "images" / image["file"]).read_bytes()).decode()
        image["src"] = f"data:image/{image['file'].rpartition('.')[2]};base64,{data}"
    return images
