"""How a program starts and ends: its options, its entry point, its exit status.

A program reads its command line before it imports JAX, which takes seconds:

    if __name__ == "__main__":
        program.parse()

    import jax
"""

import sys
from collections.abc import Callable, Sequence

from absl import flags, logging

from dopsd_jax.common.errors import UserError, report

FLAGS = flags.FLAGS
HELP = ("--help", "-help", "-h", "--helpfull", "-helpfull", "-?")


def parse(
    *,
    required: Sequence[str] = (),
    rewrite: Callable[[list[str]], list[str]] = list,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Reads the options; what is wrong with them ends the program with a line.

    required: options that must be given. rewrite: what to make of the command line first. check:
    raises `UserError` for options that are wrong together.
    """
    flags.mark_flags_as_required(required)
    status = report(lambda: _parse(rewrite(sys.argv), check))
    if status:
        sys.exit(status)


def _parse(argv: list[str], check: Callable[[], None]) -> None:
    if any(option in HELP for option in argv[1:]):
        print(help_text(argv[0]))
        sys.exit(0)
    logging.set_verbosity(logging.FATAL)  # what goes wrong in a library is raised as well
    try:
        rest = FLAGS(argv)
        for value in FLAGS.flag_values_dict().values():
            hasattr(value, "items")  # a configuration that was not loaded says so when touched
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        head, traceback, tail = str(error).partition("Traceback (most recent call last)")
        # A fault inside a configuration file: what it says stands in its last line.
        lines = [head, tail.strip().splitlines()[-1]] if traceback else [head]
        raise UserError(f"{' '.join(lines)}; see --help") from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not understood; options are written --name=value; see --help")
    check()


def help_text(name: str) -> str:
    """What the program is, and its options with their defaults."""
    about = sys.modules["__main__"].__doc__ or ""
    own = [m for m in FLAGS.flags_by_module_dict() if m == name or m.startswith("dopsd_jax.")]
    return "\n".join([about.strip(), "", *map(FLAGS.module_help, own)])


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` with the options read, and ends the program with its status."""
    if not FLAGS.is_parsed():
        parse()
    sys.exit(report(main))
