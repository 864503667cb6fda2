"""Writing a report: whole or not at all, and in the end in place of the older one."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from vitcmp.records import Record
from vitcmp.report.html import render_html
from vitcmp.report.payload import make_payload

STANDARD_OUTPUT = "-"


def write_text(out: str, text: str) -> None:
    """Writes UTF-8 to a file, or to standard output where `out` is `-`. Raises OSError.

    Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is written as its escape.
    """
    data = text.encode("utf-8", "backslashreplace")
    if out == STANDARD_OUTPUT:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    path = Path(out)
    if path.exists() and not path.is_file():  # such as /dev/null
        path.write_bytes(data)
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_report(console: Console, records: list[Record], folder: Path) -> None:
    """Writes report.html into the folder. One that fails costs a line on the screen: the records are what counts."""
    path = folder / "report.html"
    if not records:
        return
    failure = attempt(lambda: write_text(str(path), render_html(make_payload(records, name=folder.resolve().name))))
    line = f"The interactive report: {path}"
    if failure:
        line = f"No report was written to {path} ({failure}); the records are there: python -m vitcmp.report reads them"
    console.print(line, style="yellow" if failure else None, highlight=False, markup=False, soft_wrap=True)


def attempt(make: Callable[[], object]) -> str | None:
    """Calls `make`, and returns in one line why it failed: a report that does must not cost what was measured."""
    try:
        make()
    except Exception as error:  # noqa: BLE001
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
