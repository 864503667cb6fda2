"""Tables on screen."""

from collections.abc import Callable, Sequence

from rich.console import Console

from vitcmp.records import Record


def print_report(console: Console, records: Sequence[Record], *, log_of: Callable[[Record], str] | None = None) -> None:
    """Prints every table that the records give."""
