"""Faults that a user can correct, and how a program reports them."""

import errno
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

USER_ERROR_EXIT = 2
UNREAD_EXIT = 141  # 128 + SIGPIPE, what a shell reports of other programs
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit on files
MAX_LINE = 2000  # characters of one problem
SHOWN = 3  # of many problems of one kind
MAX_PROBLEMS = 1000  # a list of millions helps nobody

# What differs between problems of one kind: quoted names, lists, numbers, paths, file names.
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\S*/\S*|\S*\d\S*|\S+\.[A-Za-z]{2,5}\b")
_COUNTED = re.compile(r"\.\.\. and (\d+) more")


class UserError(Exception):
    """One or several faults that the user can correct.

    Every problem is one line that names the file, row or config field, says what is wrong and what
    to do about it. Collect all problems of one kind before raising. `problems` has them all;
    control characters are escaped, and long lines are cut in the middle.
    """

    def __init__(self, *problems: str):
        if not problems:
            raise ValueError("UserError needs at least one problem")
        self.problems = tuple(map(one_line, problems))
        super().__init__("\n".join(self.problems))


def one_line(text: str) -> str:
    """The text as one line: names from files may hold line breaks and control characters."""
    text = " ".join(text.split())
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE - 400]} ... {text[-400:]}"
    if text.isprintable():
        return text
    escape = lambda c: c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
    return "".join(map(escape, text))


def is_utf8(text: str) -> bool:
    """Whether a text can be written to a file; names of files may hold bytes that cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def few(problems: Sequence[str]) -> list[str]:
    """The problems to print: of more than four of one kind the first three, and a count.

    A problem `... and N more` stands for N that were only counted.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    hidden = sum(int(m[1]) for problem in problems if (m := _COUNTED.fullmatch(problem)))
    for problem in problems:
        if _COUNTED.fullmatch(problem):
            continue
        where, _, what = problem.partition(": ")
        # A path says where a problem is; the name of a setting says what it is.
        where = "" if re.search(r"[/\\\d]", where) else where
        kinds.setdefault((where, _VARYING.sub("#", what)), []).append(problem)
    lines = []
    for alike in kinds.values():
        # Problems that were only counted are taken to be of the only kind.
        count = len(alike) + (hidden if len(kinds) == 1 else 0)
        if count > SHOWN + 1:
            alike = [*alike[:SHOWN], f"... and {count - SHOWN} more like these"]
        lines += alike
    return lines + [f"... and {hidden} more"] * (hidden > 0 and len(kinds) != 1)


def raise_if(problems: Iterable[str]) -> None:
    """Raises one `UserError` with all problems, if there are any.

    Problems beyond `MAX_PROBLEMS` are only counted, on a last line.
    """
    kept, more = [], 0
    for problem in problems:
        counted = _COUNTED.fullmatch(problem)
        if not counted and len(kept) < MAX_PROBLEMS:
            kept.append(problem)
        else:
            more += int(counted[1]) if counted else 1
    if kept:
        raise UserError(*kept, *[f"... and {more} more"] * (more > 0))


def disk_full(path: object) -> str:
    """The line about a full disk."""
    return one_line(f"{path}: the disk is full; free some space and run again, nothing was lost")


class Attempts:
    """Runs what may fail and keeps the problems, so that all are reported together."""

    def __init__(self):
        self.problems: list[str] = []

    def __call__(self, action: Callable[[], T]) -> T | None:
        """What `action` returns; None where it raised a `UserError`."""
        try:
            return action()
        except UserError as error:
            self.problems.extend(error.problems)
            return None

    def end(self) -> None:
        """Raises `UserError` with all problems so far, if there are any."""
        raise_if(dict.fromkeys(self.problems))


def report(main: Callable[[], int | None]) -> int:
    """Runs `main`; prints a `UserError`, or a full disk, as lines on stderr.

    Where nobody reads stdout any more, as behind `| head`, it ends without a word.
    Returns the exit status.
    """
    if sys.stdout is None:  # closed, as by `>&-`: what is opened next would get its number
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        for problem in few(error.problems):
            print(f"error: {problem}", file=sys.stderr)
        return USER_ERROR_EXIT
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return UNREAD_EXIT
        if error.errno not in FULL:
            raise
        print(f"error: {disk_full(error.filename or 'a file')}", file=sys.stderr)
        return USER_ERROR_EXIT
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        print("error: gs:// needs another package; pip install 'dopsd_jax[gcs]'", file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _unread() -> bool:
    """Whether stdout is a pipe that nobody reads; what is left for it is then thrown away."""
    try:
        place = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # what stands for it, as in a notebook, has none
        return False
    watched = select.poll()
    watched.register(place, 0)
    if not watched.poll(0):  # another pipe
        return False
    # Python flushes stdout once more when it ends, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), place)
    return True
