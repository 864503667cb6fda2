"""Which backbone is fastest here, and what does resolution gain it? Writes the README's tables from committed records.

Command: python -m experiments.readme_table experiments/results/<date>-<machine>      (a second)
         --check changes nothing, and ends with 1 where a table is not what its records give
Expected: the figures of the README are those of the records; running it twice changes nothing.
Inputs: folders of a sweep's records (`vitcmp.run`), of experiments/capacity's or of experiments/peers.py's, with those
         in folders below.
Outputs: README.md, between `<!-- results: begin FOLDER -->` and `<!-- results: end -->`; a begin without a folder takes
         the first one that is named. Several folders, each with its markers, are several tables.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import pairs
from experiments.capacity import schema as capacity
from experiments.capacity.analysis import splits_of
from experiments.capacity.tables import overview_table
from experiments.peer_models.summary import summary_table
from vitcmp.records import RecordStore
from vitcmp.report.markdown import named_folders, replace_table, results_table
from vitcmp.usage import start

flags.DEFINE_string("readme", "README.md", "The file that holds the markers; folders are written relative to its own.")
flags.DEFINE_boolean("check", False, "Change nothing; end with 1 where a table is not what its records give.")
FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> int:
    readme = Path(FLAGS.readme)
    text = written = readme.read_text(encoding="utf-8")
    for folder in (folders := [relative(folder, readme) for folder in argv[1:]] or named_folders(text)):
        written = replace_table(written, folder, render(readme.parent / folder))
    if FLAGS.check:
        print(f"{readme}: {'up to date' if written == text else 'not what its records give'}")
        return int(written != text)
    readme.write_text(written, encoding="utf-8")
    print(f"{readme}: wrote {', '.join(folders) or 'nothing, it names no folder'}")
    return 0


def relative(folder: str, readme: Path) -> str:
    """Returns the folder as the page's markers name it. Raises ValueError where it is not under the page's."""
    return Path(folder).resolve().relative_to(readme.resolve().parent).as_posix()


def render(folder: Path) -> str:
    """Returns the table of a folder of records. Raises ValueError (RecordError) for a bad record, or for none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of records")
    kind = kind_of(folder)
    if kind == capacity.SCHEMA:
        runs = RecordStore(folder, schema=kind, validate=capacity.validate).load()
        return overview_table(splits_of(runs)[0]).to_markdown() + "\n"
    if kind == pairs.SCHEMA:
        return summary_table(RecordStore(folder, schema=kind, validate=pairs.validate).load()).to_markdown() + "\n"
    return results_table(RecordStore(folder).load())


def kind_of(folder: Path) -> str | None:
    """Returns the schema of the first record in a folder and below it; None where it has none."""
    for path in sorted(folder.rglob("*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            if match := re.match(r'{"schema":"([^"]*)"', file.readline()):
                return match[1]
    return None


if __name__ == "__main__":
    start(main, takes_words=True)
