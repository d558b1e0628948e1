"""Faults a user can mend, and how a program reports them."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence

USER_ERROR_EXIT = 2
MAX_LINE = 2000  # characters of one problem
SHOWN = 3  # of many problems of one kind

# What differs between problems of one kind: quoted names, lists, numbers, paths, file names.
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\S*/\S*|\S*\d\S*|\S+\.[A-Za-z]{2,5}\b")


class UserError(Exception):
    """One or several faults the user can mend.

    Every problem is one line that names the file, row or config field, says what is wrong and what
    to do about it. Collect all problems of one kind before raising. `problems` has them all;
    characters that a terminal would obey are escaped, overlong lines are cut in the middle.
    """

    def __init__(self, *problems: str):
        if not problems:
            raise ValueError("UserError needs at least one problem")
        self.problems = tuple(map(one_line, problems))
        super().__init__("\n".join(self.problems))


def one_line(text: str) -> str:
    """Text that stays one line of a terminal, whatever names from files stand in it."""
    text = " ".join(text.split())
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE - 400]} ... {text[-400:]}"
    if text.isprintable():
        return text
    escape = lambda c: c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
    return "".join(map(escape, text))


def few(problems: Sequence[str]) -> list[str]:
    """The problems to print: of more than four of one kind the first three, and a count."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        where, _, what = problem.partition(": ")
        # A path says where a problem is; the name of a setting says what it is.
        where = "" if re.search(r"[/\\\d]", where) else where
        kinds.setdefault((where, _VARYING.sub("#", what)), []).append(problem)
    lines = []
    for alike in kinds.values():
        if len(alike) > SHOWN + 1:
            alike = [*alike[:SHOWN], f"... and {len(alike) - SHOWN} more like these"]
        lines += alike
    return lines


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
        for problem in few(error.problems):
            print(f"error: {problem}", file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
