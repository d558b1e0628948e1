"""Faults a user can mend, and how a program reports them."""

import sys
from collections.abc import Callable, Iterable

from absl import app, flags, logging

USER_ERROR_EXIT = 2


class UserError(Exception):
    """One or several faults the user can mend.

    Every problem is one line that names the file, row or config field, says what is wrong and what
    to do about it. Collect all problems of one kind before raising.
    """

    def __init__(self, *problems: str):
        if not problems:
            raise ValueError("UserError needs at least one problem")
        self.problems = tuple(" ".join(p.split()) for p in problems)
        super().__init__("\n".join(self.problems))


def raise_if(problems: Iterable[str], limit: int | None = None) -> None:
    """Raises one `UserError` with all problems, if there are any.

    With a `limit`, problems beyond it are only counted, on a last line.
    """
    problems = list(problems)
    if limit is not None and len(problems) > limit:
        problems = [*problems[:limit], f"... and {len(problems) - limit} more"]
    if problems:
        raise UserError(*problems)


def report(main: Callable[[], int | None]) -> int:
    """Runs `main`; prints a `UserError` as lines on stderr. Returns the exit status."""
    try:
        return main() or 0
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(argv: list[str]) -> list[str]:
    """Flags of the command line.

    Libraries log nothing unless --verbosity is given: what goes wrong they also raise.
    """
    logging.set_verbosity(logging.FATAL)
    try:
        rest = flags.FLAGS(argv)
        for value in flags.FLAGS.flag_values_dict().values():
            hasattr(value, "items")  # a configuration that was not loaded says so when touched
        if len(rest) > 1:
            raise UserError(f"{rest[1]}: not understood; options are written --name=value")
    except (
        flags.Error,
        UserError,
        AttributeError,
        KeyError,
        ValueError,
        TypeError,
        OSError,
    ) as error:
        head, traceback, tail = str(error).partition("Traceback (most recent call last)")
        # A fault inside a configuration file: what it says stands in its last line.
        lines = [head, tail.strip().splitlines()[-1]] if traceback else [head]
        print(f"error: {' '.join(' '.join(lines).split())}; see --help", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT)
    return rest


def run(main: Callable[[], int | None]) -> None:
    """Entry point of every program that takes absl flags: parses them, runs `main`, exits."""
    app.run(lambda argv: sys.exit(report(main)), flags_parser=_parse)
