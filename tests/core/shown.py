"""What a reader sees of a table."""

import io

from rich.console import Console


def show(renderable, width=200):
    """Renders to text; a rendering that is wider than the console would have been cut."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    text = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return text


def words(text):
    return " ".join(text.split())
