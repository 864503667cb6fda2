"""How an experiment takes its command line: what is wrong with it is one message and exit code 2, never a traceback."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags

from vitcmp.environment import num_cpus

Main = Callable[[Sequence[str]], int]


def start(main: Main, *, takes_words: bool = False) -> None:
    """Runs the program. A flag that is unknown, and a ValueError or OSError of `main`, are said on standard error."""

    def guarded(argv: Sequence[str]) -> int:
        try:
            if argv[1:] and not takes_words:
                raise ValueError(f"unexpected argument {argv[1]!r}: flags start with --, lists have commas")
            return main(argv)
        except (ValueError, OSError) as error:
            return _fail(str(error))

    app.run(guarded, flags_parser=_parse)


def check_threads(num_threads: int) -> int:
    """Returns the number of CPUs; raises ValueError where this process has fewer, or none was asked for."""
    if not 1 <= num_threads <= num_cpus():
        raise ValueError(f"--num_threads={num_threads} must be between 1 and {num_cpus()}, the CPUs of this process")
    return num_threads


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        sys.exit(_fail(f"{error}; --help lists the flags"))


def _fail(message: str) -> int:
    for line in message.splitlines():
        print(f"{Path(sys.argv[0]).stem}: {line}", file=sys.stderr)
    return 2
