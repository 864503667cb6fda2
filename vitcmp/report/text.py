"""Numbers as text, the unknown as a dash, and a table that stacks related columns where the screen is narrow."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vitcmp.parity import ParityResult

UNKNOWN = "–"
LONG_WORD = 15  # a longer one, such as max-autotune-no-cudagraphs, may be broken


def number(value: float | None, *, digits: int = 4, like: float | None = None) -> str:
    """Returns the value to so many digits and without an exponent, or to the decimals that `like` would get."""
    if value is None:
        return UNKNOWN
    size = float(f"{abs(value if like is None else like):.{digits}g}")  # 9.9999 is 10.00
    decimals = max(0, digits - 1 - math.floor(math.log10(size))) if size > 0 else 0
    return f"{value:.{decimals}f}"


def interval(low: float, high: float, *, like: float, digits: int = 4) -> str:
    return f"[{number(low, digits=digits, like=like)}, {number(high, digits=digits, like=like)}]"


def power(value: float) -> str:
    """Returns `3.1e-5`, or `0`."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def parity_detail(parity: ParityResult) -> str:
    """Returns `3.1e-2 > 1.2e-5`, or what is missing."""
    if parity.error is None or parity.bound is None:
        return parity.note
    return f"{power(parity.error)} {'<' if parity.status == 'equal' else '>'} {power(parity.bound)}"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{number(100 * share, digits=2)} %"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def model_name(name: str) -> str:
    """Breaks a model with many overrides into lines, and leaves a short one as it is."""
    return name if len(name) <= 22 else name.replace(":", ":\n").replace(",", ",\n")


def _escape(text: str) -> str:
    """Returns a cell of a Markdown table."""
    for character, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("\n", " ")):
        text = text.replace(character, escaped)
    return text


@dataclasses.dataclass(frozen=True)
class Column:
    key: str
    title: str
    is_number: bool = False
    is_wrapped: bool = False  # may be broken at spaces; everything else stays whole


Stacks = Sequence[Sequence[Column]]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A table in the widest of four forms that fits the screen: nothing is ever cut off.

    One line a row; the columns of each stack on top of each other; the same with the wrapped ones narrowed; a list.
    Stacked rows that agree in the columns of `sections` stand together.
    """

    title: str
    stacks: Stacks
    rows: Sequence[Mapping[str, str]]
    notes: Sequence[str] = ()
    sections: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        yield self._body(options.max_width)
        for note in self.notes:
            yield Text(note, style="dim")
        yield Text()

    def to_markdown(self) -> str:
        """Returns it with a line each row, the notes as a list below; without a line end."""
        columns = [column for stack in self.stacks for column in stack]
        rule = ["---:" if column.is_number else "---" for column in columns]
        cells = [[_escape(row[column.key]) for column in columns] for row in self.rows]
        lines = [f"| {' | '.join(row)} |" for row in ([column.title for column in columns], rule, *cells)]
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(filter(None, [f"**{self.title}**", "\n".join(lines), notes]))

    def _body(self, max_width: int) -> RenderableType:
        flat = [[column] for stack in self.stacks for column in stack]
        for stacks, gap, is_narrowed in ((flat, 2, False), (self.stacks, 2, False), (self.stacks, 1, True)):
            room = max_width - gap * (len(stacks) - 1)
            widths = self._widths(stacks, room if is_narrowed else math.inf)
            if sum(widths) <= room:
                return self._table(stacks, widths, gap)
        cells = ([f"{column.title}: {row[column.key]}".replace("\n", " ") for [column] in flat] for row in self.rows)
        return Text("\n\n".join("\n".join(cell) for cell in cells))

    def _widths(self, stacks: Stacks, room: float) -> list[int]:
        """Returns the width that each stack asks for, the wrapped ones narrowed towards their longest word to fit."""
        widths = [max(self._width(column) for column in stack) for stack in stacks]
        floors = [max(self._floor(column) for column in stack) for stack in stacks]
        while sum(widths) > room and widths != floors:
            widest = max(range(len(widths)), key=lambda i: (widths[i] > floors[i], widths[i]))
            widths[widest] -= 1
        return widths

    def _lines(self, column: Column) -> list[str]:
        return [line for text in (column.title, *(row[column.key] for row in self.rows)) for line in text.split("\n")]

    def _floor(self, column: Column) -> int:
        """Returns the width below which something would be broken that must stay whole."""
        words = (word for line in self._lines(column) for word in line.split())
        return (
            max((min(len(word), LONG_WORD) for word in words), default=0) if column.is_wrapped else self._width(column)
        )

    def _width(self, column: Column) -> int:
        return max(len(line) for line in self._lines(column))

    def _table(self, stacks: Stacks, widths: Sequence[int], gap: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
        for stack, width in zip(stacks, widths, strict=True):
            justify: JustifyMethod = "right" if all(column.is_number for column in stack) else "left"
            title = Text("\n".join(column.title for column in stack))
            table.add_column(title, justify=justify, overflow="fold", min_width=width, max_width=width)
        has_stacks = any(len(stack) > 1 for stack in stacks)
        for row, following in itertools.pairwise([*self.rows, {}]):
            cells = (Text("\n".join(row[column.key] for column in stack).rstrip()) for stack in stacks)
            is_last = any(row[key] != following.get(key) for key in self.sections)
            table.add_row(*cells, end_section=has_stacks and is_last)
        return table
