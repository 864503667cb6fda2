"""Makes a report from records: an interactive page, a Markdown table, or CSV. Records are only read.

  python -m vitcmp.report results                             report.html, one file that holds everything
  python -m vitcmp.report results-a results-b --out both.html  two machines side by side, never compared
  python -m vitcmp.report results --format csv --out -         one row a setting, on standard output

What is named is a folder of records (*.jsonl, and below it), one such file, or the article's results.json. A record
that is not a good one is left out, with a line that says where it stands and why. Exit codes: 0, and 2 for bad usage.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vitcmp.report.csv_table import csv_table
from vitcmp.report.html import render_html
from vitcmp.report.markdown import harmless, results_table
from vitcmp.report.output import STANDARD_OUTPUT, write_text
from vitcmp.report.payload import TITLE, payload_of
from vitcmp.report.reading import ARTICLE_FILE, Source, read_sources
from vitcmp.report.words import first_of, plural
from vitcmp.usage import start

SUFFIXES = {"html": ".html", "markdown": ".md", "csv": ".csv"}
MAX_FAULTS = 10

flags.DEFINE_enum("format", "html", list(SUFFIXES), f"What to make: {', '.join(SUFFIXES)}.")
flags.DEFINE_string("out", None, "The file to write, or - for standard output; without it, report.html, .md or .csv.")
flags.DEFINE_string("title", TITLE, "What the page is called.")
FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> int:
    out = f"report{SUFFIXES[FLAGS.format]}" if FLAGS.out is None else FLAGS.out
    check_out(out, argv[1:])
    sources = read_sources(argv[1:])
    for line in faults_of(sources):
        print(line, file=sys.stderr)
    text = render(sources, FLAGS.format)
    try:
        write_text(out, text)
    except OSError as error:
        raise ValueError(f"--out={out} cannot be written: {error.strerror}") from error
    if out != STANDARD_OUTPUT:
        print(f"{out}: {plural(sum(len(s.records) + len(s.article) for s in sources), 'record')}, {size(text)}")
    return 0


def check_out(out: str, words: Sequence[str]) -> None:
    """Raises ValueError where the report would be written over what it is made of, or into no folder."""
    if Path(out).is_dir() or not Path(out).parent.is_dir():
        raise ValueError(f"--out={out} must be a file in a folder that is there, or - for standard output")
    is_input = Path(out).resolve() in [Path(word).resolve() for word in words]
    if is_input or Path(out).suffix == ".jsonl" or Path(out).name == ARTICLE_FILE:
        raise ValueError(f"--out={out} would be written over records")


def faults_of(sources: Sequence[Source]) -> list[str]:
    """Returns the first faults, a line each, and how many more there are."""
    faults = [f"{source.name}: {fault}" for source in sources for fault in source.faults]
    lines = ("".join(c if c.isprintable() else "?" for c in line) for line in first_of(faults, MAX_FAULTS))
    return list(lines)


def render(sources: Sequence[Source], format: str) -> str:
    if format == "markdown":
        return markdown(sources)
    payload = payload_of(sources, title=FLAGS.title)
    return csv_table(payload) if format == "csv" else render_html(payload)


def markdown(sources: Sequence[Source]) -> str:
    """Returns the table of each source, under its name where there are several. The article's rows are in none."""
    ours = [source for source in sources if source.records]
    shown = [source for source in ours if any(record["latency"] for record in source.records)] or ours
    if not shown:
        raise ValueError("--format=markdown shows vitcmp's records only, and there are none")
    heads = [f"## {harmless(source.name)}\n\n" if len(shown) > 1 else "" for source in shown]
    return "\n".join(head + results_table(source.records) for head, source in zip(heads, shown, strict=True))


def size(text: str) -> str:
    return f"{len(text) / 1e6:.1f} MB"


if __name__ == "__main__":
    start(main, takes_words=True)
