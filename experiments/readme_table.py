"""Which backbone is fastest here, and what does resolution gain it? Writes the README's tables from committed records.

Command: python -m experiments.readme_table experiments/results/<date>-<machine>      (a second)
         --check changes nothing, and ends with 1 where a table is not what its records give
Expected: the figures of the README are those of the records; running it twice changes nothing.
Inputs: folders of a sweep's records (`vitcmp.run`), or of the capacity experiment's, with those in folders below.
Outputs: README.md, between `<!-- results: begin FOLDER -->` and `<!-- results: end -->`; a begin without a folder takes
         the first one that is named. Several folders, each with its markers, are several tables.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments.capacity.analysis import splits_of
from experiments.capacity.reading import read_records
from experiments.capacity.tables import overview_table, to_markdown
from vitcmp.records import RecordStore
from vitcmp.report.markdown import named_folders, replace_table, results_table
from vitcmp.report.reading import Source
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
    source = Source(folder.name, path=folder)
    if not (capacity := read_records(folder, source)):
        return results_table(RecordStore(folder).load())
    if source.faults:
        raise ValueError(source.faults[0])
    return to_markdown(overview_table(splits_of(capacity)[0])) + "\n"


if __name__ == "__main__":
    start(main, takes_words=True)
