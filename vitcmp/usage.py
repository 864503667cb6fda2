"""How a program takes its command line: what is wrong with it is one message and exit code 2, never a traceback."""

import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags

Main = Callable[[Sequence[str]], int]


def start(
    main: Main, *, takes_words: bool = False, errors: tuple[type[Exception], ...] = (ValueError, OSError)
) -> None:
    """Runs the program and ends with what `main` returns, 2 for bad usage, or 130 for Ctrl-C.

    An unknown flag, a word that is no flag (unless `takes_words`), and `errors` of `main` are said on standard error.
    --help prints the program's docstring and its own flags.
    """

    def guarded(argv: Sequence[str]) -> int:
        try:
            if argv[1:] and not takes_words:
                raise ValueError(f"unexpected argument {argv[1]!r}: flags start with --, lists have commas")
            return main(argv)
        except errors as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            return 130

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    if {"-h", "--help", "-help", "--helpshort", "--helpfull"} & set(argv):
        _show_help()
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        sys.exit(_fail(f"{error}; --help lists the flags"))


def _show_help() -> NoReturn:
    program = sys.modules["__main__"]
    print(program.__doc__)
    for flag in flags.FLAGS.get_key_flags_for_module(program):
        default = "" if flag.default is None else f" (default: {flag.default})"
        text = textwrap.fill(flag.help, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        print(f"  --{flag.name}{default}\n{text}")
    sys.exit(0)


def _fail(message: str) -> int:
    spec = sys.modules["__main__"].__spec__  # as `python -m vitcmp.run` has it
    program = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
    for line in message.splitlines():
        print(f"{program}: {line}", file=sys.stderr)
    return 2
