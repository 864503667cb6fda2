"""Writing a report: whole or not at all, and in the end in place of the older one."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitcmp.report.html import render_html

STANDARD_OUTPUT = "-"


def write_html(path: Path, payload: Mapping[str, Any]) -> None:
    """Writes the interactive report."""
    write_text(str(path), render_html(payload))


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
