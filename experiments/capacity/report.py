"""Makes the page of the capacity experiment, with what sweeps measured where their folders are named too.

  python -m experiments.capacity.report results/capacity                     report.html, one file that holds everything
  python -m experiments.capacity.report results/capacity results --out all.html      one page of both kinds of records

What is named is a folder of records (*.jsonl, and below it) or one such file. Nothing is trained, no data set is
opened; the examples shown are those that `python -m experiments.capacity` stored in examples.json beside its records.
A record that is not a good one is left out, with a line that says where it stands and why. Exit codes: 0, and 2 for bad
usage.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.capacity.output import payload_of_folders
from experiments.capacity.page import TITLE
from vitcmp.report.html import render_html
from vitcmp.report.output import STANDARD_OUTPUT, write_text
from vitcmp.report.payload import MAX_FAULTS
from vitcmp.report.payload import TITLE as SWEEP_TITLE
from vitcmp.usage import start

flags.DEFINE_string("out", "report.html", "The file to write, or - for standard output.")
flags.DEFINE_string("title", None, f"What the page is called; without it, {TITLE} or {SWEEP_TITLE}")
FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> int:
    check_out(FLAGS.out, argv[1:])
    payload = payload_of_folders(argv[1:], title=FLAGS.title)
    for fault in faults_of(payload):
        print(fault, file=sys.stderr)
    text = render_html(payload)
    try:
        write_text(FLAGS.out, text)
    except OSError as error:
        raise ValueError(f"--out={FLAGS.out} cannot be written: {error.strerror}") from error
    if FLAGS.out != STANDARD_OUTPUT:
        num = sum(source["num_records"] for source in payload["sources"])
        print(f"{FLAGS.out}: {num:,} record{'' if num == 1 else 's'}, {len(text) / 1e6:.1f} MB")
    return 0


def check_out(out: str, words: Sequence[str]) -> None:
    """Raises ValueError where the report would be written over what it is made of, or into no folder."""
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--out={out} must be a file in a folder that is there, or - for standard output")
    if path.suffix in (".jsonl", ".json") or path.resolve() in [Path(word).resolve() for word in words]:
        raise ValueError(f"--out={out} would be written over records")


def faults_of(payload: dict[str, Any]) -> list[str]:
    faults = [f"{source['name']}: {fault}" for source in payload["sources"] for fault in source["faults"]]
    return faults[:MAX_FAULTS]


if __name__ == "__main__":
    start(main, takes_words=True)
